"""Top-k search with FAISS, and what it shows: accuracy@1 and the language bias at the top of the ranking.

Exact inner-product search (IndexFlatIP). Metrics over the full ranking come from `ranks`, not from here.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

GPU_MAX_K = 2048  # FAISS's GPU kernels hold the top k in registers and shared memory and stop here


def search(queries: np.ndarray, candidates: np.ndarray, k: int, device: str = "auto") -> tuple[np.ndarray, np.ndarray]:
    """The k candidates of highest inner product for each query.

    Within the k results equal scores come in candidate order; which of several equal scores at the k-th place is kept
    is up to FAISS.

    Args:
        queries: (N, d) float32.
        candidates: (M, d) float32.
        k: at most M; at most 2048 on a GPU.
        device: "cpu", "cuda" (every GPU that FAISS sees) or "auto" (GPUs if FAISS has them and k allows, else the CPU).

    Returns:
        scores (N, k) float32, descending, and candidate indices (N, k) int64.

    Raises:
        ValueError: k out of range, dimensions that differ, or device="cuda" with a FAISS that has no GPU.
    """
    if queries.ndim != 2 or candidates.ndim != 2 or queries.shape[1] != candidates.shape[1]:
        raise ValueError(f"queries {queries.shape} and candidates {candidates.shape} must be (n, d) with equal d")
    if not 1 <= k <= len(candidates):
        raise ValueError(f"k = {k} must lie in 1 .. {len(candidates)}, the number of candidates")
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f'device must be "auto", "cpu" or "cuda", not {device!r}')
    import faiss

    gpus = faiss.get_num_gpus() if hasattr(faiss, "get_num_gpus") else 0
    if device == "cuda" and gpus == 0:
        raise ValueError('device="cuda", but this FAISS sees no GPU: install faiss-gpu or take device="cpu"')
    if device == "cuda" and k > GPU_MAX_K:
        raise ValueError(f'k = {k}, but FAISS on a GPU allows k <= {GPU_MAX_K}: use device="cpu" or a smaller k')
    index = faiss.IndexFlatIP(candidates.shape[1])
    if device != "cpu" and gpus and k <= GPU_MAX_K:
        index = faiss.index_cpu_to_all_gpus(index)
    index.add(np.ascontiguousarray(candidates, dtype=np.float32))
    scores, indices = index.search(np.ascontiguousarray(queries, dtype=np.float32), k)
    order = np.lexsort((indices, -scores), axis=1)
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(indices, order, axis=1)


def language_bias(
    indices: np.ndarray,
    query_languages: Sequence[str],
    candidate_languages: Sequence[str],
    offsets: np.ndarray,
    relevant: np.ndarray,
) -> dict[str, float]:
    """How far the top of the whole pool's ranking leans to the query's own language, and accuracy@1.

    Args:
        indices: (N, k) int64 best candidates, best first, from `search` over the pool of all languages.
        query_languages: N codes.
        candidate_languages: M codes.
        offsets: (N + 1,) int64 and
        relevant: (R,) int64, as in `RetrievalTask`.

    Returns:
        Macro means over query languages: "accuracy@1" (the first result is relevant), "own-language@1" and
        "own-language@k" (share of the top 1 and top k in the query's language), "pool share" (share of the whole pool
        in the query's language: what a ranking without bias would show).
    """
    codes = {language: i for i, language in enumerate(sorted(set(query_languages) | set(candidate_languages)))}
    language_N = np.array([codes[language] for language in query_languages])
    language_M = np.array([codes[language] for language in candidate_languages])
    own = language_M[indices] == language_N[:, None]
    pairs = np.repeat(np.arange(len(language_N)), np.diff(offsets))
    hits = np.zeros(len(language_N), dtype=bool)
    hits[pairs[relevant == indices[pairs, 0]]] = True
    share = np.bincount(language_M, minlength=len(codes)) / len(language_M)
    per_query = {
        "accuracy@1": hits,
        "own-language@1": own[:, 0],
        f"own-language@{indices.shape[1]}": own.mean(axis=1),
        "pool share": share[language_N],
    }
    return {
        name: float(np.mean([values[language_N == i].mean() for i in np.unique(language_N)]))
        for name, values in per_query.items()
    }
