"""Writing an encoder as a folder that AutoModel and SentenceTransformer both load, with equal embeddings."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from hbt_fast.encoder.model import RECORDED, Encoder

# the module paths that sentence-transformers 3 to 6 understand
MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
]


def export(encoder: Encoder, folder: str | Path, state: dict[str, torch.Tensor] | None = None) -> Path:
    """Write the encoder: safetensors, config, tokenizer and the sentence-transformers files.

    Args:
        encoder: its prompts are written as "query", "passage" and "document" (sentence-transformers' own name).
        folder: made if absent.
        state: parameters by the encoder's names, where the module's own are not whole (ZeRO-3 shards them).
    """
    folder = Path(folder)
    (folder / "1_Pooling").mkdir(parents=True, exist_ok=True)
    (folder / "2_Normalize").mkdir(exist_ok=True)
    weights = None
    if state is not None:
        weights = {name.removeprefix("model."): value for name, value in state.items() if name.startswith("model.")}
    encoder.model.save_pretrained(folder, state_dict=weights)
    encoder.tokenizer.save_pretrained(folder)
    prompts = {**encoder.prompts, "document": encoder.prompts["passage"]}
    pooling = {
        "word_embedding_dimension": encoder.dimension,
        **{flag: encoder.pooling == name for name, (_, flag) in RECORDED.items()},
        "include_prompt": True,
    }
    for name, content in {
        "modules.json": MODULES,
        "sentence_bert_config.json": {"max_seq_length": encoder.max_length, "do_lower_case": False},
        "config_sentence_transformers.json": {"prompts": prompts, "similarity_fn_name": "cosine"},
        "1_Pooling/config.json": pooling,
    }.items():
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return folder
