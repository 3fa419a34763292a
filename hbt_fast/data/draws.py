"""Counter-based randomness: every draw is a function of (seed, position), so that any rank can compute any step alone.

`permute` is the keyed permutation of an epoch: a Feistel network on the bits that n needs, split into halves that may
differ by one, of six rounds (sixteen below 2**11, where six do not mix evenly), with cycle-walking for the indices
beyond n (Black & Rogaway, "Ciphers with arbitrary finite domains", 2002). It needs no array of n numbers.
`KroneckerSchedule` decides which stratum a step belongs to.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numba import njit

ODD = np.uint64(0x9E3779B97F4A7C15)  # 2**64 / golden ratio


@njit(cache=True, nogil=True, inline="always")
def mix(x: np.uint64) -> np.uint64:
    """SplitMix64's finaliser (Steele et al., 2014): a bijection of 64-bit words that behaves like a random one."""
    x = np.uint64(x) + ODD
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@njit(cache=True, nogil=True, inline="always")
def draw(key: np.uint64, counter: np.int64) -> np.uint64:
    """The random 64-bit word number `counter` of the stream `key` (SplitMix64, started at the key)."""
    return mix(np.uint64(key) + np.uint64(counter) * ODD)


@njit(cache=True, nogil=True, inline="always")
def scale(half: np.uint64, n: np.int64) -> np.int64:
    """A random number in [0, n) from 32 random bits; the bias is under n / 2**32."""
    return np.int64((half * np.uint64(n)) >> np.uint64(32))


@njit(cache=True, nogil=True, inline="always")
def below(key: np.uint64, counter: np.int64, n: np.int64) -> np.int64:
    """A random number in [0, n). The bias is under 2**-16."""
    word = draw(key, counter)
    return scale(word >> np.uint64(32), n) if n <= 65536 else np.int64(word % np.uint64(n))


@njit(cache=True, nogil=True)
def permute(index: np.int64, n: np.int64, key: np.uint64) -> np.int64:
    """Where the keyed permutation of range(n) sends `index`. Constant memory, under two walks on average."""
    bits = np.uint64(2)
    while np.int64(1) << np.int64(bits) < n:
        bits += np.uint64(1)
    half = bits >> np.uint64(1)
    low, high = (np.uint64(1) << half) - np.uint64(1), (np.uint64(1) << (bits - half)) - np.uint64(1)
    x = np.uint64(index)
    while True:
        left, right = x >> half, x & low
        for round_ in range(3 if bits > 11 else 8):
            left ^= mix(key + np.uint64(2 * round_) * ODD ^ right) & high
            right ^= mix(key + np.uint64(2 * round_ + 1) * ODD ^ left) & low
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
    """Which of several parts each step belongs to, and how many earlier steps did, both without state.

    Step t stands at the point x_t = frac(x_0 + t / golden ratio) of the unit interval, which the parts share out
    between them by weight. After any number of steps each part has had its share to within a few steps (the
    discrepancy of a Kronecker sequence is O(log t)), where independent draws would be off by O(sqrt t). The number of
    earlier visits is a count of lattice points, which `floor_sum` gives in logarithmic time: this is what makes the
    position of a step inside its part's epoch computable from the step alone.

    Args:
        weights: one per part, not negative, at least one positive; their sum need not be 1.
        seed: where the sequence starts (x_0).
        changes: (first step, weights) of later phases that share the interval out otherwise, in rising order.
    """

    GRID = 1 << 48
    STRIDE = 173961102589771  # odd, next to GRID / golden ratio

    def __init__(
        self, weights: Sequence[float], seed: int, changes: Sequence[tuple[int, Sequence[float]]] = ()
    ) -> None:
        self.start = int(key_of(seed, 0x5C4ED)) % self.GRID
        self.firsts = [0, *(first for first, _ in changes)]
        self.edges = [self._shared_out(w) for w in (weights, *(w for _, w in changes))]
        self.before = [[0] * len(weights)]  # visits of each part before each phase
        for phase, end in enumerate(self.firsts[1:]):
            self.before.append([self._visits(part, phase, end) for part in range(len(weights))])

    def _shared_out(self, weights: Sequence[float]) -> list[int]:
        exact = [Fraction(float(w)) for w in weights]
        if not exact or min(exact) < 0 or sum(exact) == 0:
            raise ValueError(f"weights must be >= 0 with a positive sum, got {list(weights)}")
        total, running, edges = sum(exact), Fraction(0), [0]
        for weight in exact:
            running += weight
            edges.append(int(running * self.GRID / total))
        return edges

    def part(self, step: int) -> int:
        """The part that a step belongs to."""
        point = (self.start + step * self.STRIDE) % self.GRID
        return bisect_right(self.edges[bisect_right(self.firsts, step) - 1], point) - 1

    def visits(self, part: int, step: int) -> int:
        """How many of the steps before `step` belong to the part."""
        return self._visits(part, bisect_right(self.firsts, step) - 1, step)

    def _visits(self, part: int, phase: int, step: int) -> int:
        first, low, high = self.firsts[phase], self.edges[phase][part], self.edges[phase][part + 1]
        here = self._between(low, high, step) - (self._between(low, high, first) if first else 0)
        return self.before[phase][part] + here

    def _between(self, low: int, high: int, step: int) -> int:
        # [y mod G >= edge] = (y + G - edge) // G - y // G, summed over the points y of the steps before `step`
        at_low = floor_sum(step, self.GRID, self.STRIDE, self.start + self.GRID - low)
        return at_low - floor_sum(step, self.GRID, self.STRIDE, self.start + self.GRID - high)
