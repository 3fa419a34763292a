"""Exact ranks of relevant candidates by counting, in the pool of every language and in the whole pool at once.

The rank of a candidate is one plus the number of candidates that score higher, ties going to the lower candidate index:
no ranking has to be sorted, it takes one count over the query's score row per relevant candidate and language. Given
counts per language, the settings of LAReQA (arXiv 2004.05484) cost nothing: the pool of one language is that language's
count, the pool of all languages is the sum.

Legend: N queries, M candidates, R relevant (query, candidate) pairs, L languages, d dimension.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from hbt_fast.evaluation.counting import Columns, columns_of, counter_of, has_triton, is_compiled


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

    @cached_property
    def in_own_pool(self) -> np.ndarray:
        """(R,) int64 rank (from 1) among the candidates of the relevant candidate's own language: Mo and Cr."""
        return 1 + self.higher[np.arange(len(self.query)), self.relevant_languages].astype(np.int64)

    @cached_property
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
    ignored: np.ndarray | None = None,
    backend: str = "auto",
    device: str = "auto",
    workspace_bytes: int | None = None,
) -> Ranks:
    """Ranks every relevant candidate of every query by inner product, exactly, without sorting.

    Memory beyond the inputs: one chunk of scores, the counts, and one copy of the candidates unless they are grouped by
    language (in any order of languages): then they may be a memory map larger than memory, on a CPU. Never N x M.
    Candidates with equal vectors tie wherever the library's product rounds all columns alike: MKL's does with AVX-512;
    with AVX2 the last few columns may differ in the last bit.

    Args:
        queries: (N, d) float32.
        candidates: (M, d) float32, an array or a memory map.
        query_languages: N codes.
        candidate_languages: M codes.
        offsets: (N + 1,) int64; relevant candidates of query i are relevant[offsets[i]:offsets[i + 1]].
        relevant: (R,) int64 candidate indices.
        ignored: (N,) int64 a candidate that is left out of each query's ranking; -1: none. None: all count.
        backend: "torch" is the specification in plain torch and runs on any device; "cpu" counts in C++, "triton" on a
            GPU; "auto" takes what is quickest on the device: torch on a CPU only where the C++ part was not built.
        device: "cpu", "cuda", "cuda:1" .. or "auto" (a GPU when there is one).
        workspace_bytes: size of one chunk of scores (at least two rows). None: 64 MiB, or 64 rows where that is more,
            since each chunk reads all candidates.

    Raises:
        ValueError: shapes that do not fit, NaN or infinite vectors, an unknown backend or one that lacks the device.
    """
    _check_vectors(queries, candidates)
    _check_pairs(len(queries), len(candidates), offsets, relevant)
    for name, n, languages in (
        ("queries", len(queries), query_languages),
        ("candidates", len(candidates), candidate_languages),
    ):
        if len(languages) != n:
            raise ValueError(f"{name}: {n} vectors but {len(languages)} languages")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    backend = _backend(backend, device)

    languages = sorted(set(query_languages) | set(candidate_languages))
    number = {language: i for i, language in enumerate(languages)}
    language_N, language_M = (
        np.array([number[language] for language in codes], dtype=np.int64)
        for codes in (query_languages, candidate_languages)
    )
    offsets, relevant = (np.asarray(x, dtype=np.int64) for x in (offsets, relevant))
    counted, is_ignored = _with_ignored(offsets, relevant, ignored, len(candidates))
    columns = columns_of(language_M, len(languages), *counted)
    q_Nd = _tensor(queries)
    p_Md = _tensor(candidates if columns.order is None else candidates[columns.order.numpy()]).to(device)
    higher_RL, product_seconds = _count(q_Nd, p_Md, columns, backend, device, workspace_bytes)
    if ignored is not None:
        higher_RL = _without_ignored(higher_RL, is_ignored, counted[0], language_M[counted[1]])
    query = np.repeat(np.arange(len(queries)), np.diff(offsets))
    pool = np.bincount(language_M, minlength=len(languages))
    return Ranks(languages, language_N, query, relevant, language_M[relevant], higher_RL, pool, product_seconds)


def _with_ignored(
    offsets: np.ndarray, relevant: np.ndarray, ignored: np.ndarray | None, m: int
) -> tuple[tuple[np.ndarray, np.ndarray], np.ndarray]:
    """What is counted: the ignored candidate of a query, if it has one, follows its relevant ones; and which these are.

    Where it ranks is then known from the very scores that the others are compared by.
    """
    if ignored is None:
        return (offsets, relevant), np.zeros(len(relevant), dtype=bool)
    ignored = np.asarray(ignored, dtype=np.int64)
    if ignored.shape != (len(offsets) - 1,) or ignored.min() < -1 or ignored.max() >= m:
        raise ValueError(f"ignored must be {len(offsets) - 1} candidates in 0 .. {m - 1}, or -1 for none")
    has = ignored >= 0
    longer = offsets + np.concatenate([[0], np.cumsum(has)])
    is_ignored = np.zeros(longer[-1], dtype=bool)
    is_ignored[longer[1:][has] - 1] = True
    counted = np.empty(len(is_ignored), dtype=np.int64)
    counted[is_ignored], counted[~is_ignored] = ignored[has], relevant
    return (longer, counted), is_ignored


