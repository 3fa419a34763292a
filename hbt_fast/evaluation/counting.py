"""How many candidates of each language rank above each relevant one, over a chunk of score rows.

Three forms of one count: plain torch is the specification (`_torch_counter`), csrc/counts.cpp counts on the CPU,
kernels/counts.py on a GPU. None sorts, and each takes a candidate's score out of the very row that it is compared with:
a dot product made elsewhere may differ in the last bit.

Legend: n queries of a chunk, N queries, M candidates, R relevant (query, candidate) pairs, L languages.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

Count = Callable[[Tensor, int, Tensor], None]


class Columns(NamedTuple):
    """Where everything is in a row of scores, whose columns are grouped by language.

    Within a language the columns keep the order of the candidates, so those that win a tie against a candidate are the
    first ones of the block: all before `splits`.
    """

    offsets: Tensor  # (N + 1,) int64; pairs of query i are offsets[i] .. offsets[i + 1] - 1
    positions: Tensor  # (R,) int64 column of each pair's candidate
    blocks: Tensor  # (L, 2) int64 first column and end of each language
    splits: Tensor  # (R, L) int32 first column of the language that loses a tie against the pair's candidate
    order: Tensor | None  # (M,) int64 candidate of each column; None: columns are candidates


def columns_of(language_M: np.ndarray, n_languages: int, offsets: np.ndarray, relevant: np.ndarray) -> Columns:
    """Groups the columns by language; candidates that are grouped already, languages in any order, stay as they are.

    Args:
        language_M: (M,) int64 in 0 .. n_languages - 1, language of each candidate.
        n_languages: L.
        offsets: (N + 1,) int64, pairs of each query.
        relevant: (R,) int64, candidate of each pair.
    """
    order, grouped_M = None, language_M
    starts = _starts_of_runs(language_M)
    if len(np.unique(language_M[starts])) < len(starts):
        order = np.argsort(language_M, kind="stable")
        grouped_M = language_M[order]
        starts = _starts_of_runs(grouped_M)
    blocks = np.zeros((n_languages, 2), dtype=np.int64)
    blocks[grouped_M[starts]] = np.stack([starts, np.append(starts[1:], len(grouped_M))], axis=1)

    column_M = np.arange(len(language_M))
    if order is not None:
        column_M[order] = np.arange(len(order))
    # Splits of each candidate that is relevant to anybody, then of the pairs.
    is_needed_M = np.zeros(len(language_M), dtype=bool)
    is_needed_M[relevant] = True
    needed = np.flatnonzero(is_needed_M)
    splits = np.empty((len(needed), n_languages), dtype=np.int32)
    for language, (begin, end) in enumerate(blocks):
        inside = np.arange(begin, end) if order is None else order[begin:end]
        splits[:, language] = begin + np.searchsorted(inside, needed)
    splits = splits[(np.cumsum(is_needed_M) - 1)[relevant]]
    parts = (offsets, column_M[relevant], blocks, splits, order)
    return Columns(*(None if part is None else torch.from_numpy(np.ascontiguousarray(part)) for part in parts))


def counter_of(backend: str, columns: Columns, device: str) -> Count:
    """The function that counts: count(scores_nM, first, higher_RL) writes the rows of a chunk's pairs.

    scores_nM is (n, M) float32 on the device, columns adjacent: the rows of queries first .. first + n - 1. higher_RL
    is (R, L) int32 on the device and holds zeros where it was not written yet.

    Args:
        backend: "torch", "cpu" or "triton".
        columns: on the CPU.
        device: where scores are.
    """
    if backend == "cpu":
        return lambda scores_nM, first, higher_RL: torch.ops.hbt_fast.count_higher(
            scores_nM, first, *columns[:4], higher_RL
        )
    if backend == "triton":
        from hbt_fast.kernels.counts import counter

        return counter(*columns[:4], device)
    return _torch_counter(columns, device)


def is_compiled() -> bool:
    """Whether the installation built csrc/counts.cpp."""
    from hbt_fast.loss.tiles import compiled

    return compiled() is not None and hasattr(torch.ops.hbt_fast, "count_higher")


def has_triton() -> bool:
    """Whether Triton is installed (kernels/counts.py)."""
    return importlib.util.find_spec("triton") is not None


def _torch_counter(columns: Columns, device: str) -> Count:
    """The specification: whole rows are compared with one relevant candidate each, ties by candidate index."""
    blocks = columns.blocks.tolist()
    offsets, positions = columns.offsets.to(device), columns.positions.to(device)
    index_M = (torch.arange(max(b for _, b in blocks)) if columns.order is None else columns.order).to(device)

    def count(scores_nM: Tensor, first: int, higher_RL: Tensor) -> None:
        edges = offsets[first : first + len(scores_nM) + 1]
        begin_n, end_n = edges[:-1], edges[1:]
        for slot in range(int((end_n - begin_n).max())):
            rows = (begin_n + slot < end_n).nonzero()[:, 0]
            pairs = begin_n[rows] + slot
            column = positions[pairs]
            # All rows have this slot more often than not: then no copy of the chunk is needed.
            scores = scores_nM if len(rows) == len(scores_nM) else scores_nM[rows]
            threshold = scores.gather(1, column[:, None])
            above = (scores > threshold) | ((scores == threshold) & (index_M < index_M[column][:, None]))
            higher_RL[pairs] = torch.stack([above[:, a:b].sum(dim=1) for a, b in blocks], dim=1).int()

    return count


def _starts_of_runs(values: np.ndarray) -> np.ndarray:
    return np.flatnonzero(np.diff(values, prepend=-1))
