"""The draws: permutations are permutations, random numbers are even, schedules give each part its share."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit
from scipy.stats import chisquare

from hbt_fast.data.draws import KroneckerSchedule, below, floor_sum, key_of, permute

EVEN = 1e-3  # a chi-square test below this p would mean uneven draws; the seeds are fixed, so it passes or never does


@njit
def permuted(indices, n, key):
    out = np.empty(len(indices), np.int64)
    for i in range(len(indices)):
        out[i] = permute(indices[i], n, key)
    return out


@njit
def drawn(key, count, n):
    out = np.empty(count, np.int64)
    for i in range(count):
        out[i] = below(key, i, n)
    return out


@given(st.integers(1, 3000), st.integers(0, 2**63 - 1))
@settings(max_examples=60, deadline=None)
def test_an_epoch_is_a_permutation(n, seed):
    assert np.sort(permuted(np.arange(n), n, np.uint64(seed))).tolist() == list(range(n))


@given(st.integers(2**20, 2**40), st.integers(0, 2**63 - 1), st.integers(0, 2**20))
@settings(max_examples=40, deadline=None)
def test_slices_of_a_long_epoch_are_distinct_and_in_range(n, seed, start):
    values = permuted(np.arange(start % (n - 4000), start % (n - 4000) + 4000), n, np.uint64(seed))
    assert len(np.unique(values)) == 4000
    assert values.min() >= 0
    assert values.max() < n


@pytest.mark.parametrize("n", [2, 3, 5, 7, 10, 17, 64, 100])
def test_every_place_of_an_epoch_is_even_over_keys(n):
    table = np.zeros((n, n), int)
    for k in range(200 * n):
        table[np.arange(n), permuted(np.arange(n), n, key_of(7, k))] += 1
    p = [chisquare(row).pvalue for row in table]
    assert min(p) > EVEN / n
    assert np.mean(np.array(p) < 0.05) < 0.25


@pytest.mark.parametrize("n", [1000, 3000, 20_000])
def test_neighbours_of_an_epoch_are_independent(n):
    table = np.zeros((20, 20), int)
    for k in range(60_000 // n):
        values = permuted(np.arange(n), n, key_of(3, k)) * 20 // n
        np.add.at(table, (values[:-1], values[1:]), 1)
    assert chisquare(table.ravel()).pvalue > EVEN


@pytest.mark.parametrize("n", [2, 3, 7, 1000, 65_536, 65_537, 10**6])
def test_numbers_below_are_even(n):
    bins = min(n, 100)
    values = drawn(key_of(11, n), 200_000, n)
    assert values.min() >= 0
    assert values.max() < n
    expected = np.bincount(np.arange(n) * bins // n, minlength=bins) / n * 200_000
    assert chisquare(np.bincount(values * bins // n, minlength=bins), expected).pvalue > EVEN


def test_streams_of_different_keys_differ():
    assert not np.array_equal(drawn(key_of(1, 2), 50, 1000), drawn(key_of(1, 3), 50, 1000))
    assert key_of(1, 2) != key_of(2, 1)


def test_floor_sum_is_the_sum_of_floors():
    rng = np.random.default_rng(0)
    for n, m, a, b in rng.integers(1, 500, (200, 4)).tolist():
        assert floor_sum(n, m, a, b) == sum((a * i + b) // m for i in range(n))


@pytest.mark.parametrize("changes", [(), ((40, [0, 1, 1, 1]), (41, [5, 1, 0, 2]), (700, [1, 1, 1, 1]))])
def test_a_schedule_counts_its_own_visits_and_keeps_the_shares(changes):
    schedule = KroneckerSchedule([0.5, 3, 0, 1.5], seed=9, changes=changes)
    seen = [0, 0, 0, 0]
    for step in range(1500):
        assert [schedule.visits(k, step) for k in range(4)] == seen
        seen[schedule.part(step)] += 1
    if not changes:
        assert [abs(s - 1500 * w / 5) <= 4 for s, w in zip(seen, [0.5, 3, 0, 1.5], strict=True)] == [True] * 4
    else:
        late = [schedule.visits(k, 1500) - schedule.visits(k, 700) for k in range(4)]
        assert [abs(n - 200) <= 4 for n in late] == [True] * 4
        assert [schedule.visits(k, 41) - schedule.visits(k, 40) for k in (0,)] == [0]


@pytest.mark.parametrize("weights", [[], [0, 0], [1, -1]])
def test_weights_that_are_none_are_refused(weights):
    with pytest.raises(ValueError, match="weights must be >= 0"):
        KroneckerSchedule(weights, seed=0)
