"""What an evaluation measured, as JSON and as a Markdown page. The measures themselves are in `metrics`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from hbt_fast.evaluation.fields import check_fields
from hbt_fast.evaluation.tables import markdown_table, nanmean

NAMES = {
    "mo": "Mo", "cr": "Cr", "mul": "Mul", "map": "mAP", "rank_distance": "rank distance",
    "ndcg@10": "nDCG@10", "recall@100": "Recall@100", "mrr@10": "MRR@10",
}  # fmt: skip
_PAPER = ("mo", "cr", "mul", "rank_distance")


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
        cutoffs: nDCG@10, Recall@100, MRR@10 by pool: "own" and "all", or "re-ranking".
        bias: accuracy@1 and the share of the top results in the query's own language, see `bias.language_bias`.
        prompts: what was put before queries and passages.
        settings: of the encoder and the search, such as precision and max_length.
        seconds: wall time by phase.
        by_language: measure -> its mean over the queries of each language; "cr" is the mean over the other languages.
        groups: group of languages -> measure -> macro mean over the languages of the group.
        group_languages: group of languages -> its query languages.
        left_out: queries of the data without a relevant candidate, which nothing can be measured with.
        notes: lines for the reader: the index that was searched, the split, and the like.
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
    settings: dict[str, str | int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    by_language: dict[str, list[float]] = field(default_factory=dict)
    groups: dict[str, dict[str, float]] = field(default_factory=dict)
    group_languages: dict[str, list[str]] = field(default_factory=dict)
    left_out: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def parallel(self) -> bool:
        """Whether a query has relevant candidates in other languages than its own: Mo, Cr, Mul are what counts then."""
        return math.isfinite(self.cr) or math.isfinite(self.rank_distance)

    def value(self, name: str) -> float:
        """A measure by its name: "mo", "cr", "mul", "rank_distance", or a cut-off in the own pool (or re-ranking)."""
        if name in _PAPER:
            return getattr(self, name)
        own = self.cutoffs.get("own") or self.cutoffs.get("re-ranking") or {}
        return own.get(name, math.nan)

    def figures(self) -> dict[str, float]:
        """What such a task is reported by, of what was measured: Mo, Cr, Mul, rank distance; or cut-offs and mAP."""
        if self.parallel:
            found = {name: getattr(self, name) for name in _PAPER}
        else:
            found = {**next(iter(self.cutoffs.values()), {}), "map": self.mo}
            found |= {"map": self.cutoffs["re-ranking"]["map"]} if "re-ranking" in self.cutoffs else {}
        return {name: value for name, value in found.items() if math.isfinite(value)}

    def headline(self) -> str:
        """The figures in one line, and in a second one those of the pool of all languages if the first has them not."""
        figures = self.figures()
        distance = [f"RD {figures.pop('rank_distance'):.1f}"] if "rank_distance" in figures else []
        line = "  ".join([*(f"{NAMES.get(name, name)} {x:.4f}" for name, x in figures.items()), *distance])
        if self.parallel or "all" not in self.cutoffs or len(self.languages) == 1:
            return line
        whole = {**self.cutoffs["all"], "map": self.mul}
        return (
            f"{line}\n"
            + "  ".join(f"{NAMES.get(name, name)} {x:.4f}" for name, x in whole.items())
            + ("  (pool of all languages)")
        )

    def to_json(self) -> str:
        """Strict JSON (NaN becomes null); `from_json` gives equal results back."""
        return json.dumps(_map_floats(asdict(self), lambda x: None if math.isnan(x) else x), indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Results:
        """Reads what `to_json` wrote, now or in an earlier version; raises ValueError with the reason on all else."""
        no = "not a result file of hbt_fast.evaluate"
        try:
            values = _map_nulls(json.loads(text))
            results = cls(**values)
        except (TypeError, RecursionError) as error:
            raise ValueError(f"{no}: {error}") from error
        check_fields(cls, values)
        count = len(results.languages)
        lists = [results.matrix, *results.matrix, results.mul_by_language, results.rank_distance_by_language]
        if any(len(values) not in (0, count) for values in (*lists, *results.by_language.values())):
            raise ValueError(f"{no}: its lists differ in length")
        return results

    def to_markdown(self) -> str:
        """The tables of what there is: headline, groups, query languages, mAP by query and passage language."""
        n = len(self.languages)
        said = f"{self.queries:,} queries, {self.candidates:,} candidates, {n} language{'s' * (n > 1)}."
        if self.left_out:
            said += f" {self.left_out:,} further queries have no relevant candidate (judged 0 or not at all, as those "
            said += "of other splits) and are left out."
        single = n == 1 and not self.parallel
        parts = [
            f"# {self.model or 'model'} on {self.task}",
            said + (" mAP over the full ranking." if self._has("mo") or self._has("cr") else ""),
            markdown_table(["mAP"], [[_number("mo", self.mo)]]) * self._has("mo")
            if single
            else self._columns(_PAPER, [("", lambda name: getattr(self, name))]),
            self._cutoffs(single),
            markdown_table(list(self.bias), [[_number(name, x) for name, x in self.bias.items()]]) if self.bias else "",
            self._groups(),
            "" if single else self._by_language(),
            self._pairs(),
            *self.notes,
            f"Prompts: {self.prompts}" if self.prompts else "",
            f"Settings: {self.settings}" if self.settings else "",
        ]
        return "\n\n".join(part for part in parts if part) + "\n"

    def of_language(self, name: str) -> list[float]:
        """A measure by query language; empty if there is none of this name.

        Args:
            name: such as "mo", "cr" (the mean over the other languages), "ndcg@10".
        """
        if name in self.by_language:
            return self.by_language[name]
        old = {"mul": self.mul_by_language, "rank_distance": self.rank_distance_by_language}
        if name in ("mo", "cr") and self.matrix:
            cells = np.array(self.matrix, dtype=np.float64)
            own = np.eye(len(cells), dtype=bool)
            return [nanmean(row[mask]) for row, mask in zip(cells, own if name == "mo" else ~own, strict=True)]
        return old.get(name, [])

    def _has(self, name: str) -> bool:
        return math.isfinite(getattr(self, name))

    def _columns(
        self, names: Iterable[str], rows: Sequence[tuple[str, Callable[[str], float]]], corner: str = ""
    ) -> str:
        """A table with those measures as columns that some row has; with one unnamed row, without row names."""
        there = [name for name in names if any(math.isfinite(get(name)) for _, get in rows)]
        if not there:
            return ""
        body = [[_number(name, get(name)) for name in there] for _, get in rows]
        header = ["Cr (mean)" if name == "cr" and corner == "query" else NAMES.get(name, name) for name in there]
        if len(rows) > 1 or rows[0][0]:
            header, body = [corner, *header], [[row, *cells] for (row, _), cells in zip(rows, body, strict=True)]
        return markdown_table(header, body)

    def _cutoffs(self, single: bool) -> str:
        pools = {pool: values for pool, values in self.cutoffs.items() if not (single and pool == "all")}
        if not pools:
            return ""
        names = list(dict.fromkeys(name for values in pools.values() for name in values))
        if len(pools) == 1:  # then there is only one pool to speak of
            return self._columns(names, [("", _getter(next(iter(pools.values()))))])
        return self._columns(names, [(pool, _getter(values)) for pool, values in pools.items()], "pool")

    def _groups(self) -> str:
        if not self.groups:
            return ""
        names = list(dict.fromkeys(name for values in self.groups.values() for name in values))
        rows = [(group, _getter(values)) for group, values in self.groups.items()]
        members = "; ".join(f"{group} ({', '.join(codes)})" for group, codes in self.group_languages.items())
        of = f": {members}" if members else ""
        return f"Macro means over groups of query languages{of}:\n\n" + self._columns(names, rows, "group")

    def _by_language(self) -> str:
        rows = [
            (language, lambda name, i=i: (self.of_language(name) or [math.nan] * len(self.languages))[i])
            for i, language in enumerate(self.languages)
        ]
        rest = [name for name in self.by_language if name not in _PAPER]
        tables = [self._columns(names, rows, "query") for names in (_PAPER, rest)]
        return "\n\n".join(["By query language:", *(table for table in tables if table)]) if any(tables) else ""

    def _pairs(self) -> str:
        if not math.isfinite(self.cr):
            return ""
        rows = [[row, *(_number("", x, 3) for x in xs)] for row, xs in zip(self.languages, self.matrix, strict=True)]
        table = markdown_table(["", *self.languages], rows)
        return f"mAP by query language (row) and passage language (column):\n\n{table}"


def _getter(values: dict[str, float]) -> Callable[[str], float]:
    return lambda name: values.get(name, math.nan)


def _number(name: str, value: float, places: int = 4) -> str:
    if math.isnan(value):
        return "-"
    return f"{value:,.1f}" if name == "rank_distance" else f"{value:.{places}f}"


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
