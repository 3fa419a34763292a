"""Building a token store, beside the tokenizer alone: encode_batch of the same texts, in its own threads.

Texts are the paragraphs and questions of SQuAD where they are there, else made up; the tokenizer is XLM-R's (of
multilingual-e5-small) where it is there, else one trained on them. In the store a text that occurs twice in a chunk is
tokenised once, so the floor is that of the texts that the store holds. Once with the rows in memory, and once read from
a file, as users do.
"""

import itertools
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest

from hbt_fast.data.build import build_source
from hbt_fast.data.rows import Row
from hbt_fast.data.sources import Source, read_source
from hbt_fast.data.store import Role
from hbt_fast.encoder.scratch import train_tokenizer

REPOSITORY = Path(__file__).resolve().parents[1]
SQUAD = REPOSITORY.parent / "shared" / "data" / "squad-v1.1" / "train-v1.1.json.gz"
MODEL = REPOSITORY / "models" / "e5-small"
ROLES = Role("query: ", 64), Role("passage: ", 256)


@pytest.fixture(scope="module")
def rows():
    if SQUAD.is_file():
        return list(read_source(Source(path=str(SQUAD), format="squad", language="en", passage="paragraph")))
    rng = np.random.default_rng(0)
    words = ["".join(map(chr, rng.integers(97, 123, n))) for n in rng.integers(2, 12, 20_000)]
    texts = [" ".join(rng.choice(words, 20 if i % 2 else 150)) for i in range(80_000)]
    return [Row({"en": texts[i + 1]}, {"en": texts[i]}) for i in range(0, len(texts), 2)]


@pytest.fixture(scope="module")
def tokenizer(rows):
    if MODEL.is_dir():
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(MODEL)
    return train_tokenizer((text for row in rows[:5000] for text in row.passages.values()), 8000)


def beside_the_tokenizer(against_floor, build, tokenizer):
    """Time `build`, which makes a store, beside encode_batch of the texts in it."""
    made = build()
    texts = [
        [role.prompt + made.text(n) for n in np.unique(numbers)]
        for role, numbers in zip(ROLES, (made.field_queries, made.field_passages), strict=True)
    ]
    core = tokenizer.backend_tokenizer
    core.no_padding()

    def floor():
        for role, several in zip(ROLES, texts, strict=True):
            core.enable_truncation(role.max_length)
            for start in range(0, len(several), 4096):
                core.encode_batch(several[start : start + 4096])

    against_floor(build, floor, "encode_batch", rounds=3)


@pytest.fixture
def many(monkeypatch):
    """As if the rows were the first of many: processes are started at once."""
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    monkeypatch.setattr("hbt_fast.data.build.ALONE", 1)


@pytest.mark.parametrize("workers", [0, None], ids=["in this process", "in a process per core"])
def test_build(against_floor, rows, tokenizer, tmp_path, many, workers):
    number = itertools.count()

    def build():
        folder = tmp_path / str(next(number))
        return build_source(folder, "bench", rows, tokenizer, *ROLES, workers=workers, progress=False)

    beside_the_tokenizer(against_floor, build, tokenizer)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_read_and_build(against_floor, rows, tokenizer, tmp_path, many, name):
    records = [{"query": row.queries["en"], "passage": row.passages["en"], "language": "en"} for row in rows]
    if name.endswith("jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / name)
    number = itertools.count()

    def build():
        folder, found = tmp_path / str(next(number)), read_source(Source(str(tmp_path / name)))
        return build_source(folder, "bench", found, tokenizer, *ROLES, progress=False)

    beside_the_tokenizer(against_floor, build, tokenizer)
