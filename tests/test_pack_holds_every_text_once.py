"""Packing and sharing out: every text once, budgets kept, equal texts found, ranks with alike loads."""

from functools import partial
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hbt_fast.data.pack import assign, distinct, hash_texts, pack, row_loads


def texts_of(lengths, vocabulary=1000, seed=0):
    """Flat tokens and offsets of texts of these lengths, read-only as a store's are."""
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    tokens = np.random.default_rng(seed).integers(0, vocabulary, offsets[-1]).astype(np.int32)
    for array in (tokens, offsets):
        array.setflags(write=False)
    return tokens, offsets


def naive(texts, tokens, offsets, budget, at_least=1):
    """The specification of `pack`, as lists of positions."""
    length = {t: int(offsets[t + 1] - offsets[t]) for t in texts}
    groups = []
    for i in sorted(range(len(texts)), key=lambda i: -length[texts[i]]):
        if groups and (len(groups[-1]) + 1) * length[texts[groups[-1][0]]] <= budget:
            groups[-1].append(i)
        else:
            groups.append([i])

    def cost(group):
        return len(group) * length[texts[group[0]]] if len(group) > 1 else 0

    while len(groups) < at_least and (most := max(map(cost, groups), default=0)):
        k = next(k for k, group in enumerate(groups) if cost(group) == most)
        half = len(groups[k]) // 2
        groups[k : k + 1] = [groups[k][:half], groups[k][half:]]
    return groups


length_lists = st.lists(st.integers(1, 60), min_size=1, max_size=40)


@settings(deadline=None, max_examples=200)
@given(length_lists, st.data(), st.integers(1, 400), st.integers(1, 60))
@example([7] * 33, None, 7 * 4, 1)  # batches exactly as large as the budget
@example([400], None, 7, 5)  # a text beyond the budget, which cannot be halved
def test_packing_equals_the_naive_grouping(lengths, data, budget, at_least):
    tokens, offsets = texts_of(lengths)
    numbers = st.integers(0, len(lengths) - 1)
    texts = np.array(data.draw(st.lists(numbers, max_size=80)) if data else range(len(lengths)), np.int64)
    micro_batches = pack(texts, tokens, offsets, budget, at_least=at_least)
    assert [m.index.tolist() for m in micro_batches] == naive(texts.tolist(), tokens, offsets, budget, at_least)
    for micro in micro_batches:
        assert micro.tokens.dtype == micro.cu_seqlens.dtype == np.int32
        assert micro.cu_seqlens[0] == 0
        assert micro.cu_seqlens[-1] == len(micro.tokens)
        for i, (a, b) in zip(micro.index, pairwise(micro.cu_seqlens), strict=True):
            assert micro.tokens[a:b].tolist() == tokens[offsets[texts[i]] : offsets[texts[i] + 1]].tolist()


def test_micro_batches_keep_the_budget_and_fill_it():
    lengths = np.random.default_rng(1).integers(1, 200, 3000)
    tokens, offsets = texts_of(lengths)
    micro_batches = pack(np.arange(3000), tokens, offsets, 1000)
    assert sorted(np.concatenate([m.index for m in micro_batches]).tolist()) == list(range(3000))
    assert all(m.cost <= 1000 for m in micro_batches)
    for micro, following in pairwise(micro_batches):
        assert micro.longest >= following.longest
        assert micro.cost + micro.longest > 1000  # one more text would not have fitted


def test_micro_batches_are_views_of_one_buffer_also_of_a_given_one():
    tokens, offsets = texts_of([5, 9, 2, 7, 7])
    texts = np.arange(5)
    for out in (None, np.zeros(64, np.int32)):
        micro_batches = pack(texts, tokens, offsets, 14, out=out)
        assert len(micro_batches) > 2
        places = [m.tokens.__array_interface__["data"][0] for m in micro_batches]
        assert [b - a for a, b in pairwise(places)] == [4 * len(m.tokens) for m in micro_batches[:-1]]
        assert out is None or np.shares_memory(out, micro_batches[-1].tokens)


def test_a_buffer_that_does_not_fit_is_refused():
    tokens, offsets = texts_of([5, 9, 2])
    texts = np.arange(3)
    for out in (np.zeros(15, np.int32), np.zeros(16, np.int64), np.zeros(32, np.int32)[::2]):
        with pytest.raises(ValueError, match="16 or more"):
            pack(texts, tokens, offsets, 14, out=out)


