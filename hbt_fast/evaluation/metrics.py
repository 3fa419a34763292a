"""Retrieval metrics from exact ranks: mAP in the three settings of LAReQA, rank distance, and cut-off metrics.

Mo: query and pool in one language. Cr: pool in one other language. Mul: pool of all languages, all parallel answers
relevant. Macro averages: Mo and Mul over query languages, Cr over ordered language pairs (arXiv 2004.05484 and
2408.10536). Cut-off metrics are those of trec_eval, with linear gains where relevance is graded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hbt_fast.evaluation.ranks import Ranks
from hbt_fast.evaluation.results import Results
from hbt_fast.evaluation.tables import nanmean

_NOT_BIAS = ("mo", "cr", "mul", "rank_distance")
_DISCOUNT = 1 / np.log2(np.arange(2, 12))  # of the ranks 1 .. 10


def average_precision(ranks: np.ndarray, groups: np.ndarray, n_groups: int) -> np.ndarray:
    """Average precision over the full ranking: the mean over relevant candidates of k / rank of the k-th best one.

    Args:
        ranks: (R,) ranks from 1 of the relevant candidates; infinite: not found, which adds nothing to the sum.
        groups: (R,) integers in 0 .. n_groups - 1: the (query, pool) that each rank belongs to.
        n_groups: length of the result.

    Returns:
        (n_groups,) float64 in (0, 1]; NaN where a group has no relevant candidate.
    """
    found = np.isfinite(ranks)
    last = int(ranks[found].max(initial=0)) + 1  # stands for "not found"
    # Sorting one integer of group and rank takes a tenth of the time of sorting by two keys.
    keys = np.sort(groups * (last + 1) + np.where(found, ranks, last).astype(np.int64))
    sizes = np.bincount(groups, minlength=n_groups)
    group = np.repeat(np.arange(n_groups), sizes)
    rank = keys - group * (last + 1)
    k = np.arange(1, len(keys) + 1) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return _divide(np.bincount(group, weights=np.where(rank < last, k / rank, 0), minlength=n_groups), sizes)


def map_matrix(ranks: Ranks) -> np.ndarray:
    """mAP by query language (row) and language of the pool (column): Mo on the diagonal, Cr off it.

    A cell is the mean over the queries of its row that have a relevant candidate in its pool.

    Returns:
        (L, L) float64; NaN where no query of the row has an answer in the pool.
    """
    return _matrix(_pool_precisions(ranks), ranks)


def _pool_precisions(ranks: Ranks) -> np.ndarray:
    """(N, L) float64 average precision of each query in the pool of each language."""
    n_languages = len(ranks.languages)
    groups = ranks.query * n_languages + ranks.relevant_languages
    ap = average_precision(ranks.in_own_pool, groups, len(ranks.query_languages) * n_languages)
    return ap.reshape(-1, n_languages)


def _matrix(ap_NL: np.ndarray, ranks: Ranks) -> np.ndarray:
    return np.stack([nanmean(ap_NL[ranks.query_languages == i], axis=0) for i in range(len(ranks.languages))])


def mul_map(ranks: Ranks) -> np.ndarray:
    """(L,) float64 mAP in the pool of all languages by query language, NaN for a language without queries."""
    ap = average_precision(ranks.in_whole_pool, ranks.query, len(ranks.query_languages))
    return _by_language(ap, ranks)


def rank_distance(ranks: Ranks) -> np.ndarray:
    """Largest minus smallest rank of a query's parallel answers in the pool of all languages (arXiv 2408.10536).

    Queries with one relevant candidate have no distance and do not count; nor does any query of a task in which all
    relevant candidates of a query are in one language: those are not parallel answers.

    Returns:
        (L,) float64 mean by query language, NaN for a language without such queries.
    """
    return _by_language(_rank_distances(ranks), ranks)


def _rank_distances(ranks: Ranks, in_whole_pool: np.ndarray | None = None) -> np.ndarray:
    n = len(ranks.query_languages)
    same_query = ranks.query[1:] == ranks.query[:-1]
    if not (ranks.relevant_languages[1:] != ranks.relevant_languages[:-1])[same_query].any():
        return np.full(n, np.nan)
    rank = ranks.in_whole_pool if in_whole_pool is None else in_whole_pool
    distance = -_best(-rank, ranks.query, n) - _best(rank, ranks.query, n)
    return np.where(np.bincount(ranks.query, minlength=n) > 1, distance, np.nan)


def cutoff_metrics(ranks: Ranks, pool: str = "own", gains: np.ndarray | None = None) -> dict[str, float]:
    """nDCG@10, Recall@100, MRR@10, macro-averaged over query languages.

    Args:
        ranks: from `exact_ranks`.
        pool: "own": the pool of the query's language (MIRACL's setting); "all": the pool of all languages.
        gains: (R,) above 0, graded relevance; None: all 1.

    Returns:
        the three values by name; NaN where no query has a relevant candidate in its pool.
    """
    return {name: nanmean(_by_language(values, ranks)) for name, values in _cutoffs_of(ranks, pool, gains).items()}


def _cutoffs_of(ranks: Ranks, pool: str, gains: np.ndarray | None) -> dict[str, np.ndarray]:
    if pool not in ("own", "all"):
        raise ValueError(f'pool must be "own" or "all", not {pool!r}')
    own = ranks.relevant_languages == ranks.query_languages[ranks.query]
    keep = own if pool == "own" else np.ones_like(own)
    rank = (ranks.in_own_pool if pool == "own" else ranks.in_whole_pool)[keep]
    return cutoffs(rank, ranks.query[keep], len(ranks.query_languages), None if gains is None else gains[keep])


def cutoffs(rank: np.ndarray, query: np.ndarray, n: int, gains: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """nDCG@10, Recall@100, MRR@10 of each query, as trec_eval defines them.

    Args:
        rank: (R,) ranks from 1 of relevant candidates; infinite: not found.
        query: (R,) int64 in 0 .. n - 1, ascending.
        n: number of queries.
        gains: (R,) above 0; None: all 1.

    Returns:
        (n,) float64 by name; NaN where a query has no relevant candidate.
    """
    rank = rank.astype(np.float64)
    gain = np.ones(len(rank)) if gains is None else gains.astype(np.float64)
    relevant = np.bincount(query, minlength=n)
    # The ideal ranking: the largest gains of a query first, ten at most.
    order = np.lexsort((-gain, query))
    place = np.arange(len(order)) - np.repeat(np.cumsum(relevant) - relevant, relevant)
    top = order[place < 10]
    ideal = np.bincount(query[top], weights=gain[top] * _DISCOUNT[place[place < 10]], minlength=n)
    found = np.bincount(query, weights=np.where(rank <= 10, gain / np.log2(1 + rank), 0), minlength=n)
    best = _best(rank, query, n)
    return {
        "ndcg@10": _divide(found, ideal),
        "recall@100": _divide(np.bincount(query, weights=rank <= 100, minlength=n), relevant),
        "mrr@10": np.where(relevant > 0, np.where(best <= 10, 1 / best, 0.0), np.nan),
    }


def found_metrics(ranks: Ranks, indices: np.ndarray, gains: np.ndarray | None = None) -> dict[str, float]:
    """The same of what a search of the pool of all languages found, to set beside the exact values.

    Args:
        ranks: from `exact_ranks`; of it only what is relevant.
        indices: (N, k) int64 candidates, best first; -1: none.
        gains: (R,) above 0; None: all 1.
    """
    hits_Rk = indices[ranks.query] == ranks.relevant[:, None]
    rank = np.where(hits_Rk.any(axis=1), hits_Rk.argmax(axis=1) + 1.0, np.inf)
    values = cutoffs(rank, ranks.query, len(ranks.query_languages), gains)
    return {name: nanmean(_by_language(x, ranks)) for name, x in values.items()}


def per_query(ranks: Ranks, gains: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Every measure of every query.

    Args:
        ranks: from `exact_ranks`.
        gains: (R,) above 0, graded relevance; None: all 1.

    Returns:
        (N,) float64 by name, NaN where a query does not have the measure: "mo"; "cr" (mean over the pools of the other
        languages); "mul"; "rank_distance"; "ndcg@10", "recall@100" and "mrr@10" in the pool of the query's language;
        "accuracy@1": 1 where the first of the pool of all languages is relevant.
    """
    n, own = len(ranks.query_languages), ranks.query_languages[:, None]
    ap_NL = _pool_precisions(ranks)
    whole = ranks.in_whole_pool
    others_NL = np.where(np.arange(len(ranks.languages)) == own, np.nan, ap_NL)
    return {
        "mo": np.take_along_axis(ap_NL, own, axis=1)[:, 0],
        "cr": nanmean(others_NL, axis=1),
        "mul": average_precision(whole, ranks.query, n),
        "rank_distance": _rank_distances(ranks, whole),
        **_cutoffs_of(ranks, "own", gains),
        "accuracy@1": (_best(whole, ranks.query, n) == 1).astype(np.float64),
    }


