"""mteb's own path beside ours: XQuADRetrieval in two languages, and its search alone; scoring is mteb's in either.

Whole tasks: multilingual-e5-small and XQuAD's paragraphs (models/e5-small, ../shared/data), 4 paragraphs per language
or, with --slow, all 240. The floor is every product of every layer on the tokens that there are. Search: random unit
vectors, 1,000 results per query, as mteb asks for; the floor is one product and torch's top k.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from steps import WORLD, products

mteb = pytest.importorskip("mteb")

from datasets import Dataset  # noqa: E402 - comes with mteb
from mteb.models import SearchEncoderWrapper  # noqa: E402
from mteb.tasks import XQuADRetrieval  # noqa: E402

from hbt_fast.encoder import Encoder  # noqa: E402
from hbt_fast.evaluation.mteb_adapter import MTEBEncoder, MTEBSearch  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
MODEL, DATA = ROOT / "models" / "e5-small", ROOT.parent / "shared" / "data" / "xquad-r"
LANGUAGES, TOKENS = ("de", "en"), 8192
DEVICE = WORLD.device.type
QUERIES, DOCUMENTS, DIMENSION, TOP = 2000, 13_014, 384, 1000
SILENT = {"cache": None, "show_progress_bar": False, "co2_tracker": False}


class LocalXQuAD(XQuADRetrieval):
    """mteb's XQuADRetrieval from files: paragraphs are the corpus, one pool per language."""

    paragraphs = 240

    def load_data(self, *args, **kwargs):
        self.hf_subsets, self.dataset, self.data_loaded = list(LANGUAGES), {}, True
        for language in LANGUAGES:
            articles = json.loads((DATA / f"{language}.json").read_text(encoding="utf-8"))["data"]
            paragraphs = [p for article in articles for p in article["paragraphs"]][: self.paragraphs]
            texts, qas = (
                [p["context"] for p in paragraphs],
                [(i, qa) for i, p in enumerate(paragraphs) for qa in p["qas"]],
            )
            corpus = {"id": [f"d{i}" for i in range(len(texts))], "title": [""] * len(texts), "text": texts}
            self.dataset[language] = {
                "validation": {
                    "corpus": Dataset.from_dict(corpus),
                    "queries": Dataset.from_dict(
                        {"id": [q["id"] for _, q in qas], "text": [q["question"] for _, q in qas]}
                    ),
                    "relevant_docs": {q["id"]: {f"d{i}": 1} for i, q in qas},
                    "top_ranked": None,
                }
            }


def sentence_transformers(encoder):
    library = pytest.importorskip("sentence_transformers")
    prompts = {"query": encoder.prompts["query"], "document": encoder.prompts["passage"]}
    return library.SentenceTransformer(str(MODEL), device=DEVICE, prompts=prompts)


WAYS = {
    "hbt_fast": MTEBSearch,
    "mteb's search, hbt_fast's encoder": MTEBEncoder,
    "mteb and sentence-transformers": sentence_transformers,
}


@pytest.mark.parametrize("paragraphs", [4, pytest.param(240, marks=pytest.mark.slow)])
@pytest.mark.parametrize("way", WAYS)
@torch.inference_mode()
def test_whole_task(against_floor, way, paragraphs):
    if not (MODEL.is_dir() and DATA.is_dir()):
        pytest.skip("needs models/e5-small and ../shared/data")
    encoder = Encoder.from_pretrained(MODEL).to(DEVICE).eval()
    task = LocalXQuAD()
    task.paragraphs = paragraphs
    task.load_data()
    tokens = 0
    for subset in task.dataset.values():
        for part, prompt in (("queries", "query"), ("corpus", "passage")):
            tokens += len(encoder.tokenise(list(subset["validation"][part]["text"]), encoder.prompts[prompt])[0])
    floor, work = products(encoder.model.config, tokens, TOKENS, torch.float32)
    model = WAYS[way](encoder)

    def run():
        mteb.evaluate(model, task, **SILENT)

    rounds = 3 if paragraphs == 4 else 1
    against_floor(run, floor, "the products of every layer, without padding", rounds=rounds, work=work)


class Known(MTEBSearch):
    """Vectors are known, so that search alone takes time."""

    def __init__(self, vectors):
        self.vectors, self.device, self.folder = vectors, "cpu", None
        self.mteb_model_meta = None

    def embed(self, texts, prompt_type, **kwargs):
        count = sum(1 for _ in texts)
        return self.vectors[prompt_type.value], np.arange(count)


class KnownToMTEB:
    """The same for mteb's search."""

    mteb_model_meta = None
    similarity = MTEBEncoder.similarity

    def __init__(self, vectors):
        self.vectors = vectors

    def encode(self, inputs, *, prompt_type, **kwargs):
        sum(len(batch["text"]) for batch in inputs)
        return self.vectors[prompt_type.value]


SEARCHES = {"hbt_fast": Known, "mteb": lambda vectors: SearchEncoderWrapper(KnownToMTEB(vectors))}


@pytest.mark.parametrize("way", SEARCHES)
def test_search(against_floor, way):
    rng = np.random.default_rng(0)
    vectors = {}
    for kind, count in (("query", QUERIES), ("document", DOCUMENTS)):
        made = rng.standard_normal((count, DIMENSION), dtype=np.float32)
        vectors[kind] = made / np.linalg.norm(made, axis=1, keepdims=True)
    queries, corpus = (
        Dataset.from_dict({"id": [f"{kind}{i}" for i in range(count)], "text": [f"text {i}" for i in range(count)]})
        for kind, count in (("q", QUERIES), ("d", DOCUMENTS))
    )
    model, q_Nd, p_Md = (
        SEARCHES[way](vectors),
        torch.from_numpy(vectors["query"]),
        torch.from_numpy(vectors["document"]),
    )
    about = {"task_metadata": XQuADRetrieval.metadata, "hf_split": "validation", "hf_subset": "en", "num_proc": None}
    about["encode_kwargs"] = {"show_progress_bar": False}

    def run():
        model.index(corpus, **about)
        found = model.search(queries, top_k=TOP, **about)
        assert len(found["q0"]) == TOP

    against_floor(run, lambda: torch.topk(q_Nd @ p_Md.T, TOP, dim=1), "one product and the top k", rounds=3)
