"""Retrieval metrics from exact ranks: mAP in the three settings of LAReQA, rank distance, and cut-off metrics.

Mo: query and pool in one language. Cr: pool in one other language. Mul: pool of all languages, all parallel answers
relevant. Macro averages: Mo and Mul over query languages, Cr over ordered language pairs (arXiv 2004.05484 and
2408.10536).
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from hbt_fast.evaluation.ranks import Ranks


def average_precision(ranks: np.ndarray, groups: np.ndarray, n_groups: int) -> np.ndarray:
    """Average precision over the full ranking: the mean over relevant candidates of k / rank of the k-th best one.

    Args:
        ranks: (R,) integer ranks from 1 of the relevant candidates.
        groups: (R,) integers in 0 .. n_groups - 1: the (query, pool) that each rank belongs to.
        n_groups: length of the result.

    Returns:
        (n_groups,) float64 in (0, 1]; NaN where a group has no relevant candidate.
    """
    order = np.lexsort((ranks, groups))
    sizes = np.bincount(groups, minlength=n_groups)
    k = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes) + 1
    return _divide(np.bincount(groups[order], weights=k / ranks[order], minlength=n_groups), sizes)


def map_matrix(ranks: Ranks) -> np.ndarray:
    """mAP by query language (row) and language of the pool (column): Mo on the diagonal, Cr off it.

    A cell is the mean over the queries of its row that have a relevant candidate in its pool.

    Returns:
        (L, L) float64; NaN where no query of the row has an answer in the pool.
    """
    n_languages = len(ranks.languages)
    groups = ranks.query * n_languages + ranks.relevant_languages
    ap = average_precision(ranks.in_own_pool, groups, len(ranks.query_languages) * n_languages)
    ap_NL = ap.reshape(-1, n_languages)
    return np.stack([_nanmean(ap_NL[ranks.query_languages == i], axis=0) for i in range(n_languages)])


def mul_map(ranks: Ranks) -> np.ndarray:
    """(L,) float64 mAP in the pool of all languages by query language, NaN for a language without queries."""
    ap = average_precision(ranks.in_whole_pool, ranks.query, len(ranks.query_languages))
    return _by_language(ap, ranks)


def rank_distance(ranks: Ranks) -> np.ndarray:
    """Largest minus smallest rank of a query's parallel answers in the pool of all languages (arXiv 2408.10536).

    Queries with one relevant candidate have no distance and do not count.

    Returns:
        (L,) float64 mean by query language, NaN for a language without such queries.
    """
    n = len(ranks.query_languages)
    largest, smallest = np.zeros(n), np.full(n, np.inf)
    np.maximum.at(largest, ranks.query, ranks.in_whole_pool)
    np.minimum.at(smallest, ranks.query, ranks.in_whole_pool)
    distance = np.where(np.bincount(ranks.query, minlength=n) > 1, largest - smallest, np.nan)
    return _by_language(distance, ranks)


def cutoff_metrics(ranks: Ranks, pool: str = "own") -> dict[str, float]:
    """nDCG@10, Recall@100, MRR@10 with binary relevance, macro-averaged over query languages.

    Args:
        ranks: from `exact_ranks`.
        pool: "own": the pool of the query's language (MIRACL's setting); "all": the pool of all languages.

    Returns:
        the three values by name; NaN where no query has a relevant candidate in its pool.
    """
    if pool not in ("own", "all"):
        raise ValueError(f'pool must be "own" or "all", not {pool!r}')
    own = ranks.relevant_languages == ranks.query_languages[ranks.query]
    keep = own if pool == "own" else np.ones_like(own)
    rank = (ranks.in_own_pool if pool == "own" else ranks.in_whole_pool)[keep].astype(np.float64)
    query, n = ranks.query[keep], len(ranks.query_languages)
    relevant = np.bincount(query, minlength=n)
    ideal = np.concatenate([[0.0], np.cumsum(1 / np.log2(np.arange(2, 12)))])[np.minimum(relevant, 10)]
    gain = np.bincount(query, weights=np.where(rank <= 10, 1 / np.log2(1 + rank), 0), minlength=n)
    found = np.bincount(query, weights=rank <= 100, minlength=n)
    best = np.full(n, np.inf)
    np.minimum.at(best, query, rank)
    mrr = np.where(relevant > 0, np.where(best <= 10, 1 / best, 0.0), np.nan)
    values = {"ndcg@10": _divide(gain, ideal), "recall@100": _divide(found, relevant), "mrr@10": mrr}
    return {name: _macro(_by_language(value, ranks)) for name, value in values.items()}


@dataclass(frozen=True)
class Results:
    """What an evaluation measured. All lists run over `languages`; NaN stands for "no such queries".

    Args:
        task: name of the task.
        model: what was evaluated, for reports.
        languages: L codes.
        queries: number of queries.
        candidates: number of candidates.
        mo: mAP, query and pool in one language, mean over languages.
        cr: mAP, pool in one other language, mean over ordered language pairs.
        mul: mAP, pool of all languages, mean over query languages.
        rank_distance: macro mean over query languages.
        matrix: L rows of L mAPs, query language by pool language.
        mul_by_language: mAP in the whole pool by query language.
        rank_distance_by_language: by query language.
        cutoffs: nDCG@10, Recall@100, MRR@10 by pool ("own", "all").
        bias: share of the top results in the query's own language, see `search.language_bias`; empty if not measured.
        prompts: what was put before queries and passages.
        seconds: wall time by phase.
    """

    task: str
    model: str
    languages: list[str]
    queries: int
    candidates: int
    mo: float
    cr: float
    mul: float
    rank_distance: float
    matrix: list[list[float]]
    mul_by_language: list[float]
    rank_distance_by_language: list[float]
    cutoffs: dict[str, dict[str, float]] = field(default_factory=dict)
    bias: dict[str, float] = field(default_factory=dict)
    prompts: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> str:
        """Strict JSON (NaN becomes null); `from_json` gives equal results back."""
        return json.dumps(_map_floats(asdict(self), lambda x: None if math.isnan(x) else x), indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Results:
        """Reads what `to_json` wrote; raises ValueError (with the reason) on anything else."""
        try:
            return cls(**_map_nulls(json.loads(text)))
        except TypeError as error:
            raise ValueError(f"not a result file of hbt_fast.evaluate: {error}") from error

    def to_markdown(self) -> str:
        """A headline table, one line per query language, and the query-by-passage-language matrix."""
        head = [
            f"# {self.model or 'model'} on {self.task}",
            f"{self.queries:,} queries, {self.candidates:,} candidates, {len(self.languages)} languages. "
            "mAP over the full ranking.",
            _table(
                ["Mo", "Cr", "Mul", "rank distance"],
                [[f"{self.mo:.4f}", f"{self.cr:.4f}", f"{self.mul:.4f}", f"{self.rank_distance:,.1f}"]],
            ),
        ]
        cutoffs = [[pool, *(f"{x:.4f}" for x in values.values())] for pool, values in self.cutoffs.items()]
        if cutoffs:
            head.append(_table(["pool", *next(iter(self.cutoffs.values()))], cutoffs))
        if self.bias:
            head.append(_table(list(self.bias), [[f"{x:.4f}" for x in self.bias.values()]]))
        per_language = [
            [language, f"{self.matrix[i][i]:.4f}", f"{_nanmean(self._others(i)):.4f}", f"{mul:.4f}", f"{distance:,.1f}"]
            for i, (language, mul, distance) in enumerate(
                zip(self.languages, self.mul_by_language, self.rank_distance_by_language, strict=True)
            )
        ]
        matrix = [[row, *(f"{x:.3f}" for x in xs)] for row, xs in zip(self.languages, self.matrix, strict=True)]
        tail = [f"Prompts: {self.prompts}" if self.prompts else ""]
        parts = [
            *head,
            "By query language:",
            _table(["query", "Mo", "Cr (mean)", "Mul", "rank distance"], per_language),
            "mAP by query language (row) and passage language (column):",
            _table(["", *self.languages], matrix),
            *tail,
        ]
        return "\n\n".join(part for part in parts if part) + "\n"

    def _others(self, row: int) -> np.ndarray:
        return np.delete(np.array(self.matrix[row], dtype=np.float64), row)


def summarise(ranks: Ranks, task: str, model: str = "", **extra: Any) -> Results:
    """All metrics of `ranks` as `Results`; `extra` fills its bias, prompts and seconds."""
    matrix, mul, distance = map_matrix(ranks), mul_map(ranks), rank_distance(ranks)
    off_diagonal = ~np.eye(len(matrix), dtype=bool)
    return Results(
        task=task,
        model=model,
        languages=list(ranks.languages),
        queries=len(ranks.query_languages),
        candidates=int(ranks.pool.sum()),
        mo=_macro(np.diag(matrix)),
        cr=_macro(matrix[off_diagonal]),
        mul=_macro(mul),
        rank_distance=_macro(distance),
        matrix=matrix.tolist(),
        mul_by_language=mul.tolist(),
        rank_distance_by_language=distance.tolist(),
        cutoffs={pool: cutoff_metrics(ranks, pool) for pool in ("own", "all")},
        **extra,
    )


def _by_language(per_query: np.ndarray, ranks: Ranks) -> np.ndarray:
    return np.array([_macro(per_query[ranks.query_languages == i]) for i in range(len(ranks.languages))])


def _macro(values: np.ndarray) -> float:
    return float(_nanmean(values))


def _nanmean(values: np.ndarray, axis: int | None = None) -> np.ndarray:
    """np.nanmean without its warning: the mean of nothing is NaN here by contract."""
    valid = ~np.isnan(values)
    return _divide(np.where(valid, values, 0).sum(axis=axis), valid.sum(axis=axis))


def _divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.divide(a, b, out=np.full(np.shape(a), np.nan), where=np.asarray(b) > 0)


def _map_floats(value: Any, change: Any) -> Any:
    if isinstance(value, dict):
        return {key: _map_floats(x, change) for key, x in value.items()}
    if isinstance(value, list):
        return [_map_floats(x, change) for x in value]
    return change(value) if isinstance(value, float) else value


def _map_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _map_nulls(x) for key, x in value.items()}
    if isinstance(value, list):
        return [_map_nulls(x) for x in value]
    return math.nan if value is None else value


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
