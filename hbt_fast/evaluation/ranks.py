"""Exact ranks of relevant candidates by counting, in the pool of every language and in the whole pool at once.

The rank of a candidate is one plus the number of candidates that score higher, ties going to the lower candidate index:
no ranking has to be sorted, it takes one count over the query's score row per relevant candidate and language. Given
counts per language, the settings of LAReQA (arXiv 2004.05484) cost nothing: the pool of one language is that language's
count, the pool of all languages is the sum.

Legend: N queries, M candidates, R relevant (query, candidate) pairs, L languages, d dimension.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch


@dataclass(frozen=True, eq=False)
class Ranks:
    """How many candidates of each language rank above each relevant candidate.

    Args:
        languages: L language codes, sorted.
        query_languages: (N,) int64, index into `languages`.
        query: (R,) int64, query of each relevant pair, ascending.
        relevant: (R,) int64, its candidate.
        relevant_languages: (R,) int64, language of that candidate.
        higher: (R, L) int32, candidates of language l that rank above it.
        pool: (L,) int64, candidates per language.
        product_seconds: time in the matrix products alone, the floor of any exact method.
    """

    languages: list[str]
    query_languages: np.ndarray
    query: np.ndarray
    relevant: np.ndarray
    relevant_languages: np.ndarray
    higher: np.ndarray
    pool: np.ndarray
    product_seconds: float = 0.0

    @property
    def in_own_pool(self) -> np.ndarray:
        """(R,) int64 rank (from 1) among the candidates of the relevant candidate's own language: Mo and Cr."""
        return 1 + self.higher[np.arange(len(self.query)), self.relevant_languages].astype(np.int64)

    @property
    def in_whole_pool(self) -> np.ndarray:
        """(R,) int64 rank (from 1) among the candidates of all languages: Mul."""
        return 1 + self.higher.sum(axis=1, dtype=np.int64)


