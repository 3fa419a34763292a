"""The nearest neighbours of every row and of every column of one product, a chunk of scores at a time.

Design record. A product of two sets of vectors has both directions of a bitext search in it: its rows are the
sources' scores, its columns the targets'. Both are read while a chunk is warm. The kernels keep the k best so far and
their worst; a block of scores is first compared with that worst in one vectorised count, and only a block that holds a
better one is gone through score by score. A new best becomes rarer as 1 / i, so that nearly all blocks are skipped.

Legend: n and m vectors on the two sides, d dimension, k neighbours, c rows of a chunk.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numba
import numpy as np
import torch
from torch import Tensor

BLOCK = 32  # scores that are compared at once


@dataclass(frozen=True, eq=False)
class Neighbours:
    """The k best on the other side, best first; of equal scores the lower index comes first.

    Args:
        scores: (n, k) float32.
        index: (n, k) int64.
    """

    scores: np.ndarray
    index: np.ndarray


def mutual_neighbours(
    a_nd: Tensor, b_md: Tensor, k: int, *, workspace_c: Tensor, backend: str = "auto"
) -> tuple[Neighbours, Neighbours, float]:
    """The k nearest b of each a, and the k nearest a of each b, by inner product, out of one product.

    Args:
        a_nd: (n, d) float32.
        b_md: (m, d) float32, on the same device.
        k: at least 1; a side with fewer vectors gives as many as it has.
        workspace_c: float32, flat, on that device: room for a chunk of scores. One row is taken if it is smaller.
        backend: "numba" on the CPU; "torch" is the specification in plain torch and runs on any device; "auto" takes
            torch on a GPU and Numba elsewhere.

    Returns:
        neighbours of a (n, min(k, m)), neighbours of b (m, min(k, n)), and the seconds in the product alone.

    Raises:
        ValueError: an unknown backend, or Numba on another device.
    """
    if backend == "auto":
        backend = "numba" if a_nd.device.type == "cpu" else "torch"
    if backend not in ("numba", "torch"):
        raise ValueError(f'backend must be "auto", "numba" or "torch", not {backend!r}')
    if backend == "numba" and a_nd.device.type != "cpu":
        raise ValueError(f'backend="numba" searches on the CPU only, not on {a_nd.device}: take backend="torch"')
    n, m = len(a_nd), len(b_md)
    rows = _empty(n, min(k, m), a_nd.device), _empty(n, min(k, m), a_nd.device, torch.int32)
    columns = _empty(m, min(k, n), a_nd.device), _empty(m, min(k, n), a_nd.device, torch.int32)
    if len(workspace_c) < m:
        workspace_c = torch.empty(m, device=a_nd.device)
    size = min(n, len(workspace_c) // m)
    seconds = 0.0
    for first in range(0, n, size):
        a_cd = a_nd[first : first + size]
        s_cm = workspace_c[: len(a_cd) * m].view(len(a_cd), m)
        started = time.perf_counter()
        torch.mm(a_cd, b_md.T, out=s_cm)
        if s_cm.is_cuda:
            torch.cuda.synchronize()
        seconds += time.perf_counter() - started
        (_search_numba if backend == "numba" else _search_torch)(s_cm, first, rows, columns)
    return _host(rows), _host(columns), seconds


def _empty(n: int, k: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full((n, k), -torch.inf if dtype == torch.float32 else 0, device=device, dtype=dtype)


def _host(found: tuple[Tensor, Tensor]) -> Neighbours:
    scores, index = found
    return Neighbours(scores.cpu().numpy(), index.cpu().numpy().astype(np.int64))


def _search_torch(s_cm: Tensor, first: int, rows: tuple[Tensor, Tensor], columns: tuple[Tensor, Tensor]) -> None:
    """The specification: the first maximum, k times; torch's own top-k leaves the order of equal scores open."""
    part = slice(first, first + len(s_cm))
    rows[0][part], rows[1][part] = _top(s_cm, rows[0].shape[1])
    k = columns[0].shape[1]
    scores, index = _top(s_cm.T, min(k, len(s_cm)))
    # Those of earlier chunks stand in front: of equal scores they have the lower index.
    scores, index = torch.cat([columns[0], scores], 1), torch.cat([columns[1], index + first], 1)
    best, place = _top(scores, k)
    columns[0][:], columns[1][:] = best, index.gather(1, place.long())