@pytest.mark.parametrize("wrong", [-1, 3])
@pytest.mark.parametrize(
    "function", [partial(pack, budget=9), partial(distinct, hashes=np.zeros(4, np.uint64)), hash_texts]
)
def test_a_text_that_is_not_there_is_refused(function, wrong):
    with pytest.raises(IndexError, match="does not have"):
        function(np.array([0, wrong]), *texts_of([5, 9, 2]))


def test_no_texts_are_no_micro_batches():
    tokens, offsets = texts_of([5])
    assert pack(np.empty(0, np.int64), tokens, offsets, 14, at_least=3) == []


@settings(deadline=None, max_examples=200)
@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=3), min_size=1, max_size=30), st.integers(1, 4))
@example([[0], [0, 0], [0], [0, 0], [0]], 1)  # every hash collides, and one text is the beginning of another
def test_equal_texts_are_found_whatever_their_hashes(contents, different):
    tokens = np.array([t for text in contents for t in text], np.int32)
    offsets = np.cumsum([0, *map(len, contents)])
    right = np.array([hash(tuple(text)) % different for text in contents], np.uint64)  # few: collisions
    texts = np.arange(len(contents))[::-1].copy()
    for hashes in (right, None):
        kept, inverse = distinct(texts, tokens, offsets, hashes)
        given_texts = [contents[t] for t in texts]
        assert [contents[t] for t in kept] == [t for i, t in enumerate(given_texts) if t not in given_texts[:i]]
        if inverse is None:
            assert len(kept) == len(texts)
        else:
            assert len(kept) < len(texts)
            assert [contents[kept[j]] for j in inverse] == given_texts


def test_a_text_number_that_repeats_is_one_text():
    tokens, offsets = texts_of([5, 9, 2])
    kept, inverse = distinct(np.array([2, 0, 2, 1, 0]), tokens, offsets)
    assert kept.tolist() == [2, 0, 1]
    assert inverse.tolist() == [0, 1, 0, 2, 1]


def test_hashes_of_texts_depend_on_order_length_and_every_token():
    contents = [[1, 2, 3], [3, 2, 1], [1, 2], [1, 2, 0], [1, 2, 3, 0], [0, 1, 2, 3], [0], [0, 0], [1, 2, 3]]
    tokens, offsets = np.array([t for c in contents for t in c], np.int32), np.cumsum([0, *map(len, contents)])
    hashes = hash_texts(np.arange(9), tokens, offsets).tolist()
    assert len(set(hashes)) == 8
    assert hashes[0] == hashes[8]


def loads_like_texts(rows, seed, spread=0.8):
    """Question and passage lengths: log-normal, and cut to a length limit."""
    rng = np.random.default_rng(seed)
    questions, passages = rng.lognormal(2.7, 0.5, rows), rng.lognormal(4.7, spread, rows)
    return (np.clip(questions, 3, 64).astype(int) + np.clip(passages, 5, 512).astype(int)).astype(np.int64)


@pytest.mark.parametrize("world", [1, 2, 3, 8, 64])
@pytest.mark.parametrize("per_rank", [8, 17, 1024])
@pytest.mark.parametrize("spread", [0.3, 0.8, 1.2])
def test_ranks_get_as_many_rows_and_nearly_as_many_tokens(world, per_rank, spread):
    for seed in range(10):
        loads = loads_like_texts(world * per_rank + seed % world, seed, spread)
        ranks = assign(loads, world)
        sizes, totals = np.bincount(ranks, minlength=world), np.bincount(ranks, loads, minlength=world)
        assert ranks.dtype == np.int32
        assert sizes.max() - sizes.min() <= 1
        assert totals.max() / totals.mean() - 1 <= (0.03 if per_rank == 8 else 0.006)


def test_ranks_are_the_same_whoever_asks():
    loads = loads_like_texts(1000, 0)
    assert assign(loads, 7).tolist() == assign(loads.copy(), 7).tolist()


def test_equal_loads_and_one_outlier_are_shared_out():
    for loads in (np.full(10, 5), np.array([10_000] + [1] * 9), np.zeros(9, np.int64)):
        assert sorted(np.bincount(assign(loads, 3)).tolist()) in ([3, 3, 3], [3, 3, 4])


def test_more_ranks_than_rows_are_refused():
    with pytest.raises(ValueError, match="2 rows cannot be shared by 3 ranks"):
        assign(np.array([1, 2]), 3)


def test_the_load_of_a_row_is_its_tokens_with_its_negatives():
    _, offsets = texts_of([1, 2, 4, 8, 16, 32])
    loads = row_loads(np.array([0, 1]), np.array([2, 3]), np.array([4, 5, 0]), np.array([0, 1, 1]), offsets)
    assert loads.tolist() == [1 + 4 + 16, 2 + 8 + 32 + 1]
