"""Results on disk: JSON, a Markdown page, a picture, and every measure of every query.

The picture is a heat map of mAP by query language and passage language; where answers are in the language of their
question only, bars by language.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from hbt_fast.base.files import write_whole, writing
from hbt_fast.evaluation.maps import heat_maps, new_figure, save, short, title_of
from hbt_fast.evaluation.queries import PerQuery
from hbt_fast.evaluation.results import NAMES, Results
from hbt_fast.evaluation.tables import markdown_table
from hbt_fast.fonts import fonts_for


def write_report(
    results: Results, out: str | Path, before: Results | None = None, per_query: PerQuery | None = None
) -> list[Path]:
    """Writes OUT.json, OUT.md and OUT.png (the suffix of `out` is replaced), and OUT.queries.npz.

    Args:
        results: what was measured.
        out: path; its folder is made if need be.
        before: an earlier evaluation on the same languages; page and plot then show both and the change.
        per_query: the same query by query, for `hbt_fast.compare`; None: no .queries.npz is written.

    Returns:
        the paths.

    Raises:
        FileError: they cannot be written.
    """
    out = Path(out)
    paths = [out.with_suffix(suffix) for suffix in (".json", ".md", ".png")]
    page = results.to_markdown()
    if before is not None:
        page += "\n" + comparison(before, results)
    what = "mAP by query and passage language" if results.parallel else "results by language"
    page += f"\n![{what}]({paths[2].name})\n"
    draw = heat_map if results.parallel else language_bars
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(paths[0], results.to_json())
        write_whole(paths[1], page)
        if per_query is not None:
            paths.append(per_query.write(out.with_suffix(".queries.npz")))
        with fonts_for([results.task, results.model, before.model if before else ""]):
            draw(results, paths[2], before)
    return paths


def comparison(before: Results, after: Results) -> str:
    """A Markdown table of the headline figures before and after."""
    old, new = before.figures(), after.figures()
    names = [name for name in new if name in old]
    rows = {"before": old, "after": new, "change": {name: new[name] - old[name] for name in names}}
    lines = []
    for row, values in rows.items():
        sign = "+" if row == "change" else ""
        forms = [f"{sign},.1f" if name == "rank_distance" else f"{sign}.4f" for name in names]
        lines.append([row, *(format(values[name], form) for name, form in zip(names, forms, strict=True))])
    return markdown_table(["", *(NAMES.get(name, name) for name in names)], lines) + "\n"


def language_bars(results: Results, path: str | Path, before: Results | None = None) -> None:
    """Draws nDCG@10 and MRR@10 or Recall@100 by query language as bars.

    Args:
        results: what was measured.
        path: PNG file to write.
        before: drawn beside, paler.

    Raises:
        ValueError: `before` has other languages.
    """
    _same_languages(before, results)
    names = [name for name in ("ndcg@10", "recall@100", "mrr@10") if results.of_language(name)]
    rows = np.arange(len(results.languages))
    figure, axes = new_figure(2.2 + 2.4 * max(len(names), 1), 1.5 + 0.32 * len(rows), 1, max(len(names), 1))
    panels = [("", results, "#2b7bba", 0.0)]
    if before is not None:
        panels = [("before", before, "#a9cbe4", -0.2), ("after", results, "#2b7bba", 0.2)]
    for axis, name in zip(np.ravel(axes), names, strict=False):
        for label, panel, colour, shift in panels:
            values = np.array(panel.of_language(name), dtype=float)
            axis.barh(rows + shift, values, height=0.74 / len(panels), color=colour, label=label)
            for row, value in zip(rows, values, strict=True):
                if np.isfinite(value):
                    axis.text(value + 0.01, row + shift, f"{value:.3f}", va="center", fontsize=8, color="#222")
        axis.set_title(NAMES[name], fontsize=10, loc="left")
        axis.set_xlim(0, 1.14)
        axis.set_xticks([0, 0.5, 1])
        axis.tick_params(length=0)
        for side in ("top", "right", "left"):
            axis.spines[side].set_visible(False)
        axis.set_yticks(rows, results.languages if axis is np.ravel(axes)[0] else [])
        axis.set_ylim(len(rows) - 0.4, -0.6)
    if before is not None:
        axis.legend(fontsize=8, frameon=False, loc="lower right")
    figure.suptitle(f"{short(results.model) or 'model'} on {results.task}", fontsize=10, x=0.01, ha="left")
    save(figure, path)


def heat_map(results: Results, path: str | Path, before: Results | None = None) -> None:
    """Draws mAP by query language (rows) and passage language (columns), with the whole pool as a column of its own.

    Args:
        results: what was measured.
        path: PNG file to write.
        before: drawn on the left on the same colour scale.

    Raises:
        ValueError: `before` has other languages.
    """
    _same_languages(before, results)
    panels = {"": results} if before is None else {"before": before, "after": results}
    columns = [*results.languages, "all"]
    titles, cells = [], []
    for when, panel in panels.items():
        figures = [
            f"{NAMES[key]} {value:,.0f}" if key == "rank_distance" else f"{NAMES[key]} {value:.3f}"
            for key, value in panel.figures().items()
        ]
        said = when and not panel.model.startswith(when)  # a run's evaluation is called "before training" already
        name = ": ".join(filter(None, [when if said else "", panel.model])) or "mAP"
        titles.append(title_of(name, len(columns), figures))
        cells.append(np.column_stack([np.array(panel.matrix, float), np.array(panel.mul_by_language, float)]))
    save(heat_maps(titles, results.languages, columns, np.stack(cells), f"mAP, {results.task}"), path)


def _same_languages(before: Results | None, results: Results) -> None:
    if before is not None and before.languages != results.languages:
        raise ValueError(f"before has languages {before.languages}, after {results.languages}: they must be equal")
