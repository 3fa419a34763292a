"""The feed: every rank's part of every batch in order, whatever thread prepares it; it ends when its reader does."""

import gc
import threading
import time
import traceback
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hbt_fast.config import BatchConfig
from hbt_fast.data.feed import NEGATIVE, PASSAGE, QUERY, Feed, rank_batch, rows_of
from hbt_fast.data.plan import BatchPlan, BatchPlanner
from hbt_fast.data.rows import DataError

BUDGET = 300


class MadeUp:
    """A planner of random batches with repeated texts and up to three negatives per row, over two sources."""

    def __init__(self, size=24, fails_at=None):
        self.size, self.fails_at, self.planned = size, fails_at, []

    def plan(self, step):
        self.planned.append(step)
        if step == self.fails_at:
            raise RuntimeError(f"no plan for step {step}")
        rng = np.random.default_rng(step)
        n = self.size
        owners = np.repeat(np.arange(n), rng.integers(0, 4, n))
        languages = rng.integers(0, 3, n).astype(np.int32)
        numbers = [rng.integers(0, 200, size) for size in (n, n, n, len(owners))]
        contents, negative_contents = np.split(rng.permutation(1000)[: n + len(owners)], [n])
        rows, queries, passages, negatives = numbers
        pairs = (rows, languages, languages, queries, passages, contents)
        ids = np.concatenate([pairs[-1], negative_contents])
        return BatchPlan(step, "mono", step % 2, *pairs, negatives, negative_contents, owners, 0, ids)


@pytest.fixture(scope="module")
def made_up():
    """Sources of 200 texts, every second of which equals another one, with colliding hashes."""
    rng = np.random.default_rng(0)
    sources = []
    for _ in range(2):
        words = [rng.integers(0, 9, length).astype(np.int32) for length in rng.integers(1, 60, 100)] * 2
        offsets = np.cumsum([0, *map(len, words)])
        hashes = np.array([hash(tuple(word.tolist())) % 30 for word in words], np.uint64)
        sources.append(SimpleNamespace(tokens=np.concatenate(words), token_offsets=offsets, token_hashes=hashes))
    return SimpleNamespace(sources=tuple(sources))


def texts_of(batch):
    """The token ids of the batch's texts, as the encoder gets them and the loss orders them."""
    kept = {}
    for micro in batch.micro_batches:
        for index, begin, end in zip(micro.index, micro.cu_seqlens, micro.cu_seqlens[1:], strict=False):
            assert index not in kept
            kept[index] = micro.tokens[begin:end].tolist()
    inverse = range(len(kept)) if batch.inverse is None else batch.inverse
    return [kept[i] for i in inverse]


def stored(source, numbers):
    return [source.tokens[source.token_offsets[t] : source.token_offsets[t + 1]].tolist() for t in numbers]


def same(a, b):
    arrays = [("rows", "texts", "passage_ids"), ("index", "tokens", "cu_seqlens")]
    assert all(getattr(a, name).tolist() == getattr(b, name).tolist() for name in arrays[0])
    assert (a.plan.step, a.tokens) == (b.plan.step, b.tokens)
    for x, y in zip(a.micro_batches, b.micro_batches, strict=True):
        assert all(getattr(x, name).tolist() == getattr(y, name).tolist() for name in arrays[1])
    assert np.array_equal(a.inverse, b.inverse)


def feed_threads():
    return [t for t in threading.enumerate() if t.name == "hbt_fast.feed"]


