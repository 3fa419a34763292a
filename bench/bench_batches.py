"""From a plan to what the encoder reads: 8192 pairs of 32 + 128 tokens, beside the least that must happen.

Texts lie anywhere in a store of a million, which is larger than the caches. Nothing here uses more than one core.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hbt_fast.data.feed import Feed
from hbt_fast.data.pack import assign, distinct, pack, row_loads
from hbt_fast.data.plan import BatchPlan

PAIRS, TEXTS, BUDGET = 8192, 1_000_000, 16_384


@pytest.fixture(scope="module")
def source():
    """Even texts are queries of 16 to 48 tokens, odd ones passages of 64 to 192; a store's arrays in memory."""
    rng = np.random.default_rng(0)
    lengths = np.where(np.arange(TEXTS) % 2, rng.integers(64, 193, TEXTS), rng.integers(16, 49, TEXTS))
    offsets = np.concatenate([[0], lengths.cumsum()])
    tokens = rng.integers(5, 250_000, offsets[-1], dtype=np.int32)
    arrays = {"tokens": tokens, "token_offsets": offsets, "token_hashes": rng.integers(0, 2**63, TEXTS, np.uint64)}
    for array in arrays.values():
        array.setflags(write=False)
    return SimpleNamespace(**arrays)


class Planner:
    """Random pairs, at no cost; the real one has benchmarks of its own."""

    def __init__(self):
        rng, none = np.random.default_rng(1), np.empty(0, np.int64)
        self.plans = []
        for step in range(4):
            q, p = (2 * rng.choice(TEXTS // 2, PAIRS, replace=False) + role for role in (0, 1))
            languages = np.zeros(PAIRS, np.int32)
            self.plans.append(BatchPlan(step, "mono", 0, q, languages, languages, q, p, p, none, none, none, 0, p))

    def plan(self, step):
        return self.plans[step % 4]


@pytest.fixture(scope="module")
def texts():
    """Of one batch: (2 * PAIRS,) text numbers, queries first."""
    plan = Planner().plan(0)
    return np.concatenate([plan.queries, plan.passages])


def sort_and_copy(source, texts):
    """The floor of packing: the order of the lengths, and one copy of as many tokens that lie in one place."""
    order = np.argsort(source.token_offsets[texts + 1] - source.token_offsets[texts], kind="stable")
    flat = np.concatenate([micro.tokens for micro in pack(texts[order], source.tokens, source.token_offsets, BUDGET)])

    def floor():
        np.argsort(source.token_offsets[texts + 1] - source.token_offsets[texts], kind="stable")
        return flat.copy()

    return floor


def test_pack(against_floor, source, texts):
    floor = sort_and_copy(source, texts)
    against_floor(lambda: pack(texts, source.tokens, source.token_offsets, BUDGET), floor, "sort + memcpy", rounds=50)


def test_pack_by_tokenizer_pad(against_floor, source, texts):
    """What a collator does: two padded batches, of the queries and of the passages, from lists of ids."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({"?": 0, "pad": 1}, unk_token="?"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="?", pad_token="pad")
    ids = [{"input_ids": source.tokens[slice(*source.token_offsets[t : t + 2])].tolist()} for t in texts]

    def rival():
        return [tokenizer.pad(part, return_tensors="pt") for part in (ids[:PAIRS], ids[PAIRS:])]

    against_floor(rival, sort_and_copy(source, texts), "sort + memcpy", rounds=3)


def test_find_repeats(against_floor, source, texts):
    def repeats():
        return distinct(texts, source.tokens, source.token_offsets, source.token_hashes)

    against_floor(repeats, lambda: source.token_hashes[texts], "reading the hashes", rounds=50)


@pytest.mark.parametrize("world", [8, 64])
def test_share_out(against_floor, source, texts, world):
    none = texts[:0]

    def shares():
        return assign(row_loads(texts[:PAIRS], texts[PAIRS:], none, none, source.token_offsets), world)

    def floor():
        lengths = source.token_offsets[texts + 1] - source.token_offsets[texts]
        return np.argsort(lengths[:PAIRS] + lengths[PAIRS:], kind="stable")

    against_floor(shares, floor, "reading and sorting the loads", rounds=50)


def test_feed_8_batches(against_floor, source, texts):
    """A reader that does nothing but read: the thread's own pace."""
    store, floor = SimpleNamespace(sources=(source,)), sort_and_copy(source, texts)
    with Feed(Planner(), store, budget=BUDGET, steps=10**9, ahead=1) as feed:
        against_floor(lambda: [next(feed) for _ in range(8)], lambda: [floor() for _ in range(8)], "sort + memcpy")


def test_feed_beside_a_step(against_floor, source):
    """A reader that computes between two batches, beside the same without a feed: what the thread takes from it."""
    a_NN, store = torch.randn(1024, 1024), SimpleNamespace(sources=(source,))

    def step():
        for _ in range(8):
            torch.mm(a_NN, a_NN)

    with Feed(Planner(), store, budget=BUDGET, steps=10**9) as feed:

        def fed():
            next(feed)
            step()

        against_floor(fed, step, "the step alone", rounds=20)
