"""Lines of Python with which each client library puts an exported model's prompts before texts, for its card.

Left to their defaults LangChain, LlamaIndex, Chroma and transformers put none, and vectors are others than in training.
"""

from __future__ import annotations

import json
from pathlib import Path

from hbt_fast.encoder.modules import Recorded, read_recorded
from hbt_fast.encoder.pooling import Pooling
from hbt_fast.encoder.prompts import KINDS

PLURAL = {"query": "queries", "passage": "passages"}
POOL: dict[Pooling, list[str]] = {  # hidden (n, L, d), mask (n, L, 1) -> pooled (n, d)
    "mean": ["pooled = (hidden * mask).sum(1) / mask.sum(1)"],
    "cls": ["pooled = hidden[torch.arange(len(texts)), mask[..., 0].argmax(1)]"],
    "last": ["pooled = hidden[torch.arange(len(texts)), mask[..., 0].cumsum(1).argmax(1)]"],
    "weighted_mean": [
        "weight = mask.cumsum(1) * mask",
        "pooled = (hidden * weight).sum(1) / weight.sum(1)",
    ],
}


def snippets(folder: Path, separate: bool) -> dict[str, str]:
    """What to write, by library; each is whole, and leaves `queries` and `passages` behind.

    Args:
        folder: of the export; its own name stands for it.
        separate: it holds two encoders, in query/ and passage/.
    """
    names = {kind: f"{folder.name}/{kind}" if separate else folder.name for kind in KINDS}
    recorded = {kind: read_recorded(str(folder / kind if separate else folder)) for kind in KINDS}
    found = {"sentence-transformers": _sentence_transformers(names)}
    if not separate:  # these take one model for both
        query, passage = (json.dumps(recorded[kind].prompts.of(kind) or "", ensure_ascii=False) for kind in KINDS)
        found |= {
            "LangChain": _langchain(folder.name),
            "LlamaIndex": _llama_index(folder.name, query, passage),
            "Chroma": _chroma(folder.name),
        }
    if all(one.dense is None for one in recorded.values()):  # nothing that transformers does not know stands after it
        found["transformers"] = _transformers(names, recorded)
    return found


def _sentence_transformers(names: dict[str, str]) -> str:
    models = {path: "model" if len(set(names.values())) == 1 else f"{kind}_model" for kind, path in names.items()}
    return "\n".join(
        [
            "from sentence_transformers import SentenceTransformer",
            "",
            *(f'{model} = SentenceTransformer("{path}")' for path, model in models.items()),
            *(f'{PLURAL[kind]} = {models[names[kind]]}.encode(["..."], prompt_name="{kind}")' for kind in KINDS),
            "print(queries @ passages.T)",
        ]
    )


def _langchain(name: str) -> str:
    return f"""from langchain_huggingface import HuggingFaceEmbeddings

model = HuggingFaceEmbeddings(
    model_name="{name}",
    encode_kwargs={{"prompt_name": "passage"}},
    query_encode_kwargs={{"prompt_name": "query"}},
)
queries, passages = [model.embed_query("...")], model.embed_documents(["..."])"""


def _llama_index(name: str, query: str, passage: str) -> str:
    return f"""from llama_index.embeddings.huggingface import HuggingFaceEmbedding

model = HuggingFaceEmbedding("{name}", query_instruction={query}, text_instruction={passage})
queries, passages = [model.get_query_embedding("...")], [model.get_text_embedding("...")]"""


def _chroma(name: str) -> str:
    return f"""import chromadb
from chromadb.utils.embedding_functions import SentenceTransformerEmbeddingFunction
from sentence_transformers import SentenceTransformer

collection = chromadb.EphemeralClient().create_collection(
    "passages", embedding_function=SentenceTransformerEmbeddingFunction("{name}", default_prompt_name="passage")
)
collection.add(ids=["0"], documents=["..."])
queries = SentenceTransformer("{name}").encode(["..."], prompt_name="query")  # query_texts would get "passage"
found = collection.query(query_embeddings=queries)
passages = collection.get(include=["embeddings"])["embeddings"]"""


def _transformers(names: dict[str, str], recorded: dict[str, Recorded]) -> str:
    lines = ["import torch", "from transformers import AutoModel, AutoTokenizer", "", ""]
    alike = len(set(names.values())) == 1
    ends = dict.fromkeys(KINDS, "") if alike else {kind: f"_{kind}" for kind in KINDS}
    for kind in KINDS[: 2 - alike]:
        what, end = recorded[kind], ends[kind]
        length = f"max_length={what.max_length}, " if what.max_length else ""
        lines += [
            f'tokenizer{end} = AutoTokenizer.from_pretrained("{names[kind]}")',
            f'model{end} = AutoModel.from_pretrained("{names[kind]}")',
            "",
            "",
            "@torch.inference_mode()",
            f"def encode{end}(texts, prompt):",
            "    texts = [prompt + text for text in texts]",
            f'    inputs = tokenizer{end}(texts, padding=True, truncation=True, {length}return_tensors="pt")',
            f'    hidden, mask = model{end}(**inputs).last_hidden_state, inputs["attention_mask"][..., None]',
            *(f"    {line}" for line in POOL[what.pooling or "mean"]),
            "    return torch.nn.functional.normalize(pooled, dim=-1)",
            "",
            "",
        ]
    for kind in KINDS:
        prompt = json.dumps(recorded[kind].prompts.of(kind) or "", ensure_ascii=False)
        lines.append(f'{PLURAL[kind]} = encode{ends[kind]}(["..."], {prompt})')
    return "\n".join([*lines, "print(queries @ passages.T)"])
