"""Packing: a rank's share of a global batch as length-sorted micro-batches of flat tokens, without padding.

    assign     which rank computes which row: equally many rows and nearly equally many tokens for each
    distinct   texts that are equal token by token, found by their hashes and compared: each is encoded once
    pack       micro-batches of similar lengths, all of them views of one flat buffer

Time is linear in texts and tokens: lengths are small integers, so they are sorted by counting, and every token is
copied once. The kernels release the GIL: `hbt_fast.data.feed` runs them beside the training step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from numba import njit

from hbt_fast.data.prefetch import LINE, prefetch

AHEAD = 8  # texts that are asked of memory while one is copied


@dataclass(frozen=True)
class MicroBatch:
    """Texts of similar length, packed.

    Attributes:
        index: (n,) int64 which of the given texts these are, in order of falling length.
        tokens: (T,) int32 their token ids, one text after the other.
        cu_seqlens: (n + 1,) int32 text i is tokens[cu_seqlens[i]:cu_seqlens[i + 1]].
        tower: which encoder they go through, where queries and passages have one each: 0 or 1.
    """

    index: np.ndarray
    tokens: np.ndarray
    cu_seqlens: np.ndarray
    tower: int = 0

    @property
    def longest(self) -> int:
        """Tokens of the longest text."""
        return int(self.cu_seqlens[1])

    @property
    def cost(self) -> int:
        """Tokens after padding to the longest text."""
        return self.longest * len(self.index)


def pack(
    texts: np.ndarray,
    tokens: np.ndarray,
    offsets: np.ndarray,
    budget: int,
    *,
    at_least: int = 1,
    out: np.ndarray | None = None,
) -> list[MicroBatch]:
    """Group texts into micro-batches whose padded size stays within a token budget.

    Texts are sorted by length (longest first, equal lengths in the given order), so that little is padded, then
    grouped greedily.

    Args:
        texts: (n,) int64 text numbers; may repeat (`distinct` finds the repeats).
        tokens: (T,) int32 token ids of all texts (the source's).
        offsets: (texts + 1,) int64 where each text lies in `tokens`.
        budget: tokens per micro-batch, padding included. A single longer text is a micro-batch of its own.
        at_least: halve the costliest micro-batches until there are so many (every rank must run the same number under
            ZeRO-3); fewer come back only if every one holds a single text.
        out: int32, contiguous: where the micro-batches' tokens are written, one micro-batch after the other (pinned
            memory, for example); None takes new memory.

    Returns:
        The micro-batches; their `index` covers 0 .. n - 1 once. Their arrays are views of one array each.

    Raises:
        IndexError: a text number that `offsets` does not have.
        ValueError: `out` is too short, or not a contiguous int32 array.
    """
    order, begins, edges, cu_seqlens, starts = _layout(texts, offsets, budget, at_least)
    total = int(starts[-1])
    if out is None:
        out = np.empty(total, np.int32)
    elif out.dtype != np.int32 or out.ndim != 1 or not out.flags.c_contiguous or len(out) < total:
        raise ValueError(f"out must be a contiguous int32 array of {total} or more, not {out.dtype} {out.shape}")
    _copy(begins, edges, cu_seqlens, tokens, out)
    bounds = zip(edges.tolist(), starts.tolist(), strict=True)
    return [
        MicroBatch(order[a:b], out[x:y], cu_seqlens[a + k : b + k + 1])
        for k, ((a, x), (b, y)) in enumerate(pairwise(bounds))
    ]


def repack(micro_batches: Sequence[MicroBatch], budget: int) -> list[MicroBatch]:
    """The same texts in micro-batches of another budget: what `pack` would have made of them.

    Args:
        micro_batches: all of a step; those of one tower stay together.
        budget: tokens per micro-batch, padding included.
    """
    made = []
    for tower in sorted({micro.tower for micro in micro_batches}):
        old = [micro for micro in micro_batches if micro.tower == tower]
        index = np.concatenate([micro.index for micro in old])
        order = np.argsort(index)
        lengths = np.concatenate([np.diff(micro.cu_seqlens) for micro in old])
        offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        tokens = np.concatenate([micro.tokens for micro in old])
        made += [replace(m, index=index[order[m.index]], tower=tower) for m in pack(order, tokens, offsets, budget)]
    return made


def distinct(
    texts: np.ndarray, tokens: np.ndarray, offsets: np.ndarray, hashes: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray | None]:
    """The texts without those that are equal to an earlier one, token by token.

    Args:
        texts: (n,) int64 text numbers; may repeat.
        tokens: (T,) int32 token ids of all texts.
        offsets: (texts + 1,) int64 where each text lies in `tokens`.
        hashes: (texts,) uint64 equal for equal texts (the source's); None computes those of the given texts. They say
            which texts to compare, never that texts are equal.

    Returns:
        (m,) int64 numbers of the distinct texts in order of their first occurrence, and (n,) int64 which of them each
        given text is, or None if all differ.

    Raises:
        IndexError: a text number that `offsets` does not have.
    """
    found = hash_texts(texts, tokens, offsets) if hashes is None else hashes[texts]
    kept, inverse = _distinct(texts, found, tokens, offsets)
    return (texts, None) if len(kept) == len(texts) else (kept, inverse)


def assign(loads: np.ndarray, world: int) -> np.ndarray:
    """Which rank computes which row of a global batch.

    Every rank gets N // world or N // world + 1 rows and nearly the same load. Rows are sorted by load and dealt out to
    the ranks, forwards and backwards by turns, so that all get alike distributions of lengths, and micro-batches alike
    in number and padding; then rows of the most and the least loaded rank are swapped until these are within half a
    percent (large batches need no swap) or no swap helps.

    Args:
        loads: (N,) int64, what a row costs: the tokens of its texts.
        world: number of ranks.

    Returns:
        (N,) int32 the rank of each row; a function of the arguments alone, so that all ranks agree.

    Raises:
        ValueError: fewer rows than ranks, or world < 1.
    """
    if not 1 <= world <= len(loads):
        raise ValueError(f"{len(loads)} rows cannot be shared by {world} ranks: each needs at least one")
    return _assign(loads, world)


@njit(cache=True, nogil=True)
def row_loads(
    queries: np.ndarray, passages: np.ndarray, negatives: np.ndarray, negative_rows: np.ndarray, offsets: np.ndarray
) -> np.ndarray:
    """Tokens of each row's query, passage and hard negatives: (N,) int64.

    Args:
        queries: (N,) int64 text numbers.
        passages: (N,) int64 text numbers.
        negatives: (H,) int64 text numbers.
        negative_rows: (H,) int64 the row each belongs to.
        offsets: (texts + 1,) int64 where each text lies.
    """
    loads = np.empty(len(queries), np.int64)
    for i in range(len(queries)):
        q, p = queries[i], passages[i]
        loads[i] = offsets[q + 1] - offsets[q] + offsets[p + 1] - offsets[p]
    for j in range(len(negatives)):
        loads[negative_rows[j]] += offsets[negatives[j] + 1] - offsets[negatives[j]]
    return loads


@njit(cache=True, nogil=True)
def hash_texts(texts: np.ndarray, tokens: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Hashes of the token ids of the given texts: (n,) uint64. Not the store's: that is xxh3."""
    hashes = np.empty(len(texts), np.uint64)
    for i in range(len(texts)):
        text = texts[i]
        if text < 0 or text >= len(offsets) - 1:
            raise IndexError("a text number that offsets does not have")
        word = np.uint64(offsets[text + 1] - offsets[text])
        for k in range(offsets[text], offsets[text + 1]):
            word = (word ^ np.uint64(tokens[k])) * np.uint64(0x9E3779B97F4A7C15)
            word ^= word >> np.uint64(29)
        hashes[i] = word
    return hashes


@njit(cache=True, nogil=True)
def _falling(values: np.ndarray) -> np.ndarray:
    """The order in which values (small, >= 0) fall, equal ones as they stand: a counting sort."""
    largest = 0
    for i in range(len(values)):
        largest = max(largest, values[i])
    places = np.zeros(largest + 2, np.int64)  # places[largest - v]: where the next v goes
    for i in range(len(values)):
        places[largest - values[i] + 1] += 1
    for v in range(largest + 1):
        places[v + 1] += places[v]
    order = np.empty(len(values), np.int64)
    for i in range(len(values)):
        v = largest - values[i]
        order[places[v]] = i
        places[v] += 1
    return order


@njit(cache=True, nogil=True)
def _layout(
    texts: np.ndarray, offsets: np.ndarray, budget: int, at_least: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """What goes where.

    Returns order: (n,) the texts by falling length; begins: (n,) where their tokens lie, in this order; edges:
    (count + 1,) where micro-batches begin in it; cu_seqlens: (n + count,) int32 theirs, one after the other; starts:
    (count + 1,) where their tokens begin in the flat buffer.
    """
    n = len(texts)
    lengths, begins = np.empty(n, np.int64), np.empty(n, np.int64)
    for i in range(n):
        text = texts[i]
        if text < 0 or text >= len(offsets) - 1:
            raise IndexError("a text number that offsets does not have")
        lengths[i] = offsets[text + 1] - offsets[text]
    order = _falling(lengths)
    for i in range(n):
        begins[i] = offsets[texts[order[i]]]
    edges = np.empty(n + 1, np.int64)
    count = 0
    for i in range(n):
        if not count or (i - edges[count - 1] + 1) * lengths[order[edges[count - 1]]] > budget:
            edges[count] = i
            count += 1
    edges[count] = n
    while count < at_least:
        worst, most = -1, 0
        for k in range(count):
            rows = edges[k + 1] - edges[k]
            if rows > 1 and rows * lengths[order[edges[k]]] > most:
                worst, most = k, rows * lengths[order[edges[k]]]
        if worst < 0:
            break
        for k in range(count, worst, -1):
            edges[k + 1] = edges[k]
        edges[worst + 1] = (edges[worst] + edges[worst + 2]) // 2
        count += 1
    cu_seqlens, starts = np.empty(n + count, np.int32), np.zeros(count + 1, np.int64)
    for k in range(count):
        total = 0
        cu_seqlens[edges[k] + k] = 0
        for i in range(edges[k], edges[k + 1]):
            total += lengths[order[i]]
            cu_seqlens[i + k + 1] = total
        starts[k + 1] = starts[k] + total
    return order, begins, edges[: count + 1], cu_seqlens, starts


@njit(cache=True, nogil=True)
def _copy(begins: np.ndarray, edges: np.ndarray, cu_seqlens: np.ndarray, tokens: np.ndarray, out: np.ndarray) -> None:
    """Write the texts into one flat buffer; the arguments are `_layout`'s."""
    at, last = 0, len(begins) - 1
    for k in range(len(edges) - 1):
        for i in range(edges[k], edges[k + 1]):
            begin, length = begins[i], cu_seqlens[i + k + 1] - cu_seqlens[i + k]
            for j in range(0, length, LINE // tokens.itemsize):  # texts ahead are about as long
                prefetch(tokens, begins[min(i + AHEAD, last)] + j)
            for j in range(length):
                out[at + j] = tokens[begin + j]
            at += length


@njit(cache=True, nogil=True)
def _equal(a: int, b: int, tokens: np.ndarray, offsets: np.ndarray) -> bool:
    """Whether two texts are equal, token by token."""
    x, y, length = offsets[a], offsets[b], offsets[a + 1] - offsets[a]
    if a == b or length != offsets[b + 1] - y:
        return a == b
    k = 0
    while k < length and tokens[x + k] == tokens[y + k]:
        k += 1
    return k == length


@njit(cache=True, nogil=True)
def _distinct(
    texts: np.ndarray, hashes: np.ndarray, tokens: np.ndarray, offsets: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """See `distinct`; hashes are those of the given texts, (n,). A hash table with open addressing."""
    size = 1
    while size < 2 * len(texts):
        size *= 2
    mask = np.uint64(size - 1)
    table = np.full(size, -1)
    kept, kept_hashes = np.empty(len(texts), np.int64), np.empty(len(texts), np.uint64)
    inverse = np.empty(len(texts), np.int64)
    count = 0
    for i in range(len(texts)):
        if texts[i] < 0 or texts[i] >= len(offsets) - 1:
            raise IndexError("a text number that offsets does not have")
        slot = np.int64(hashes[i] & mask)
        while True:
            j = table[slot]
            if j < 0:
                table[slot] = j = count
                kept[count], kept_hashes[count] = texts[i], hashes[i]
                count += 1
                break
            if kept_hashes[j] == hashes[i] and _equal(kept[j], texts[i], tokens, offsets):
                break
            slot = (slot + 1) % size
        inverse[i] = j
    return kept[:count], inverse


@njit(cache=True, nogil=True)
def _assign(loads: np.ndarray, world: int) -> np.ndarray:
    """See `assign`."""
    order = _falling(loads)
    ranks, totals = np.empty(len(loads), np.int32), np.zeros(world, np.int64)
    for i in range(len(loads)):
        group, k = divmod(i, world)
        rank = world - 1 - k if group % 2 else k
        ranks[order[i]] = rank
        totals[rank] += loads[order[i]]
    for _ in range(4 * world):
        high, low = totals.argmax(), totals.argmin()
        if 200 * world * (totals[high] - totals[low]) <= totals.sum():  # within half a percent
            break
        a, b = _best_swap(order[ranks[order] == high], order[ranks[order] == low], loads, totals[high] - totals[low])
        if a < 0:
            break
        ranks[a], ranks[b] = low, high
        totals[high] -= loads[a] - loads[b]
        totals[low] += loads[a] - loads[b]
    return ranks


@njit(cache=True, nogil=True)
def _best_swap(high: np.ndarray, low: np.ndarray, loads: np.ndarray, gap: int) -> tuple[int, int]:
    """The rows of two ranks, each in order of falling load, whose swap leaves the least of the gap; -1 if none does."""
    best, a, b, j = gap, -1, -1, 0
    for row in high:
        while j < len(low) and 2 * (loads[row] - loads[low[j]]) <= gap:
            j += 1
        for k in range(max(j - 1, 0), min(j + 1, len(low))):  # the differences on both sides of half the gap
            left = abs(gap - 2 * (loads[row] - loads[low[k]]))
            if left < best:
                best, a, b = left, row, low[k]
    return a, b
