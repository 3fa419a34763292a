"""Top-k search with FAISS over candidates in memory, in a memory-mapped file or in shards: exact, IVF or IVF-PQ.

Exact search goes through the candidates shard by shard with a running top k: one shard, the queries and the results are
all that it holds. IVF and IVF-PQ indexes are filled the same way. Metrics over the full ranking come from `ranks`.

Legend: N queries, M candidates, d dimension, s rows of a shard, k results.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hbt_fast.evaluation.indexes import GPU_MAX_K, Plan, build, find, make_plan, on_gpus, to_gpus
from hbt_fast.evaluation.shards import Candidates, check_dimension, count, float32, shards

WORKSPACE = 256 * 2**20


def search(
    queries: np.ndarray,
    candidates: Candidates,
    k: int,
    device: str = "auto",
    index: str = "flat",
    *,
    nlist: int | None = None,
    nprobe: int | None = None,
    m: int | None = None,
    bits: int | None = None,
    workspace_bytes: int = WORKSPACE,
) -> tuple[np.ndarray, np.ndarray]:
    """The k candidates of highest inner product for each query.

    Equal scores come in candidate order, and at the k-th place the lower candidates are kept, wherever shards end
    (except by approximate indexes, and on a GPU at k = 2048: there FAISS keeps which it likes). Equal vectors have
    equal scores up to the rounding of the matrix product, which may treat the last few columns of a matrix differently.

    Args:
        queries: (N, d) floats.
        candidates: (M, d) floats, also float16, also mapped (`numpy.load(path, mmap_mode="r")`); or shards of them,
            numbered through: any iterable for "flat", no generator for the others, which read it three times.
        k: at most M; at most 2048 on a GPU.
        device: "cpu", "cuda" (every GPU that FAISS sees, the candidates shared out among them) or "auto" (GPUs if
            FAISS has them and their limits allow, else the CPU).
        index: "flat" is exact. "ivf" looks only at the nprobe of nlist clusters that are nearest to the query. "ivf-pq"
            does so with every vector cut down to m codes, at a price in recall. Building one costs about as much as
            exact search with nlist queries.
        nlist: default: the square root of M, or fewer, so that each has 39 candidates. (FAISS's guidelines have 4 to 16
            times the root, for an index that is built once and asked for years.)
        nprobe: default: twice the square root of nlist; nprobe = nlist looks at everything.
        m: of "ivf-pq", a divisor of d; default: the largest one that is at most d / 8 and 96.
        bits: "ivf": per component: 32 (floats, the default), 16 (halves) or 8 (256 steps between the least and the
            greatest); "ivf-pq": per code: 4 to 12, default 8, the only one on a GPU.
        workspace_bytes: size of one shard in float32 (at least one vector). An IVF index takes besides what its codes
            take (M * d * bits / 8 or M * m * bits / 8), and 256 * d bytes per cluster while it is trained.

    Returns:
        scores (N, k) float32, descending, and candidate indices (N, k) int64. Where an approximate index finds fewer
        than k in the clusters that it looks at: -inf and -1.

    Raises:
        ValueError: no candidates, shapes or dimensions that do not fit, NaN or infinity, k or an option of the index
            out of range, too few candidates to train the index, or device="cuda" with a FAISS that has no GPU.
    """
    q_Nd, plan, gpus = _prepare(queries, candidates, k, device, index, (nlist, nprobe, m, bits), workspace_bytes)
    if index == "flat":
        return _search_flat(q_Nd, candidates, k, plan.rows, gpus)
    return find(build(candidates, plan, gpus), q_Nd, k)


def recall_against_exact(approximate_indices: np.ndarray, exact_indices: np.ndarray) -> float:
    """Share of the exact top k that the approximate top k holds, mean over queries.

    Args:
        approximate_indices: (N, k) integers; -1 (nothing found) is a miss.
        exact_indices: (N, k) integers, of "flat".

    Raises:
        ValueError: shapes that differ, or nothing to compare.
    """
    approximate, exact = np.asarray(approximate_indices), np.asarray(exact_indices)
    if approximate.shape != exact.shape or exact.ndim != 2 or exact.size == 0:
        raise ValueError(f"both must be (N, k) and not empty; they are {approximate.shape} and {exact.shape}")
    hits = [np.intersect1d(a, e).size for a, e in zip(approximate, exact, strict=True)]
    return float(np.mean(hits)) / exact.shape[1]


@dataclass(frozen=True)
class IndexReport:
    """A line of `compare_indexes`. `plan.bytes` is what the candidates take in memory."""

    plan: Plan
    build_seconds: float
    search_seconds: float
    recall: float

    def __str__(self) -> str:
        probed = f" nprobe {self.plan.nprobe}" if self.plan.nprobe else ""
        return (
            f"{self.plan.factory + probed:<28} build {self.build_seconds:8.1f} s   search {self.search_seconds:8.1f} s"
            f"   {self.plan.bytes / 2**20:8,.0f} MiB   recall {self.recall:.4f}"
        )


def compare_indexes(
    queries: np.ndarray,
    candidates: Candidates,
    k: int,
    indexes: Sequence[dict[str, Any]],
    *,
    device: str = "auto",
    workspace_bytes: int = WORKSPACE,
    log: Callable[[str], None] | None = print,
) -> list[IndexReport]:
    """Times, sizes and recall of indexes; exact search, which the recall is against, is the first of them.

    Args:
        queries: as in `search`.
        candidates: as in `search`, but no generator.
        k: depth of the search and of the recall.
        indexes: options of `search` for each, for instance {"index": "ivf", "nprobe": 64}.
        device: as in `search`.
        workspace_bytes: as in `search`.
        log: gets each line as soon as it is known; None: silent.
    """
    count(candidates)  # refuses generators, which exact search would use up
    reports, exact = [], None
    for options in ({"index": "flat"}, *indexes):
        given = tuple(options.get(name) for name in ("nlist", "nprobe", "m", "bits"))
        q_Nd, plan, gpus = _prepare(queries, candidates, k, device, options["index"], given, workspace_bytes)
        built, started = None, time.perf_counter()
        if plan.index != "flat":
            built = build(candidates, plan, gpus)
        built_at = time.perf_counter()
        indices = (_search_flat(q_Nd, candidates, k, plan.rows, gpus) if built is None else find(built, q_Nd, k))[1]
        ended = time.perf_counter()
        exact = indices if exact is None else exact
        recall = recall_against_exact(indices, exact)
        reports.append(IndexReport(plan, built_at - started, ended - built_at, recall))
        if log:
            log(str(reports[-1]))
        del built  # or two would be in memory while the next one is filled
    return reports


def _prepare(
    queries: np.ndarray,
    candidates: Candidates,
    k: int,
    device: str,
    index: str,
    options: tuple[int | None, ...],
    workspace_bytes: int,
) -> tuple[np.ndarray, Plan, bool]:
    """Checks the arguments of `search`: queries in float32, what is searched in, whether on GPUs."""
    queries, whole = np.asarray(queries), isinstance(candidates, np.ndarray)
    if queries.ndim != 2 or queries.shape[1] == 0:
        raise ValueError(f"queries {queries.shape} must be (N, d), d > 0")
    d = queries.shape[1]
    if whole:
        check_dimension(candidates, d, "candidates")
    total = count(candidates) if whole or index != "flat" else 0  # shards are counted while they are searched
    if k < 1 or (total and k > total):
        raise _wrong_k(k, total)
    plan = make_plan(index, d, max(1, workspace_bytes // (4 * d)), total, *options)
    return float32(queries, "queries", range(len(queries))), plan, on_gpus(device, plan, k)


def _wrong_k(k: int, total: int) -> ValueError:
    return ValueError(f"k = {k} must lie in 1 .. {total or 'M'}, the number of candidates")


def _search_flat(
    q_Nd: np.ndarray, candidates: Candidates, k: int, rows: int, gpus: bool
) -> tuple[np.ndarray, np.ndarray]:
    import faiss

    index = to_gpus(faiss.IndexFlatIP(q_Nd.shape[1])) if gpus else None

    def nearest(p_sd: np.ndarray, wanted: int) -> tuple[np.ndarray, np.ndarray]:
        if index is None:
            return faiss.knn(q_Nd, p_sd, wanted, metric=faiss.METRIC_INNER_PRODUCT)  # without a copy of the shard
        index.reset()
        index.add(p_sd)
        return index.search(q_Nd, wanted)

    scores_Nk, indices_Nk = np.empty((len(q_Nd), 0), np.float32), np.empty((len(q_Nd), 0), np.int64)
    total = 0
    for first, p_sd in shards(candidates, q_Nd.shape[1], rows):
        total = first + len(p_sd)
        # One more than k shows where equal scores straddle the k-th place: FAISS keeps any of them.
        wanted = min(k + 1, len(p_sd), GPU_MAX_K if gpus else len(p_sd))
        scores, places = _in_order(*nearest(p_sd, wanted))
        tied = np.flatnonzero(scores[:, k - 1] == scores[:, k]) if wanted > k else []
        scores, places = scores[:, :k], places[:, :k]
        for start in range(0, len(tied), size := max(1, rows * q_Nd.shape[1] // len(p_sd))):
            some = tied[start : start + size]
            scores[some], places[some] = _top_of_all(q_Nd[some] @ p_sd.T, k)
        scores_Nk, indices_Nk = np.hstack([scores_Nk, scores]), np.hstack([indices_Nk, first + places])
        # Stable: of equal scores those of earlier shards, on the left, stay in front. Two sorted runs merge in no time.
        order = np.argsort(-scores_Nk, axis=1, kind="stable")[:, :k]
        scores_Nk, indices_Nk = (np.take_along_axis(array, order, axis=1) for array in (scores_Nk, indices_Nk))
        del p_sd
    if k > total:
        raise _wrong_k(k, total)
    return scores_Nk, indices_Nk


def _in_order(scores: np.ndarray, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sorts rows that descend in score by (score, then lower place), in place."""
    rows = np.flatnonzero((scores[:, 1:] == scores[:, :-1]).any(axis=1))
    order = np.lexsort((places[rows], -scores[rows]), axis=1)
    places[rows] = np.take_along_axis(places[rows], order, axis=1)
    return scores, places


def _top_of_all(s_ns: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The best k of whole score rows, by (score, then lower place)."""
    places = np.empty((len(s_ns), k), dtype=np.int64)
    for row, s_s in enumerate(s_ns):
        best = np.flatnonzero(s_s >= np.partition(s_s, -k)[-k])
        places[row] = best[np.argsort(-s_s[best], kind="stable")[:k]]
    return np.take_along_axis(s_ns, places, axis=1), places