def exact_ranks(
    queries: np.ndarray,
    candidates: np.ndarray,
    query_languages: Sequence[str],
    candidate_languages: Sequence[str],
    offsets: np.ndarray,
    relevant: np.ndarray,
    *,
    backend: str = "auto",
    device: str = "auto",
    workspace_bytes: int = 64 * 2**20,
) -> Ranks:
    """Ranks every relevant candidate of every query by inner product, exactly, without sorting.

    Memory beyond the inputs: one copy of the candidates and one chunk of scores; never N x M. Candidates with equal
    vectors tie up to the rounding of the matrix product, which may treat the last few columns of a matrix differently.

    Args:
        queries: (N, d) float32.
        candidates: (M, d) float32.
        query_languages: N codes.
        candidate_languages: M codes.
        offsets: (N + 1,) int64; relevant candidates of query i are relevant[offsets[i]:offsets[i + 1]].
        relevant: (R,) int64 candidate indices.
        backend: "numba" counts on the CPU; "torch" is the specification in plain torch and runs on any device;
            "auto" takes torch on a GPU and Numba elsewhere.
        device: "cpu", "cuda", "cuda:1" .. or "auto" (a GPU when there is one).
        workspace_bytes: size of one chunk of scores (at least one row).

    Raises:
        ValueError: shapes that do not fit, NaN or infinite vectors, an unknown backend or one that lacks the device.
    """
    _check(queries, candidates, query_languages, candidate_languages, offsets)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if backend == "auto":
        backend = "numba" if device == "cpu" else "torch"
    if backend not in ("numba", "torch"):
        raise ValueError(f'backend must be "auto", "numba" or "torch", not {backend!r}')
    if backend == "numba" and device != "cpu":
        raise ValueError(f'backend="numba" counts on the CPU only, not on {device}: take backend="torch"')

    languages = sorted(set(query_languages) | set(candidate_languages))
    number = {language: i for i, language in enumerate(languages)}
    language_M = np.array([number[language] for language in candidate_languages], dtype=np.int64)
    # Stable: within a language the columns keep the order of the candidates, on which ties depend.
    order = np.argsort(language_M, kind="stable")
    column_M = np.empty(len(order), dtype=np.int64)
    column_M[order] = np.arange(len(order))
    pool = np.bincount(language_M, minlength=len(languages))
    blocks = np.concatenate([[0], np.cumsum(pool)])
    offsets = np.ascontiguousarray(offsets, dtype=np.int64)
    relevant = np.ascontiguousarray(relevant, dtype=np.int64)

    rows = max(1, min(len(queries), workspace_bytes // (4 * len(candidates))))
    q_Nd = torch.from_numpy(np.ascontiguousarray(queries))
    p_Md = torch.from_numpy(candidates[order]).to(device)
    higher = np.empty((len(relevant), len(languages)), dtype=np.int32)
    count = _numba_counter if backend == "numba" else _torch_counter
    counter = count(order, blocks, offsets, column_M[relevant], device)
    s_nM = torch.empty((rows, len(candidates)), device=device)
    product_seconds = 0.0
    with _full_precision():
        for first in range(0, len(queries), rows):
            q_nd = q_Nd[first : first + rows].to(device)
            chunk = s_nM[: len(q_nd)]
            started = time.perf_counter()
            torch.mm(q_nd, p_Md.T, out=chunk)
            if chunk.is_cuda:
                torch.cuda.synchronize()
            product_seconds += time.perf_counter() - started
            counter(chunk, first, higher)
    query = np.repeat(np.arange(len(queries)), np.diff(offsets))
    language_N = np.array([number[language] for language in query_languages], dtype=np.int64)
    return Ranks(languages, language_N, query, relevant, language_M[relevant], higher, pool, product_seconds)


def _numba_counter(order, blocks, offsets, positions, device):  # noqa: ANN001
    import numba

    from hbt_fast.evaluation.count_kernel import count_higher

    # Columns of a block ascend in candidate index: those that win ties against a candidate are a prefix of the block.
    splits = np.stack([a + np.searchsorted(order[a:b], order) for a, b in pairwise(blocks)], axis=1).astype(np.int32)

    def count(chunk: torch.Tensor, first: int, higher: np.ndarray) -> None:
        torch_threads = torch.get_num_threads()  # before the first question to numba: starting its pool changes it
        threads = numba.get_num_threads()
        numba.set_num_threads(min(torch_threads, numba.config.NUMBA_NUM_THREADS))
        try:
            count_higher(chunk.numpy(), first, offsets, positions, blocks, splits, higher)
        finally:
            numba.set_num_threads(threads)
            torch.set_num_threads(torch_threads)

    return count


def _torch_counter(order, blocks, offsets, positions, device):  # noqa: ANN001
    """The specification: one comparison of whole chunks per relevant candidate, ties by candidate index."""
    index_M = torch.from_numpy(order).to(device)

    def count(chunk: torch.Tensor, first: int, higher: np.ndarray) -> None:
        begins, ends = offsets[first : first + len(chunk)], offsets[first + 1 : first + len(chunk) + 1]
        for slot in range(int((ends - begins).max(initial=0))):
            rows = np.flatnonzero(begins + slot < ends)
            pairs = begins[rows] + slot
            column = torch.from_numpy(positions[pairs]).to(device)
            # All rows have this slot more often than not: then no copy of the chunk is needed.
            scores = chunk if len(rows) == len(chunk) else chunk[torch.from_numpy(rows).to(device)]
            threshold = scores.gather(1, column[:, None])
            above = (scores > threshold) | ((scores == threshold) & (index_M < index_M[column][:, None]))
            counts = [above[:, a:b].sum(dim=1) for a, b in pairwise(blocks)]
            higher[pairs] = torch.stack(counts, dim=1).int().cpu().numpy()

    return count


@contextmanager
def _full_precision() -> Iterator[None]:
    """TF32 or bf16 products, if the program has switched them on, would reorder close candidates."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _check(queries, candidates, query_languages, candidate_languages, offsets) -> None:  # noqa: ANN001
    for name, vectors, languages in (
        ("queries", queries, query_languages),
        ("candidates", candidates, candidate_languages),
    ):
        if vectors.ndim != 2 or vectors.dtype != np.float32 or vectors.shape[0] == 0:
            raise ValueError(f"{name} must be float32 of shape (n, d), n > 0, not {vectors.dtype} {vectors.shape}")
        if len(languages) != len(vectors):
            raise ValueError(f"{name}: {len(vectors)} vectors but {len(languages)} languages")
        if not np.isfinite(vectors).all():
            row = int(np.flatnonzero(~np.isfinite(vectors).all(axis=1))[0])
            raise ValueError(f"{name}: vector {row} holds NaN or infinity")
    if queries.shape[1] != candidates.shape[1]:
        raise ValueError(f"queries have dimension {queries.shape[1]}, candidates {candidates.shape[1]}")
    if len(offsets) != len(queries) + 1:
        raise ValueError(f"offsets must have one entry more than the {len(queries)} queries, not {len(offsets)}")
