"""Content ids: which rows are about the same passage.

Rows are nodes, and so are hard negatives, numbered after the rows. Keys connect them: nodes with one key are one
content, transitively. A content is numbered by its first row, so the ids of the rows' contents come first and a hard
negative that is nobody's positive has an id beyond them.

Nothing that grows with the data is held in memory. Keys are sorted a block at a time; equal neighbours are united and
one of them goes to a bucket on disk by the key's leading bits, so that a key has at most one entry per block however
common it is; each bucket is sorted and united in its turn. The union-find forest is a memory-mapped array in which
parents are smaller than children: the root of a content is its first row.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numba import njit

BLOCK = 1 << 20  # (key, node) pairs that are sorted at a time
PAIR = np.dtype([("key", np.uint64), ("node", np.int64)])


def label_contents(
    keys: np.ndarray,
    nodes: np.ndarray,
    rows: int,
    negatives: int,
    work: Path,
    write_rows: Callable[[np.ndarray], None],
    write_negatives: Callable[[np.ndarray], None],
    *,
    block: int | None = None,
) -> int:
    """Number the contents.

    Args:
        keys: (pairs,) uint64, memory-mapped or not.
        nodes: (pairs,) int64: the row that has the key, or -1 - n for hard negative n.
        rows: number of rows.
        negatives: number of hard negatives.
        work: a folder for temporary files; what is in it is deleted.
        write_rows: gets the content ids of all rows, (some,) int64 at a time; nothing if row r has content r.
        write_negatives: the same of all hard negatives.
        block: pairs that are sorted at a time; BLOCK if not given.

    Returns:
        the number of contents that rows have.
    """
    block = block or BLOCK
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    count = rows + negatives
    parents = np.lib.format.open_memmap(work / "parents.npy", "w+", np.int64, (count,))
    for start in range(0, count, block):
        parents[start : start + block] = np.arange(start, min(start + block, count))
    buckets = 1 << max(0, (len(keys) - 1) // block).bit_length()
    for start in range(0, len(keys), block):
        node = nodes[start : start + block]
        pairs = _united(keys[start : start + block], np.where(node < 0, rows - 1 - node, node), parents)
        if buckets > 1:
            _to_buckets(pairs, buckets, work)
    for path in work.glob("bucket-*"):
        pairs = np.fromfile(path, PAIR)
        _united(pairs["key"], pairs["node"], parents)
        path.unlink()
    contents = _label(parents, 0, rows, 0)
    _label(parents, rows, count, contents)
    for write, begin, end in ((write_rows, 0, rows if contents < rows else 0), (write_negatives, rows, count)):
        for start in range(begin, end, block):
            write(parents[start : min(start + block, end)])
    shutil.rmtree(work)
    return contents


def _united(keys: np.ndarray, nodes: np.ndarray, parents: np.ndarray) -> np.ndarray:
    """Unite the nodes that share a key; returns a (key, node) pair for each different key, in their order."""
    order = np.argsort(keys)
    pairs = np.empty(len(keys), PAIR)
    pairs["key"], pairs["node"] = keys[order], nodes[order]
    first = _unite(pairs["key"], pairs["node"], parents)
    return pairs[first]


def _to_buckets(pairs: np.ndarray, buckets: int, work: Path) -> None:
    """Append pairs that are sorted by key to the files of their buckets."""
    edges = np.arange(1, buckets, dtype=np.uint64) << np.uint64(64 - (buckets - 1).bit_length())
    cuts = [0, *np.searchsorted(pairs["key"], edges).tolist(), len(pairs)]
    for bucket in range(buckets):
        if cuts[bucket] < cuts[bucket + 1]:
            with open(work / f"bucket-{bucket}", "ab") as file:
                pairs[cuts[bucket] : cuts[bucket + 1]].tofile(file)


@njit(cache=True)
def _root(parents: np.ndarray, node: int) -> int:
    """The smallest node of a node's content (path halving)."""
    while parents[node] != node:
        parents[node] = parents[parents[node]]
        node = parents[node]
    return node


@njit(cache=True)
def _unite(keys: np.ndarray, nodes: np.ndarray, parents: np.ndarray) -> np.ndarray:
    """Unite neighbours of equal keys; returns which pairs are the first of their key."""
    first = np.ones(len(keys), np.bool_)
    for i in range(1, len(keys)):
        if keys[i] == keys[i - 1]:
            first[i] = False
            a, b = _root(parents, nodes[i - 1]), _root(parents, nodes[i])
            parents[max(a, b)] = min(a, b)
    return first


@njit(cache=True)
def _label(parents: np.ndarray, start: int, end: int, found: int) -> int:
    """Replace the parents of nodes start .. end - 1 by content ids; the nodes before them have theirs already."""
    for node in range(start, end):
        parent = parents[node]
        if parent == node:
            parents[node] = found
            found += 1
        else:
            parents[node] = parents[parent]  # smaller, so it is a content id by now
    return found