def in_pools(rank: np.ndarray, query: np.ndarray, n: int, gains: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Every measure of every query of a re-ranking task.

    Args:
        rank: (R,) int64 from `pool_ranks`: from 1 in the query's own pool, 0 where the pool lacks the candidate. A pool
            does not make a query easier by that: the candidate counts as not found.
        query: (R,) int64, ascending, its query.
        n: number of queries.
        gains: (R,) above 0, graded relevance; None: all 1.

    Returns:
        (n,) float64 by name.
    """
    rank = np.where(rank == 0, np.inf, rank)
    first = (_best(rank, query, n) == 1).astype(np.float64)
    return {**cutoffs(rank, query, n, gains), "map": average_precision(rank, query, n), "accuracy@1": first}


def summarise(
    ranks: Ranks,
    task: str,
    model: str = "",
    *,
    measures: Mapping[str, np.ndarray] | None = None,
    gains: np.ndarray | None = None,
    groups: Mapping[str, Sequence[str]] | None = None,
    **extra: Any,
) -> Results:
    """All metrics of `ranks` as `Results`.

    Args:
        ranks: from `exact_ranks`.
        task: its name.
        model: what was evaluated.
        measures: (N,) float64 by name: those of `per_query` and any more that are to be averaged; None: `per_query`'s.
        gains: (R,) above 0, graded relevance; None: all 1.
        groups: name -> query languages, for macro means over them.
        extra: further fields of `Results`.
    """
    measures = per_query(ranks, gains) if measures is None else measures
    matrix = map_matrix(ranks)
    others = np.where(np.eye(len(matrix), dtype=bool), np.nan, matrix)
    by_language = {name: _by_language(values, ranks) for name, values in measures.items()}
    by_language["cr"] = nanmean(others, axis=1)
    pools = {pool: cutoff_metrics(ranks, pool, gains) for pool in ("own", "all")}
    return Results(
        task=task,
        model=model,
        languages=list(ranks.languages),
        queries=len(ranks.query_languages),
        candidates=int(ranks.pool.sum()),
        mo=nanmean(np.diag(matrix)),
        cr=nanmean(others),
        mul=nanmean(by_language["mul"]),
        rank_distance=nanmean(by_language["rank_distance"]),
        matrix=matrix.tolist(),
        mul_by_language=by_language["mul"].tolist(),
        rank_distance_by_language=by_language["rank_distance"].tolist(),
        cutoffs=pools,
        bias={name: nanmean(x) for name, x in by_language.items() if name not in (*_NOT_BIAS, *pools["own"])},
        by_language={name: values.tolist() for name, values in by_language.items()},
        groups=_of_groups(groups or {}, ranks.languages, {**by_language, "cr": others}),
        group_languages={group: list(members) for group, members in (groups or {}).items()},
        **extra,
    )


def summarise_pools(
    measures: Mapping[str, np.ndarray],
    query_languages: Sequence[str],
    candidates: int,
    task: str,
    model: str = "",
    *,
    groups: Mapping[str, Sequence[str]] | None = None,
    **extra: Any,
) -> Results:
    """What `in_pools` gave as `Results`, in which mAP over whole rankings is missing (NaN).

    Args:
        measures: (N,) float64 by name.
        query_languages: N codes.
        candidates: how many there are in all pools together.
        task: its name.
        model: what was evaluated.
        groups: name -> query languages, for macro means over them.
        extra: further fields of `Results`.
    """
    languages, language_N = np.unique(query_languages, return_inverse=True)
    by_language = {
        name: np.array([nanmean(values[language_N == i]) for i in range(len(languages))])
        for name, values in measures.items()
    }
    none = [math.nan] * len(languages)
    return Results(
        task, model, languages.tolist(), len(language_N), candidates,
        mo=math.nan, cr=math.nan, mul=math.nan, rank_distance=math.nan,
        matrix=[none] * len(languages), mul_by_language=none, rank_distance_by_language=none,
        cutoffs={"re-ranking": {name: nanmean(values) for name, values in by_language.items()}},
        by_language={name: values.tolist() for name, values in by_language.items()},
        groups=_of_groups(groups or {}, languages.tolist(), by_language),
        group_languages={group: list(members) for group, members in (groups or {}).items()},
        **extra,
    )  # fmt: skip


def _of_groups(
    groups: Mapping[str, Sequence[str]], languages: Sequence[str], by_language: Mapping[str, np.ndarray]
) -> dict[str, dict[str, float]]:
    """Means over the rows of a group's languages; "cr" has a row of pairs for each."""
    rows = {
        group: [i for i, language in enumerate(languages) if language in members] for group, members in groups.items()
    }
    found = {
        group: {name: nanmean(values[mine]) for name, values in by_language.items()} for group, mine in rows.items()
    }
    return {group: {name: x for name, x in values.items() if not math.isnan(x)} for group, values in found.items()}


def _best(rank: np.ndarray, query: np.ndarray, n: int) -> np.ndarray:
    """(n,) the lowest rank of each query; infinite if it has none."""
    best = np.full(n, np.inf)
    if len(rank):
        starts = np.flatnonzero(np.diff(query, prepend=-1))
        best[query[starts]] = np.minimum.reduceat(rank, starts)
    return best


def _by_language(per_query: np.ndarray, ranks: Ranks) -> np.ndarray:
    return np.array([nanmean(per_query[ranks.query_languages == i]) for i in range(len(ranks.languages))])


def _divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.divide(a, b, out=np.full(np.shape(a), np.nan), where=np.asarray(b) > 0)
