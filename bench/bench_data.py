"""The batch plan and packing at batch 8192, beside the least that must happen: drawing rows, copying tokens."""

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from hbt_fast.data.pack import pack
from hbt_fast.data.plan import BatchPlanner
from hbt_fast.data.rows import Row
from hbt_fast.data.store import Role, build_store

BATCH, CONTENTS, BUDGET = 8192, 40_000, 16_384


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    from tokenizers import Tokenizer, models, pre_tokenizers

    core = Tokenizer(models.WordLevel({str(n): n for n in range(1000)} | {"?": 1000}, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    rng = np.random.default_rng(0)
    words = [" ".join(map(str, rng.integers(0, 1000, rng.integers(4, 90)))) for _ in range(2 * CONTENTS)]
    languages = ("aa", "bb", "cc", "dd")
    rows = [
        Row(dict.fromkeys(languages, words[2 * i]), dict.fromkeys(languages, f"{i} {words[2 * i + 1]}"))
        for i in range(CONTENTS)
    ]
    folder = tmp_path_factory.mktemp("bench") / "store"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="?")
    return build_store(folder, [("made", None, rows)], tokenizer, Role("", 64), Role("", 128), progress=False)


@pytest.mark.parametrize("strategy", ["mono", "cross"])
def test_plan(against_floor, store, strategy):
    planner, step = BatchPlanner(store, BATCH, strategy=strategy), iter(range(10**9))
    rng = np.random.default_rng(0)

    def floor():  # random rows, and one look at four columns for each
        rows = rng.integers(0, store.rows, BATCH)
        return [
            column[rows]
            for column in (store.field_queries, store.field_passages, store.row_contents, store.row_sources)
        ]

    against_floor(lambda: planner.plan(next(step)), floor, "drawing rows with repeats", rounds=20)


def test_pack(against_floor, store):
    plan = BatchPlanner(store, BATCH, strategy="cross").plan(0)
    texts = np.concatenate([plan.queries, plan.passages])
    tokens = np.concatenate([store.text(t) for t in texts])

    def floor():  # the lengths, their order, and one copy of the tokens
        np.argsort(store.token_offsets[texts + 1] - store.token_offsets[texts], kind="stable")
        return tokens.copy()

    against_floor(lambda: pack(texts, store.tokens, store.token_offsets, BUDGET), floor, "sort + memcpy", rounds=20)