@pytest.mark.parametrize("world", [1, 2, 5])
def test_the_ranks_parts_are_the_global_batch(made_up, world):
    feeds = [Feed(MadeUp(), made_up, rank=rank, world=world, budget=BUDGET, steps=6) for rank in range(world)]
    for step, parts in enumerate(zip(*feeds, strict=True)):
        plan = MadeUp().plan(step)
        source = made_up.sources[plan.source]
        assert sorted(np.concatenate([part.rows for part in parts]).tolist()) == list(range(24))
        assert {len(part.rows) for part in parts} <= {24 // world, 24 // world + 1}
        for part in parts:
            n = len(part.rows)
            mine = np.isin(plan.negative_rows, part.rows)
            assert part.texts[:n].tolist() == plan.queries[part.rows].tolist()
            assert part.texts[n : 2 * n].tolist() == plan.passages[part.rows].tolist()
            assert part.texts[2 * n :].tolist() == plan.negatives[mine].tolist()
            ids = np.concatenate([plan.contents[part.rows], plan.negative_contents[mine]])
            assert part.passage_ids.tolist() == ids.tolist()
            assert part.passage_ids.dtype == np.int64
            assert texts_of(part) == stored(source, part.texts)
            assert all(micro.cost <= BUDGET for micro in part.micro_batches)
    assert step == 5


def test_every_distinct_text_is_encoded_once(made_up):
    repeats = 0
    for batch in Feed(MadeUp(), made_up, budget=BUDGET, steps=5):
        texts = {tuple(text) for text in texts_of(batch)}
        assert sum(len(micro.index) for micro in batch.micro_batches) == len(texts)
        assert batch.tokens == sum(map(len, texts))
        repeats += len(batch.texts) - len(texts)
    assert repeats > 50


def test_ranks_have_alike_loads(made_up):
    lengths = [np.diff(source.token_offsets) for source in made_up.sources]
    for step in range(4):
        plan = MadeUp(size=160).plan(step)
        source, loads = made_up.sources[plan.source], []
        for rank in range(4):
            rows = rows_of(plan, source, rank, 4)
            mine = np.isin(plan.negative_rows, rows)
            texts = np.concatenate([plan.queries[rows], plan.passages[rows], plan.negatives[mine]])
            loads.append(lengths[plan.source][texts].sum())
        assert max(loads) / np.mean(loads) - 1 < 0.03


def test_the_thread_prepares_what_a_direct_call_does_every_time(made_up):
    for _ in range(2):
        for step, batch in enumerate(Feed(MadeUp(), made_up, rank=1, world=3, budget=BUDGET, steps=12)):
            plan = MadeUp().plan(step)
            source = made_up.sources[plan.source]
            same(batch, rank_batch(plan, source, rows_of(plan, source, 1, 3), BUDGET))


@pytest.mark.parametrize("first", [0, 1, 4, 5, 7])
def test_a_feed_starts_anywhere(made_up, first):
    whole = list(Feed(MadeUp(), made_up, budget=BUDGET, steps=5))
    part = list(Feed(MadeUp(), made_up, budget=BUDGET, first=first, steps=5, ahead=4))
    assert len(whole) == 5
    for a, b in zip(whole[first:], part, strict=True):
        same(a, b)


def test_a_store_on_disk_and_its_planner_feed_the_same_in_resumed_runs(store):
    planner = BatchPlanner(store, BatchConfig(size=30, hard_negatives=2, source_gamma=1.0), seed=3, steps=20)
    whole = list(Feed(planner, store, rank=1, world=2, budget=BUDGET, steps=20))
    for a, b in zip(whole[13:], Feed(planner, store, rank=1, world=2, budget=BUDGET, first=13, steps=20), strict=True):
        same(a, b)
    for batch in whole:
        assert texts_of(batch) == stored(store.sources[batch.plan.source], batch.texts)


def test_so_many_batches_are_prepared_ahead_and_no_more(made_up):
    planner = MadeUp()
    with Feed(planner, made_up, budget=BUDGET, steps=50, ahead=3) as feed:
        for taken in range(4):
            deadline = time.monotonic() + 10
            while len(planner.planned) < taken + 3 and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(0.05)
            assert planner.planned == list(range(taken + 3))
            assert next(feed).plan.step == taken


def test_a_reader_who_stops_early_leaves_no_thread(made_up):
    with Feed(MadeUp(), made_up, budget=BUDGET, steps=10**9) as feed:
        next(feed)
        assert feed_threads()
    assert not feed_threads()
    assert list(feed) == []
    feed.close()

    with pytest.raises(KeyError), Feed(MadeUp(), made_up, budget=BUDGET, steps=10**9):
        raise KeyError
    assert not feed_threads()

    feed = Feed(MadeUp(), made_up, budget=BUDGET, steps=10**9)
    next(feed)
    feed = None  # nobody closes it
    gc.collect()
    deadline = time.monotonic() + 10
    while feed_threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not feed_threads()


def test_a_feed_that_was_read_to_its_end_leaves_no_thread(made_up):
    for steps in (0, 3):
        feed = Feed(MadeUp(), made_up, budget=BUDGET, steps=steps)
        assert len(list(feed)) == steps
        assert not feed_threads()


def test_an_error_comes_at_its_step_with_the_threads_traceback(made_up):
    feed = Feed(MadeUp(fails_at=3), made_up, budget=BUDGET, steps=9, ahead=5)
    assert [next(feed).plan.step for _ in range(3)] == [0, 1, 2]
    with pytest.raises(RuntimeError, match="no plan for step 3") as raised:
        next(feed)
    assert "in plan" in "".join(traceback.format_tb(raised.value.__traceback__))
    assert not feed_threads()
    assert list(feed) == []


def test_fewer_rows_than_ranks_are_refused(made_up):
    with pytest.raises(DataError, match=r"batch\.size is 2, for 3 ranks"):
        next(Feed(MadeUp(size=2), made_up, rank=2, world=3, budget=BUDGET, steps=1))
    for options in ({"rank": 2, "world": 2}, {"ahead": 0}):
        with pytest.raises(ValueError, match="0 <= rank < world and ahead >= 1"):
            Feed(MadeUp(), made_up, budget=BUDGET, steps=1, **options)


def test_torch_keeps_its_number_of_threads(made_up):
    torch.set_num_threads(2)
    list(Feed(MadeUp(), made_up, world=2, budget=BUDGET, steps=5))
    assert torch.get_num_threads() == 2


def test_rewritten_texts_replace_the_stored_ones_and_repeats_are_found_in_them(made_up):
    seen = {}

    def rewrite(plan, source, texts, roles, rows):
        if plan.step % 2:
            return None
        seen[plan.step] = (texts, roles, rows)
        ids = [[int(role)] * (1 + row % 2) for role, row in zip(roles, rows, strict=True)]
        return np.array([i for text in ids for i in text], np.int32), np.cumsum([0, *map(len, ids)])

    for batch in Feed(MadeUp(), made_up, rank=1, world=2, budget=BUDGET, steps=4, rewrite=rewrite):
        plan, n = batch.plan, len(batch.rows)
        if plan.step % 2:
            assert texts_of(batch) == stored(made_up.sources[plan.source], batch.texts)
            continue
        texts, roles, rows = seen[plan.step]
        assert texts.tolist() == batch.texts.tolist()
        assert roles.tolist() == [QUERY] * n + [PASSAGE] * n + [NEGATIVE] * (len(texts) - 2 * n)
        assert rows[: 2 * n].tolist() == batch.rows.tolist() * 2
        assert rows[2 * n :].tolist() == plan.negative_rows[np.isin(plan.negative_rows, batch.rows)].tolist()
        assert texts_of(batch) == [[int(role)] * (1 + row % 2) for role, row in zip(roles, rows, strict=True)]
        assert sum(len(micro.index) for micro in batch.micro_batches) == 6


@pytest.mark.parametrize("answer", ["dtype", "count", "empty", "beyond"])
def test_a_rewrite_that_numba_could_not_read_is_refused(made_up, answer):
    def rewrite(plan, source, texts, roles, rows):
        tokens, offsets = np.zeros(len(texts), np.int32), np.arange(len(texts) + 1)
        offsets[1:] += answer == "beyond"
        offsets[1] -= answer == "empty"
        return tokens.astype(np.int64) if answer == "dtype" else tokens, offsets[answer == "count" :]

    with pytest.raises(ValueError, match="rewrite must return"):
        next(Feed(MadeUp(), made_up, budget=BUDGET, steps=1, rewrite=rewrite))


def test_tokens_are_pinned_where_there_is_a_gpu(made_up):
    for batch in Feed(MadeUp(), made_up, budget=BUDGET, steps=3, pin=True):
        assert texts_of(batch) == stored(made_up.sources[batch.plan.source], batch.texts)
        pinned = [torch.from_numpy(micro.tokens).is_pinned() for micro in batch.micro_batches]
        assert all(pinned) if torch.cuda.is_available() else not any(pinned)
