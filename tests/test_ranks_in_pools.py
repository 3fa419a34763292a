"""Claims about ranks within each query's own pool, as re-ranking has it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from test_evaluation_ranks import random_problem

from hbt_fast.evaluation.ranks import exact_ranks, pool_ranks


def pools_of(seed: int, n: int, m: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    sizes = np.append(rng.integers(0, 40, n - 1), 0)  # the last pool is empty
    pools = [rng.choice(m, size, replace=False) for size in sizes]
    return np.concatenate([[0], np.cumsum(sizes)]), np.concatenate(pools)


@pytest.mark.parametrize("workspace_bytes", [1, 4000, 2**26])
def test_pool_ranks_equal_a_full_sort_with_ties(workspace_bytes):
    queries, candidates, _, _, offsets, relevant = random_problem(6)
    starts, pooled = pools_of(6, len(queries), len(candidates))
    found = pool_ranks(queries, candidates, offsets, relevant, (starts, pooled), workspace_bytes=workspace_bytes)
    truth = []
    for i in range(len(queries)):
        scores = candidates @ queries[i]
        ranking = sorted(pooled[starts[i] : starts[i + 1]].tolist(), key=lambda c: (-scores[c], c))
        truth += [1 + ranking.index(c) if c in ranking else 0 for c in relevant[offsets[i] : offsets[i + 1]]]
    assert found.dtype == np.int64
    assert found.tolist() == truth
    assert 0 in truth
    assert len(set(truth)) > 10


def test_equal_vectors_tie_in_pools_wherever_they_lie():
    # Of an awkward dimension, at every place of pools of every size: the lower index wins, by not one bit of rounding.
    rng = np.random.default_rng(0)
    candidates = np.repeat(rng.standard_normal((1, 67)).astype(np.float32), 40, axis=0)
    queries = rng.standard_normal((39, 67)).astype(np.float32)
    sizes = np.arange(2, 41)
    pooled = np.concatenate([rng.permutation(40)[:size] for size in sizes])
    starts = np.concatenate([[0], np.cumsum(sizes)])
    best = np.array([pooled[a:b].min() for a, b in itertools.pairwise(starts)])
    last = np.array([pooled[a:b].max() for a, b in itertools.pairwise(starts)])
    relevant = np.stack([best, last], axis=1).ravel()
    found = pool_ranks(queries, candidates, np.arange(0, 79, 2), relevant, (starts, pooled)).reshape(-1, 2)
    assert (found[:, 0] == 1).all()
    assert (found[:, 1] == sizes).all()


def test_pool_ranks_in_pools_of_everything_are_exact_ranks():
    problem = random_problem(7)
    n, m = len(problem[0]), len(problem[1])
    pools = np.arange(0, n * m + 1, m), np.tile(np.arange(m)[::-1], n)
    found = pool_ranks(problem[0], problem[1], *problem[4:], pools)
    assert np.array_equal(found, exact_ranks(*problem, device="cpu").in_whole_pool)


def test_bad_pools_are_named():
    problem = random_problem(4)
    given = (problem[0], problem[1], *problem[4:])
    with pytest.raises(ValueError, match=r"pools\[0\] must rise from 0 to 59, the length of pools\[1\]"):
        pool_ranks(*given, (np.arange(61), np.zeros(59, dtype=np.int64)))
    with pytest.raises(ValueError, match=r"pools\[1\] must lie in 0 .. 129"):
        pool_ranks(*given, (np.arange(61), np.full(60, 130)))
