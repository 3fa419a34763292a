"""Results on disk: JSON, a Markdown page, a picture, and every measure of every query.

The picture is a heat map of mAP by query language and passage language; where answers are in the language of their
question only, bars by language.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from hbt_fast.evaluation.queries import PerQuery
from hbt_fast.evaluation.results import NAMES, Results


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
    """
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    paths = [out.with_suffix(suffix) for suffix in (".json", ".md", ".png")]
    paths[0].write_text(results.to_json(), encoding="utf-8")
    page = results.to_markdown()
    if before is not None:
        page += "\n" + comparison(before, results)
    what = "mAP by query and passage language" if results.parallel else "results by language"
    page += f"\n![{what}]({paths[2].name})\n"
    paths[1].write_text(page, encoding="utf-8")
    draw = heat_map if results.parallel else language_bars
    draw(results, paths[2], before)
    return paths if per_query is None else [*paths, per_query.write(out.with_suffix(".queries.npz"))]


def comparison(before: Results, after: Results) -> str:
    """A Markdown table of the headline figures before and after."""
    old, new = before.figures(), after.figures()
    names = [name for name in new if name in old]
    rows = {"before": old, "after": new, "change": {name: new[name] - old[name] for name in names}}
    lines = [["", *(NAMES.get(name, name) for name in names)], ["---", *["---:"] * len(names)]]
    for row, values in rows.items():
        sign = "+" if row == "change" else ""
        forms = [f"{sign},.1f" if name == "rank_distance" else f"{sign}.4f" for name in names]
        lines.append([row, *(format(values[name], form) for name, form in zip(names, forms, strict=True))])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


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
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = [name for name in ("ndcg@10", "recall@100", "mrr@10") if results.of_language(name)]
    rows = np.arange(len(results.languages))
    figure = Figure(figsize=(2.2 + 2.4 * max(len(names), 1), 1.5 + 0.32 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = [("", results, "#2b7bba", 0.0)]
    if before is not None:
        panels = [("before", before, "#a9cbe4", -0.2), ("after", results, "#2b7bba", 0.2)]
    for axis, name in zip(figure.subplots(1, max(len(names), 1), squeeze=False, sharey=True)[0], names, strict=False):
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
    axis.set_yticks(rows, results.languages)
    axis.set_ylim(len(rows) - 0.4, -0.6)
    if before is not None:
        axis.legend(fontsize=8, frameon=False, loc="lower right")
    figure.suptitle(f"{_short(results.model) or 'model'} on {results.task}", fontsize=10, x=0.01, ha="left")
    figure.savefig(path, dpi=150)


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
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [results] if before is None else [before, results]
    n = len(results.languages)
    side = min(max(1.4 + 0.5 * n, 4.2), 16.0)  # below 4.2 inches the title does not fit
    figure = Figure(figsize=((side + 0.9) * len(panels) + 0.8, side + 1.0), layout="constrained")
    FigureCanvasAgg(figure)  # draws to a file whatever backend the program uses
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    values = np.concatenate([_cells(panel) for panel in panels])
    low, high = (np.nanmin(values), np.nanmax(values)) if np.isfinite(values).any() else (0.0, 1.0)
    if high - low < 0.05:  # nearly equal cells should look nearly equal
        low, high = max(0.0, high - 0.05), high
    for axis, panel, when in zip(axes, panels, ("before", "after") if before else ("",), strict=True):
        image = _panel(axis, panel, low, high, font=max(5.0, min(8.5, 110 / max(n, 1))))
        name = ": ".join(part for part in dict.fromkeys((when, _short(panel.model))) if part) or "mAP"
        figures = [
            f"{NAMES[key]} {value:,.0f}" if key == "rank_distance" else f"{NAMES[key]} {value:.3f}"
            for key, value in panel.figures().items()
        ]
        axis.set_title(f"{name}\n{'   '.join(figures)}", fontsize=10, loc="left")
    axes[0].set_ylabel("query language")
    bar = figure.colorbar(image, ax=list(axes), shrink=0.85, pad=0.015, aspect=30)
    bar.outline.set_visible(False)
    bar.set_label(f"mAP, {results.task}")
    figure.savefig(path, dpi=150)


def _same_languages(before: Results | None, results: Results) -> None:
    if before is not None and before.languages != results.languages:
        raise ValueError(f"before has languages {before.languages}, after {results.languages}: they must be equal")


def _short(model: str) -> str:
    return model if len(model) <= 40 else "…" + model[-39:]


def _cells(results: Results) -> np.ndarray:
    """(L, L + 1): the matrix, and mAP in the whole pool as the last column."""
    return np.column_stack([np.array(results.matrix, dtype=float), np.array(results.mul_by_language, dtype=float)])


def _panel(axis, results: Results, low: float, high: float, font: float):  # noqa: ANN001
    n, gap = len(results.languages), 0.3
    left = [*range(n), n + gap]
    cells = _cells(results)
    mesh_x = np.concatenate([np.arange(n + 1) - 0.5, [n - 0.5 + gap, n + 0.5 + gap]])
    # The gap is a column of its own, left blank, that sets the whole pool apart from the single languages.
    with_gap = np.column_stack([cells[:, :n], np.full(n, np.nan), cells[:, n]])
    image = axis.pcolormesh(
        mesh_x, np.arange(n + 1) - 0.5, np.ma.masked_invalid(with_gap), cmap="YlGnBu", vmin=low, vmax=high,
        edgecolors="white", linewidth=1.0,
    )  # fmt: skip
    for (row, column), value in np.ndenumerate(cells):
        dark = (value - low) / (high - low) > 0.55
        text = "-" if np.isnan(value) else f"{value:.2f}".lstrip("0")
        weight = "bold" if row == column else "normal"
        axis.text(
            left[column], row, text, ha="center", va="center", fontsize=font, color="white" if dark else "#222",
            fontweight=weight,
        )  # fmt: skip
    axis.set_xticks(left, [*results.languages, "all"])
    axis.set_yticks(range(n), results.languages)
    axis.set_xlabel('passage language ("all": the pool of all languages)')
    axis.tick_params(length=0)
    axis.set_ylim(n - 0.5, -0.5)
    axis.set_aspect("equal")
    for spine in axis.spines.values():
        spine.set_visible(False)
    return image
