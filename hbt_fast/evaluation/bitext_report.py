"""What a bitext evaluation measured: means, tables, a picture, and files of all of it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hbt_fast.base.files import write_whole, writing
from hbt_fast.evaluation.fields import check_fields
from hbt_fast.evaluation.maps import BITEXT, heat_maps, new_figure, save, title_of
from hbt_fast.evaluation.queries import PerQuery
from hbt_fast.evaluation.tables import markdown_table, nanmean
from hbt_fast.fonts import fonts_for

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MEASURES = ("accuracy", "same text", "margin")
MATRIX = 30  # languages that a page's matrix has at most


@dataclass(frozen=True)
class BitextResults:
    """Accuracies of all directions. The lists run over the D directions.

    Args:
        task: name of the task.
        model: what was evaluated.
        sources: D languages of the sentences that look for their translation.
        targets: D languages among whose sentences they look.
        sentences: D numbers of sentences.
        measures: "accuracy" by line number, "same text" and "margin" (see `bitext.evaluate_bitext`), D values each.
        means: unweighted means over directions by what they are of ("into en", "out of en", "all directions", and the
            same within groups), each by measure. Directions between varieties of one language (en, en-GB) are in none.
        groups: languages by the name of their group.
        prompts: what was put before sources and targets.
        settings: of the encoder, such as precision and max_length.
        seconds: wall time by phase; "products" is that part of "search" which no exact search can do without.
        queries: every sentence's hits, for tests of significance; not in the JSON.
    """

    task: str
    model: str
    sources: list[str]
    targets: list[str]
    sentences: list[int]
    measures: dict[str, list[float]]
    means: dict[str, dict[str, float]]
    groups: dict[str, list[str]] = field(default_factory=dict)
    prompts: dict[str, str] = field(default_factory=dict)
    settings: dict[str, str | int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    queries: PerQuery | None = field(default=None, compare=False, repr=False)

    @property
    def languages(self) -> list[str]:
        """All languages, sorted."""
        return sorted({*self.sources, *self.targets})

    @property
    def pivot(self) -> str | None:
        """The language that is in the means "into" and "out of": that of all pairs, or English; None: neither."""
        return _pivot(self.sources, self.targets)

    def matrix(self, measure: str = "accuracy") -> np.ndarray:
        """(L, L) float64 by source and target in the order of `languages`; NaN where nothing was measured.

        Args:
            measure: one of `measures`.
        """
        place = {language: i for i, language in enumerate(self.languages)}
        values_LL = np.full((len(place), len(place)), np.nan)
        values_LL[[place[s] for s in self.sources], [place[t] for t in self.targets]] = self.measures[measure]
        return values_LL

    def to_json(self) -> str:
        """Strict JSON, a line per field; `from_json` gives equal results back."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "queries"}
        lines = [f" {json.dumps(name)}: {json.dumps(_nulls(value), allow_nan=False)}" for name, value in values.items()]
        return "{\n" + ",\n".join(lines) + "\n}\n"

    @classmethod
    def from_json(cls, text: str) -> BitextResults:
        """What `to_json` wrote.

        Args:
            text: of the file.

        Raises:
            ValueError: it is something else; says why.
        """
        try:
            values = json.loads(text)
            values["means"] = {
                name: {measure: math.nan if x is None else x for measure, x in mean.items()}
                for name, mean in values["means"].items()
            }
            results = cls(**values)
            check_fields(cls, values)
            lists = [results.sources, results.targets, results.sentences, *results.measures.values()]
        except (TypeError, LookupError, AttributeError, ValueError, RecursionError) as error:
            raise ValueError(f"not a bitext result file of hbt_fast.evaluate: {error}") from error
        if len({len(values) for values in lists}) > 1:
            raise ValueError("not a bitext result file of hbt_fast.evaluate: its lists differ in length")
        return results

    def headline(self) -> str:
        """The accuracies that such a task is reported by, on one line."""
        return "  ".join(f"{name} {mean['accuracy']:.4f}" for name, mean in self.means.items())

    def to_markdown(self) -> str:
        """The means, a line per language, and the matrix of up to 30 languages."""
        count = len(self.sources)
        low, high = min(self.sentences), max(self.sentences)
        sizes = f"{low:,}" if low == high else f"{low:,} to {high:,}"
        parts = [
            f"# {self.model or 'model'} on {self.task}",
            f"{len(self.languages)} languages, {count:,} directions, {sizes} sentences in each. Accuracy: the share of "
            "sentences whose nearest neighbour in the other language is their translation, by line number. Same text: "
            "a sentence with the same text as the translation counts as well. Margin: the ratio margin over 4 "
            "neighbours decides instead of the cosine. Means are over directions, all alike.",
            markdown_table(
                ["", *MEASURES], [[name, *(_number(mean[m]) for m in MEASURES)] for name, mean in self.means.items()]
            ),
            self._by_language(),
        ]
        if self._many and len(self.languages) <= MATRIX:
            rows = [
                [language, *("" if math.isnan(x) else _number(x, 3) for x in row)]
                for language, row in zip(self.languages, self.matrix(), strict=True)
            ]
            parts += ["Accuracy by source (rows) and target:", markdown_table(["", *self.languages], rows)]
        return "\n\n".join(parts) + "\n"

    @property
    def _many(self) -> bool:
        """Whether the languages are evaluated with each other, not only with one."""
        return any(self.pivot not in pair for pair in zip(self.sources, self.targets, strict=True))

    def _by_language(self) -> str:
        accuracy_LL, margin_LL = self.matrix(), self.matrix("margin")
        size = dict(zip(self.targets, self.sentences, strict=True)) | dict(
            zip(self.sources, self.sentences, strict=True)
        )
        rows = [(i, language) for i, language in enumerate(self.languages) if self._many or language != self.pivot]
        kin_LL = np.array([[are_varieties(a, b) for b in self.languages] for a in self.languages])
        columns: dict[str, np.ndarray] = {}
        for name, values_LL in (("", accuracy_LL), (", margin", margin_LL)):
            if self.pivot is not None:
                i = self.languages.index(self.pivot)
                columns |= {f"into {self.pivot}{name}": values_LL[:, i], f"out of {self.pivot}{name}": values_LL[i]}
            if self._many:
                others_LL = np.where(kin_LL, np.nan, values_LL)
                columns |= {f"as source{name}": nanmean(others_LL, 1), f"as target{name}": nanmean(others_LL, 0)}
        return markdown_table(
            ["language", "sentences", *columns],
            [[name, f"{size[name]:,}", *(_number(values[i]) for values in columns.values())] for i, name in rows],
        )

    def write(self, out: str | Path) -> list[Path]:
        """Writes OUT.json, OUT.md, OUT.png and, if they are known, OUT.queries.npz; returns their paths.

        Args:
            out: path whose suffix is replaced; its folder is made if need be.

        Raises:
            FileError: they cannot be written.
        """
        out = Path(out)
        paths = [out.with_suffix(suffix) for suffix in (".json", ".md", ".png")]
        picture = f"\n![accuracy by languages]({paths[2].name})\n"
        with writing(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            write_whole(paths[0], self.to_json())
            write_whole(paths[1], self.to_markdown() + picture)
            if self.queries is not None:
                paths.append(self.queries.write(out.with_suffix(".queries.npz")))
            with fonts_for([self.task, self.model]):
                draw(self, paths[2])
        return paths


def macro_means(
    sources: list[str], targets: list[str], measures: dict[str, list[float]], groups: dict[str, list[str]]
) -> dict[str, dict[str, float]]:
    """Unweighted means over directions: into and out of the pivot, all, and the same of each group.

    Args:
        sources: D languages.
        targets: D languages.
        measures: D values each.
        groups: languages by the name of their group. Its means into and out of the pivot are over its languages, the
            one "within" it is over the directions between two of them.
    """
    return {
        name: {m: float(nanmean(np.where(mask, values, np.nan), 0)) for m, values in measures.items()}
        for name, mask in averaged_directions(sources, targets, groups).items()
    }


def averaged_directions(
    sources: Sequence[str], targets: Sequence[str], groups: Mapping[str, Sequence[str]]
) -> dict[str, np.ndarray]:
    """(D,) bool, the directions that each of `macro_means` is over.

    Args:
        sources: D languages.
        targets: D languages.
        groups: languages by the name of their group.
    """
    pivot = _pivot(sources, targets)
    source_D, target_D = np.array(sources), np.array(targets)
    counts_D = np.array([not are_varieties(s, t) for s, t in zip(sources, targets, strict=True)])
    masks = {}
    if pivot is not None:
        masks |= {f"into {pivot}": target_D == pivot, f"out of {pivot}": source_D == pivot}
    masks["all directions"] = np.ones(len(sources), dtype=bool)
    for group, languages in groups.items():
        source, target = np.isin(source_D, languages), np.isin(target_D, languages)
        if pivot is not None:
            masks |= {
                f"{group}: into {pivot}": source & (target_D == pivot),
                f"{group}: out of {pivot}": target & (source_D == pivot),
            }
        if (source & target).any():
            masks[f"{group}: within"] = source & target
    return {name: mask & counts_D for name, mask in masks.items()}


def draw(results: BitextResults, path: str | Path) -> None:
    """A heat map by source and target; if all pairs share a language, bars by the other one instead.

    Args:
        results: what was measured.
        path: PNG file to write.
    """
    n = len(results.languages)
    figures = [f"{name} {mean['accuracy']:.3f}" for name, mean in list(results.means.items())[:3]]
    title = title_of(f"{results.model or 'accuracy'} on {results.task}", n, figures)
    if results._many:
        figure = _heat_map(title, results)
    else:
        figure, axis = new_figure(7.5, max(0.2 * n + 1.6, 3.5))
        _bars(axis, results)
        axis.set_title(title, fontsize=10, loc="left")
    save(figure, path)


def _heat_map(title: str, results: BitextResults) -> Figure:
    """Languages in the order of their mean, so that what is hard lies together."""
    accuracy_LL = results.matrix()
    mean_L = np.nan_to_num((nanmean(accuracy_LL, 0) + nanmean(accuracy_LL, 1)) / 2)
    order = np.argsort(-mean_L, kind="stable")
    cells, names = accuracy_LL[np.ix_(order, order)], [results.languages[i] for i in order]
    low = np.nanmin(cells)
    limits = 0.0 if low < 0.5 else math.floor(10 * low) / 10, 1.0
    return heat_maps([title], names, names, cells[None], "accuracy", axes_names=BITEXT, limits=limits)


def _bars(axis: Axes, results: BitextResults) -> None:
    """Both directions of every pair, the best on top."""
    pivot = results.pivot
    cells, place = results.matrix(), {language: i for i, language in enumerate(results.languages)}
    p = place[pivot]
    others = sorted((name for name in place if name != pivot), key=lambda x: cells[place[x], p] + cells[p, place[x]])
    y = np.arange(len(others))
    for values, shift, label, colour in (
        ([cells[place[x], p] for x in others], 0.2, f"into {pivot}", "#225ea8"),
        ([cells[p, place[x]] for x in others], -0.2, f"out of {pivot}", "#7fcdbb"),
    ):
        axis.barh(y + shift, values, height=0.38, label=label, color=colour)
    for i, name in enumerate(others):
        both = f"{100 * cells[place[name], p]:.1f}  {100 * cells[p, place[name]]:.1f}"
        axis.text(1.01, i, both, va="center", fontsize=7, transform=axis.get_yaxis_transform())
    axis.set_yticks(y, others, fontsize=8)
    axis.set_ylim(-0.6, len(others) - 0.4)
    axis.set_xlim(0, 1)
    axis.set_xlabel("accuracy; right of the bars in %, into and out of")
    axis.tick_params(axis="y", length=0)
    axis.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2, fontsize=8, frameon=False)
    for spine in ("top", "right", "left"):
        axis.spines[spine].set_visible(False)


def are_varieties(a: str, b: str) -> bool:
    """Whether two codes are of one language, as en and en-GB.

    Args:
        a: a code.
        b: another.
    """
    return a.partition("-")[0] == b.partition("-")[0]


def _pivot(sources: Sequence[str], targets: Sequence[str]) -> str | None:
    shared = set.intersection(*({s, t} for s, t in zip(sources, targets, strict=True)))
    english = sorted(name for name in {*sources, *targets} if name.partition("-")[0] == "en")
    candidates = [name for name in english if name in shared] or sorted(shared) or english
    return candidates[0] if candidates else None  # "en" before "en-GB"


def _number(value: float, places: int = 4) -> str:
    return "-" if math.isnan(value) else f"{value:.{places}f}"


def _nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _nulls(x) for key, x in value.items()}
    if isinstance(value, list):
        return [_nulls(x) for x in value]
    return None if isinstance(value, float) and math.isnan(value) else value
