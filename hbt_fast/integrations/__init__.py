"""The loss inside other people's trainers: one module per package, imported by its name, so that none costs another.

    hbt_fast.integrations.sentence_transformers    MultipleNegativesRankingLoss, CachedMultipleNegativesRankingLoss
    hbt_fast.integrations.gradcache                SimpleContrastiveLoss, DistributedContrastiveLoss
    hbt_fast.integrations.open_clip                ClipLoss
    hbt_fast.integrations.hf_trainer               RetrievalLoss, RetrievalTrainerMixin

Each has the arguments of what it replaces, and refuses with a ValueError what InfoNCE does not express exactly. A
training loop in plain torch needs none of them: `hbt_fast.InfoNCELoss` is a module.
"""