def _top(s_nm: Tensor, k: int) -> tuple[Tensor, Tensor]:
    left, scores, index = s_nm.clone(), [], []
    for _ in range(k):
        place = left.argmax(dim=1, keepdim=True)  # documented to be the first of equal ones
        scores.append(left.gather(1, place))
        index.append(place)
        left.scatter_(1, place, -torch.inf)
    return torch.cat(scores, 1), torch.cat(index, 1).int()


def _search_numba(s_cm: Tensor, first: int, rows: tuple[Tensor, Tensor], columns: tuple[Tensor, Tensor]) -> None:
    part = slice(first, first + len(s_cm))
    torch_threads = torch.get_num_threads()  # before the first question to numba: starting its pool changes it
    threads = numba.get_num_threads()
    numba.set_num_threads(min(torch_threads, numba.config.NUMBA_NUM_THREADS))
    try:
        scores = s_cm.numpy()
        _best_of_rows(scores, rows[0][part].numpy(), rows[1][part].numpy())
        _best_of_columns(scores, first, columns[0].numpy(), columns[1].numpy())
    finally:
        numba.set_num_threads(threads)
        torch.set_num_threads(torch_threads)


@numba.njit(cache=True, nogil=True)
def _any_above(scores: np.ndarray, threshold: float):
    count = np.int32(0)
    for j in range(scores.shape[0]):
        count = np.int32(count + np.int32(scores[j] > threshold))
    return count > 0


@numba.njit(cache=True, nogil=True)
def _any_above_its_own(scores: np.ndarray, thresholds: np.ndarray):
    count = np.int32(0)
    for j in range(scores.shape[0]):
        count = np.int32(count + np.int32(scores[j] > thresholds[j]))
    return count > 0


@numba.njit(cache=True, nogil=True)
def _insert(best: np.ndarray, index: np.ndarray, score: float, i: int):
    """Puts a score that exceeds the last one in its place, behind those that equal it."""
    place = best.shape[0] - 1
    while place > 0 and best[place - 1] < score:
        best[place], index[place] = best[place - 1], index[place - 1]
        place -= 1
    best[place], index[place] = score, i


@numba.njit(parallel=True, cache=True, nogil=True)
def _best_of_rows(scores: np.ndarray, best: np.ndarray, index: np.ndarray):
    n, m = scores.shape
    last = best.shape[1] - 1
    for i in numba.prange(n):
        for begin in range(0, m, BLOCK):
            end = min(begin + BLOCK, m)
            if _any_above(scores[i, begin:end], best[i, last]):
                for j in range(begin, end):
                    if scores[i, j] > best[i, last]:
                        _insert(best[i], index[i], scores[i, j], j)


@numba.njit(parallel=True, cache=True, nogil=True)
def _best_of_columns(scores: np.ndarray, first: int, best: np.ndarray, index: np.ndarray):
    n, m = scores.shape
    last = best.shape[1] - 1
    share = 8 * BLOCK  # columns that a thread takes at once: their thresholds stay in its L1 cache
    for part in numba.prange((m + share - 1) // share):
        left, right = part * share, min((part + 1) * share, m)
        worst = best[left:right, last].copy()
        for i in range(n):
            for begin in range(left, right, BLOCK):
                end = min(begin + BLOCK, right)
                if _any_above_its_own(scores[i, begin:end], worst[begin - left : end - left]):
                    for j in range(begin, end):
                        if scores[i, j] > worst[j - left]:
                            _insert(best[j], index[j], scores[i, j], first + i)
                            worst[j - left] = best[j, last]
