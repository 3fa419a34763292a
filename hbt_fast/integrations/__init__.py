"""The loss inside other people's trainers: one module per package, imported by its name, so that none costs another.

    hbt_fast.integrations.sentence_transformers    [Cached]MultipleNegatives[Symmetric]RankingLoss
    hbt_fast.integrations.gradcache                Simple-, DistributedContrastiveLoss, ...WithQueryClosure
    hbt_fast.integrations.open_clip                ClipLoss, CoCaLoss, DistillClipLoss
    hbt_fast.integrations.hf_trainer               RetrievalLoss, RetrievalTrainerMixin

Each has the arguments of what it replaces, and refuses with a ValueError what InfoNCE does not express exactly. A
training loop in plain torch needs none of them: `hbt_fast.InfoNCELoss` is a module.
"""
