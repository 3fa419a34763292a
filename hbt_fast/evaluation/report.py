"""Results on disk: JSON, a Markdown page, and a heat map of mAP by query language and passage language."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from hbt_fast.evaluation.metrics import Results


def write_report(results: Results, out: str | Path, before: Results | None = None) -> list[Path]:
    """Writes OUT.json, OUT.md and OUT.png (the suffix of `out` is replaced).

    Args:
        results: what was measured.
        out: path; its folder is made if need be.
        before: an earlier evaluation on the same languages; page and plot then show both and the change.

    Returns:
        the three paths.
    """
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    paths = [out.with_suffix(suffix) for suffix in (".json", ".md", ".png")]
    paths[0].write_text(results.to_json(), encoding="utf-8")
    page = results.to_markdown()
    if before is not None:
        page += "\n" + comparison(before, results)
    page += f"\n![mAP by query and passage language]({paths[2].name})\n"
    paths[1].write_text(page, encoding="utf-8")
    heat_map(results, paths[2], before)
    return paths


def comparison(before: Results, after: Results) -> str:
    """A Markdown table of the headline figures before and after."""
    lines = ["| | Mo | Cr | Mul | rank distance |", "| --- | ---: | ---: | ---: | ---: |"]
    for name, r in (("before", before), ("after", after)):
        lines.append(f"| {name} | {r.mo:.4f} | {r.cr:.4f} | {r.mul:.4f} | {r.rank_distance:,.1f} |")
    change = [f"{getattr(after, key) - getattr(before, key):+.4f}" for key in ("mo", "cr", "mul")]
    lines.append(f"| change | {' | '.join(change)} | {after.rank_distance - before.rank_distance:+,.1f} |")
    return "\n".join(lines) + "\n"


def heat_map(results: Results, path: str | Path, before: Results | None = None) -> None:
    """Draws mAP by query language (rows) and passage language (columns), with the whole pool as a column of its own.

    Args:
        results: what was measured.
        path: PNG file to write.
        before: drawn on the left on the same colour scale.

    Raises:
        ValueError: `before` has other languages.
    """
    if before is not None and before.languages != results.languages:
        raise ValueError(f"before has languages {before.languages}, after {results.languages}: they must be equal")
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
        model = panel.model if len(panel.model) <= 40 else "…" + panel.model[-39:]
        name = ": ".join(part for part in dict.fromkeys((when, model)) if part) or "mAP"
        axis.set_title(
            f"{name}\nMo {panel.mo:.3f}   Cr {panel.cr:.3f}   Mul {panel.mul:.3f}   "
            f"rank distance {panel.rank_distance:,.0f}",
            fontsize=10,
            loc="left",
        )
    axes[0].set_ylabel("query language")
    bar = figure.colorbar(image, ax=list(axes), shrink=0.85, pad=0.015, aspect=30)
    bar.outline.set_visible(False)
    bar.set_label(f"mAP, {results.task}")
    figure.savefig(path, dpi=150)


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