def _without_ignored(
    higher_RL: np.ndarray, is_ignored: np.ndarray, offsets: np.ndarray, language_R: np.ndarray
) -> np.ndarray:
    """Counts of the relevant pairs, less the query's ignored candidate where that ranks above: no two rank alike."""
    rank = higher_RL.sum(axis=1, dtype=np.int64)
    last = np.repeat(offsets[1:] - 1, np.diff(offsets))  # of each pair's query; its ignored candidate if it has one
    less = np.flatnonzero(~is_ignored & is_ignored[last] & (rank[last] < rank))
    higher_RL[less, language_R[last[less]]] -= 1
    return higher_RL[~is_ignored]


def pool_ranks(
    queries: np.ndarray,
    candidates: np.ndarray,
    offsets: np.ndarray,
    relevant: np.ndarray,
    pools: tuple[np.ndarray, np.ndarray],
    *,
    workspace_bytes: int = 16 * 2**20,
) -> np.ndarray:
    """Ranks each query's relevant candidates within its own pool, as re-ranking does; ties as in `exact_ranks`.

    Equal vectors have equal scores here, since each score is a dot product by itself.

    Args:
        queries: (N, d) float32.
        candidates: (M, d) float32, an array or a memory map.
        offsets: (N + 1,) int64; relevant candidates of query i are relevant[offsets[i]:offsets[i + 1]].
        relevant: (R,) int64 candidate indices.
        pools: offsets (N + 1,) int64 and candidates (P,) int64: query i ranks
            pools[1][pools[0][i]:pools[0][i + 1]], in any order, without repeats.
        workspace_bytes: for the vectors that are multiplied at a time (at least one query's pool).

    Returns:
        (R,) int64 rank from 1; 0 for a relevant candidate that is not in its query's pool.

    Raises:
        ValueError: shapes that do not fit, NaN or infinite vectors.
    """
    _check_vectors(queries, candidates)
    _check_pairs(len(queries), len(candidates), offsets, relevant)
    _check_pairs(len(queries), len(candidates), *pools, ("pools[0]", "pools[1]"))
    offsets, relevant, starts, pooled = (np.asarray(x, dtype=np.int64) for x in (offsets, relevant, *pools))
    ranks = np.zeros(len(relevant), dtype=np.int64)
    at_a_time = max(1, workspace_bytes // (3 * queries.itemsize * queries.shape[1]))  # both vectors and their product
    first = 0
    while first < len(queries):
        # As many whole pools as fit.
        last = max(first + 1, int(np.searchsorted(starts, starts[first] + at_a_time, side="right")) - 1)
        mine = pooled[starts[first] : starts[last]]
        row = np.repeat(np.arange(last - first), np.diff(starts[first : last + 1]))
        scores = (_tensor(queries[first:last][row]) * _tensor(candidates[mine])).sum(dim=1).numpy()
        _rank_in_pools(scores, mine, row, offsets[first : last + 1], relevant, ranks)
        first = last
    return ranks


def _rank_in_pools(scores, mine, row, offsets, relevant, ranks) -> None:  # noqa: ANN001
    """Of a chunk of queries: scores, candidates and query of each pool entry in; `ranks` of its pairs are written."""
    counts = np.diff(offsets)
    for slot in range(int(counts.max(initial=0))):
        has = slot < counts
        pair = np.where(has, offsets[:-1] + slot, 0)
        candidate = np.where(has, relevant[pair], -1)[row]
        is_it = mine == candidate
        threshold = np.full(len(counts), np.inf, dtype=np.float32)  # nothing is above what is not in the pool
        threshold[row[is_it]] = scores[is_it]
        above = (scores > threshold[row]) | ((scores == threshold[row]) & (mine < candidate))
        found = np.bincount(row[is_it], minlength=len(counts)) > 0
        rank = 1 + np.bincount(row, weights=above, minlength=len(counts)).astype(np.int64)
        ranks[pair[found]] = rank[found]


def _count(
    q_Nd: torch.Tensor, p_Md: torch.Tensor, columns: Columns, backend: str, device: str, workspace_bytes: int | None
) -> tuple[np.ndarray, float]:
    """Scores chunk by chunk, each counted at once: (R, L) int32 counts, and the seconds that the products took."""
    per_row = 4 * len(p_Md)
    if workspace_bytes is None:
        # At 600,000 candidates a query takes 9 ms with 27 rows to a chunk, 5 with 64 and 4.6 with 128 (one CPU core).
        workspace_bytes = max(64 * 2**20, 64 * per_row)
    rows = max(1, min(len(q_Nd), workspace_bytes // per_row))
    s_nM = torch.empty((max(2, rows), len(p_Md)), device=device)
    higher_RL = torch.zeros(columns.splits.shape, dtype=torch.int32, device=device)
    count = counter_of(backend, columns, device)
    spans = []
    with full_precision():
        for first in range(0, len(q_Nd), rows):
            q_nd = q_Nd[first : first + rows].to(device)
            n = len(q_nd)
            if n == 1:  # a product with a vector rounds the last few columns otherwise, so that equal ones do not tie
                q_nd = q_nd.repeat(2, 1)
            begin = _mark(s_nM.is_cuda)
            torch.mm(q_nd, p_Md.T, out=s_nM[: len(q_nd)])
            spans.append((begin, _mark(s_nM.is_cuda)))
            count(s_nM[:n], first, higher_RL)
    higher = higher_RL.cpu().numpy()
    return higher, sum(b - a if isinstance(a, float) else a.elapsed_time(b) / 1e3 for a, b in spans)


def _mark(is_cuda: bool) -> float | torch.cuda.Event:
    """The time; on a GPU an event in its queue, which nobody waits for."""
    if is_cuda:
        return torch.cuda.current_stream().record_event(torch.cuda.Event(enable_timing=True))
    return time.perf_counter()


def _backend(backend: str, device: str) -> str:
    on_cpu = torch.device(device).type == "cpu"
    if backend not in ("auto", "torch", "cpu", "triton"):
        raise ValueError(f'backend must be "auto", "torch", "cpu" or "triton", not {backend!r}')
    if backend == "cpu" and not is_compiled():
        raise ValueError('backend="cpu" needs csrc/, which this installation did not build: take backend="torch"')
    if backend == "triton" and not has_triton():
        raise ValueError('backend="triton" needs triton, which is not installed: take backend="torch"')
    if backend != "torch" and backend != "auto" and (backend == "cpu") != on_cpu:
        raise ValueError(f'backend={backend!r} does not count on device={device!r}: take backend="auto"')
    if backend == "auto":
        quick = ("cpu", is_compiled()) if on_cpu else ("triton", has_triton())
        backend = quick[0] if quick[1] else "torch"
    return backend


def _tensor(array: np.ndarray) -> torch.Tensor:
    """Without a copy where that is possible. Nothing here writes to it, so one that is read-only will do."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(np.ascontiguousarray(array))


@contextmanager
def full_precision() -> Iterator[None]:
    """TF32 or bf16 products, if the program has switched them on, would reorder close candidates."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _check_vectors(queries: np.ndarray, candidates: np.ndarray) -> None:
    for name, vectors in (("queries", queries), ("candidates", candidates)):
        if vectors.ndim != 2 or vectors.dtype != np.float32 or vectors.shape[0] == 0:
            raise ValueError(f"{name} must be float32 of shape (n, d), n > 0, not {vectors.dtype} {vectors.shape}")
        for first in range(0, len(vectors), 65536):
            part = vectors[first : first + 65536]
            with np.errstate(all="ignore"):
                if np.isfinite(part.sum()):  # quicker than a look at each; large numbers may add up to infinity too
                    continue
            bad = np.flatnonzero(~np.isfinite(part).all(axis=1))
            if len(bad):
                raise ValueError(f"{name}: vector {first + bad[0]} holds NaN or infinity")
    if queries.shape[1] != candidates.shape[1]:
        raise ValueError(f"queries have dimension {queries.shape[1]}, candidates {candidates.shape[1]}")


def _check_pairs(
    n: int, m: int, offsets: np.ndarray, indices: np.ndarray, names: tuple[str, str] = ("offsets", "relevant")
) -> None:
    """Compiled loops read where these say."""
    if len(offsets) != n + 1:
        raise ValueError(f"{names[0]} must have one entry more than the {n} queries, not {len(offsets)}")
    if offsets[0] != 0 or offsets[-1] != len(indices) or (np.diff(offsets) < 0).any():
        raise ValueError(f"{names[0]} must rise from 0 to {len(indices)}, the length of {names[1]}")
    if len(indices) and not (np.min(indices) >= 0 and np.max(indices) < m):
        raise ValueError(f"{names[1]} must lie in 0 .. {m - 1}, the candidates")
