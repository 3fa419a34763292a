"""Packing: the texts of one rank's share of a batch as length-sorted micro-batches of flat tokens, without padding."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numba import njit


@dataclass(frozen=True)
class MicroBatch:
    """Texts of similar length, packed.

    Attributes:
        index: (n,) int64 which of the given texts these are, in order of falling length.
        tokens: (T,) int32 their token ids, one text after the other.
        cu_seqlens: (n + 1,) int32 text i is tokens[cu_seqlens[i]:cu_seqlens[i + 1]].
    """

    index: np.ndarray
    tokens: np.ndarray
    cu_seqlens: np.ndarray

    @property
    def longest(self) -> int:
        """Tokens of the longest text."""
        return int(self.cu_seqlens[1])

    @property
    def cost(self) -> int:
        """Tokens after padding to the longest text."""
        return self.longest * len(self.index)


def pack(
    texts: np.ndarray, tokens: np.ndarray, offsets: np.ndarray, budget: int, *, at_least: int = 1
) -> list[MicroBatch]:
    """Group texts into micro-batches whose padded size stays within a token budget.

    Texts are sorted by length (longest first, equal lengths in the given order), so that little is padded, then
    grouped greedily.

    Args:
        texts: (n,) int64 text numbers; may repeat.
        tokens: (T,) int32 token ids of all texts (the store's).
        offsets: (texts + 1,) int64 where each text lies in `tokens`.
        budget: tokens per micro-batch, padding included. A single longer text is a micro-batch of its own.
        at_least: halve the costliest micro-batches until there are so many (every rank must run the same number under
            ZeRO-3); fewer come back only if every one holds a single text.
    """
    lengths = offsets[texts + 1] - offsets[texts]
    order = np.argsort(-lengths, kind="stable")
    edges = [*_group(lengths[order], budget), len(texts)]
    while len(edges) - 1 < at_least:
        costs = [(b - a) * lengths[order[a]] if b - a > 1 else 0 for a, b in pairwise(edges)]
        if not max(costs, default=0):
            break
        worst = int(np.argmax(costs))
        edges.insert(worst + 1, (edges[worst] + edges[worst + 1]) // 2)
    batches = []
    for a, b in pairwise(edges):
        index = order[a:b]
        cu_seqlens = np.zeros(b - a + 1, np.int32)
        np.cumsum(lengths[index], out=cu_seqlens[1:])
        batches.append(MicroBatch(index, _gather(tokens, offsets, texts[index], cu_seqlens), cu_seqlens))
    return batches


@njit(cache=True)
def _group(lengths: np.ndarray, budget: int) -> list[int]:
    """Where micro-batches begin, for lengths in falling order."""
    starts = [0]
    for i in range(1, len(lengths)):
        if (i - starts[-1] + 1) * lengths[starts[-1]] > budget:
            starts.append(i)
    return starts


@njit(cache=True)
def _gather(tokens: np.ndarray, offsets: np.ndarray, texts: np.ndarray, cu_seqlens: np.ndarray) -> np.ndarray:
    """Copy the tokens of the texts into one flat buffer."""
    out = np.empty(cu_seqlens[-1], np.int32)
    for i in range(len(texts)):
        begin = offsets[texts[i]]
        for k in range(cu_seqlens[i + 1] - cu_seqlens[i]):
            out[cu_seqlens[i] + k] = tokens[begin + k]
    return out
