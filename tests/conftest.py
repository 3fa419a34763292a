"""Small things that several claims need: rows, a tokenizer, a store, an encoder, worker processes."""

from __future__ import annotations

import os

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from pathlib import Path

import pytest
import torch

from hbt_fast.data.build import build_source
from hbt_fast.data.rows import Row
from hbt_fast.data.store import Role, Store
from hbt_fast.encoder.scratch import ScratchConfig, encoder_from_scratch, train_tokenizer

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
LANGUAGES = ("de", "en", "fr")
WORDS = "red blue green old new big small fast slow cat dog bird house tree river stone wind fire moon star".split()  # noqa: SIM905


def parallel_rows(count: int, *, languages=LANGUAGES, questions: int = 2) -> list[Row]:
    """Made-up n-way rows: `questions` of each passage, in every language."""
    rows = []
    for i in range(count):
        words = [WORDS[(i // 20**k + 3 * k) % 20] for k in range(3)] + [str(i)] * (1 + i % 5)
        for j in range(questions):
            rows.append(
                Row(
                    {code: f"{code} which {words[j]} {i} {j}" for code in languages},
                    {code: f"{code} the {' '.join(words)}" for code in languages},
                    content=f"c{i}",
                    where=f"made:{i}",
                )
            )
    return rows


def build_store(folder: Path, sources, tokenizer, query: Role, passage: Role, **options) -> Store:
    """A store of made-up sources: (name, sampling weight or None, rows) of each."""
    made = [
        build_source(folder / f"source-{name}", name, rows, tokenizer, query, passage, progress=False, **options)
        for name, _, rows in sources
    ]
    return Store(tuple(made), tuple(weight for _, weight, _ in sources))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data, where there is one."""
    if not SHARED.is_dir():
        pytest.skip(f"no real data at {SHARED}")
    return SHARED


@pytest.fixture(scope="session")
def tokenizer():
    rows = parallel_rows(300)
    texts = [t for r in rows for t in (*r.queries.values(), *r.passages.values())]
    return train_tokenizer(texts, 300)


@pytest.fixture(scope="session")
def store(tokenizer, tmp_path_factory):
    """Two sources: 150 contents with two questions each in three languages, and monolingual pairs of 60."""
    folder = tmp_path_factory.mktemp("store") / "store"
    mono = [
        Row({"en": f"ask {i}"}, {"en": f"say {i} {'so ' * (i % 7)}"}, {"en": (f"no {i}", f"never {i}")})
        for i in range(60)
    ]
    sources = [("parallel", None, parallel_rows(150)), ("plain", None, mono)]
    return build_store(folder, sources, tokenizer, Role("Query: ", 24), Role("Passage: ", 24))


@pytest.fixture
def make_encoder(tokenizer):
    """A tiny encoder; the same weights for the same seed."""

    def make(seed: int = 0, dropout: float = 0.1, hidden: int = 32):
        shape = ScratchConfig(len(tokenizer), hidden, 2, 4)
        return encoder_from_scratch(tokenizer, shape, max_length=32, dropout=dropout, seed=seed)

    return make


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)
