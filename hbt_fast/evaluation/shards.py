"""Candidates for search as float32 shards: of an array, a memory-mapped file, or an iterable of arrays.

One shard is in memory at a time, so whoever takes one drops it before asking for the next.

Legend: M candidates, d dimension, s rows of a shard.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

Candidates = np.ndarray | Iterable[np.ndarray]
NONE = "candidates: there are none to search in"


def count(candidates: Candidates) -> int:
    """How many there are; raises ValueError where there are none, or only a generator that can be read once."""
    if isinstance(candidates, np.ndarray):
        total = len(candidates)
    elif iter(candidates) is candidates:
        raise ValueError(
            "the candidates are a generator, which can be read once, but they are read to count them, to train the "
            'index and to fill it: pass an array, a memory-mapped file or a list of such, or search with index="flat"'
        )
    else:
        total = sum(len(shard) for shard in candidates)
    if total == 0:
        raise ValueError(NONE)
    return total


def shards(candidates: Candidates, d: int, rows: int) -> Iterator[tuple[int, np.ndarray]]:
    """(number of the first candidate, (s, d) float32), s <= rows: views where they can be, else copies.

    Raises:
        ValueError: another dimension than d, NaN or infinity, no candidates at all.
    """
    first = None
    for first, part in _slices(candidates, d, rows):
        yield first, float32(part, "candidates", range(first, first + len(part)))
        del part
    if first is None:
        raise ValueError(NONE)


def sample(candidates: Candidates, d: int, rows: int, size: int) -> np.ndarray:
    """(size, d) float32 of the candidates, drawn without repeats by a fixed seed; errors as in `shards`."""
    numbers = np.sort(np.random.default_rng(0).choice(count(candidates), size, replace=False))
    out = np.empty((size, d), dtype=np.float32)
    for first, part in _slices(candidates, d, rows):
        begin, end = np.searchsorted(numbers, (first, first + len(part)))
        out[begin:end] = part[numbers[begin:end] - first]
        del part
    return float32(out, "candidates", numbers)


def float32(vectors: np.ndarray, name: str, numbers: Sequence[int]) -> np.ndarray:
    """Contiguous float32, copied only where it must be.

    Args:
        vectors: (s, d) floats.
        name: what they are and
        numbers: (s,) which they are, for the message.

    Raises:
        ValueError: NaN or infinity.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        vectors = np.ascontiguousarray(vectors, dtype=np.float32)
        # A NaN or infinity makes the sum of its vector one too, which is quicker to see (large numbers may as well).
        suspects = np.flatnonzero(~np.isfinite(vectors @ np.ones(vectors.shape[1], np.float32)))
    bad = suspects[~np.isfinite(vectors[suspects]).all(axis=1)]
    if len(bad):
        raise ValueError(f"{name}: vector {numbers[int(bad[0])]} holds NaN or infinity (in float32)")
    return vectors


def check_dimension(vectors: np.ndarray, d: int, name: str) -> None:
    """Raises ValueError unless the vectors are (s, d), the queries' dimension."""
    shape = np.shape(vectors)
    if len(shape) != 2 or shape[1] != d:
        raise ValueError(f"queries (N, {d}) and {name} {shape} must be two tables of vectors with equal d")


def _slices(candidates: Candidates, d: int, rows: int) -> Iterator[tuple[int, np.ndarray]]:
    whole, first = isinstance(candidates, np.ndarray), 0
    for number, shard in enumerate([candidates] if whole else candidates):
        check_dimension(shard, d, "candidates" if whole else f"shard {number} of the candidates")
        for start in range(0, len(shard), rows):
            yield first + start, shard[start : start + rows]
            # Pages of a mapped file count as resident until they are let go; a private map would lose its changes.
            if isinstance(shard, np.memmap) and shard.mode in ("r", "r+") and hasattr(mmap, "MADV_DONTNEED"):
                shard._mmap.madvise(mmap.MADV_DONTNEED)
        first += len(shard)
        del shard
