"""Counter-based randomness: every draw is a function of (seed, position), so that any rank can compute any step alone.

`permute` is the keyed permutation of an epoch: a six-round Feistel network on the smallest even number of bits that
holds n, with cycle-walking for the indices beyond n (Black & Rogaway, "Ciphers with arbitrary finite domains", 2002).
It needs no array of n numbers. `KroneckerSchedule` decides which stratum a step belongs to.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numba import njit

MASK = np.uint64(0xFFFFFFFFFFFFFFFF)


@njit(cache=True, inline="always")
def mix(x: np.uint64) -> np.uint64:
    """SplitMix64's finaliser (Steele et al., 2014): a bijection of 64-bit words that behaves like a random one."""
    x = np.uint64(x) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@njit(cache=True, inline="always")
def draw(key: np.uint64, counter: np.int64) -> np.uint64:
    """The random 64-bit word number `counter` of the stream `key`."""
    return mix(np.uint64(key) ^ mix(np.uint64(counter)))


@njit(cache=True, inline="always")
def below(key: np.uint64, counter: np.int64, n: np.int64) -> np.int64:
    """A random number in [0, n). The bias of the modulo is under n / 2**64."""
    return np.int64(draw(key, counter) % np.uint64(n))


@njit(cache=True)
def permute(index: np.int64, n: np.int64, key: np.uint64) -> np.int64:
    """Where the keyed permutation of range(n) sends `index`. Constant memory, under four walks on average."""
    half = np.uint64(1)
    while (np.int64(1) << np.int64(half + half)) < n:
        half += np.uint64(1)
    mask = (np.uint64(1) << half) - np.uint64(1)
    x = np.uint64(index)
    while True:
        left, right = x >> half, x & mask
        for round_ in range(6):
            left, right = right, left ^ (draw(key + np.uint64(round_), np.int64(right)) & mask)
        x = (left << half) | right
        if x < np.uint64(n):
            return np.int64(x)


def key_of(*parts: int) -> np.uint64:
    """One 64-bit key from several whole numbers (a seed, a purpose, a stratum, an epoch ...)."""
    key = 0
    for part in parts:
        key = int(draw(np.uint64(key), np.int64(part)))
    return np.uint64(key)


def floor_sum(n: int, m: int, a: int, b: int) -> int:
    """sum of (a * i + b) // m over i in range(n), in O(log m) (the Euclid-like recursion of the AtCoder Library)."""
    total = 0
    while n:
        total += n * (n - 1) // 2 * (a // m) + n * (b // m)
        a, b = a % m, b % m
        top = a * n + b
        n, b = top // m, top % m
        a, m = m, a
    return total


class KroneckerSchedule:
    """Which stratum each step belongs to, and how many earlier steps did, both without state.

    Step t stands at the point x_t = frac(x_0 + t / golden ratio) of the unit interval, which the strata share out
    between them by weight. After any number of steps each stratum has had its share to within a few steps (the
    discrepancy of a Kronecker sequence is O(log t)), where independent draws would be off by O(sqrt t). The number of
    earlier visits is a count of lattice points, which `floor_sum` gives in logarithmic time: this is what makes the
    position of a step inside its stratum's epoch computable from the step alone.

    Args:
        weights: one per stratum, not negative, at least one positive; their sum need not be 1.
        seed: where the sequence starts (x_0).
    """

    GRID = 1 << 48
    STRIDE = 173961102589771  # odd, next to GRID / golden ratio

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        exact = [Fraction(float(w)) for w in weights]
        if not exact or min(exact) < 0 or sum(exact) == 0:
            raise ValueError(f"weights must be >= 0 with a positive sum, got {list(weights)}")
        total, running, self.edges = sum(exact), Fraction(0), [0]
        for weight in exact:
            running += weight
            self.edges.append(int(running * self.GRID / total))
        self.start = int(key_of(seed, 0x5C4ED)) % self.GRID

    def stratum(self, step: int) -> int:
        """The stratum of a step."""
        point = (self.start + step * self.STRIDE) % self.GRID
        return int(np.searchsorted(self.edges, point, side="right")) - 1

    def visits(self, stratum: int, step: int) -> int:
        """How many of the steps before `step` belong to the stratum."""
        low, high = self.edges[stratum], self.edges[stratum + 1]
        return self._at_least(low, step) - self._at_least(high, step)

    def _at_least(self, edge: int, step: int) -> int:
        # [y mod G >= edge] = (y + G - edge) // G - y // G, summed over the points y of the steps before `step`
        with_edge = floor_sum(step, self.GRID, self.STRIDE, self.start + self.GRID - edge)
        return with_edge - floor_sum(step, self.GRID, self.STRIDE, self.start)
