"""A comparison as pictures: language pairs, settings with intervals, rank distance against mAP, learning curves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hbt_fast.charts import PALETTE
from hbt_fast.evaluation.compare import Comparison
from hbt_fast.evaluation.compare_report import CUTOFFS, PARALLEL, label, main_measures
from hbt_fast.evaluation.compared import Run
from hbt_fast.evaluation.maps import BITEXT, RETRIEVAL, heat_maps, new_figure, save, short, title_of
from hbt_fast.fonts import fonts_for

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKERS = "osD^vPX*"
NAMED = 40  # points that are named at most


Curve = dict[str, list[tuple[int, dict[str, float]]]]  # task -> steps done and the measures then, in order


def draw_all(comparison: Comparison, runs: Sequence[Run], curves: Sequence[Curve], folder: Path) -> list[Path]:
    """Draws what these runs have to show, as PNG files; returns their paths.

    Args:
        comparison: of the runs.
        runs: R.
        curves: R, evaluations of training runs, see `compare.learning_curve`; empty for a result file alone.
        folder: to write to; it exists.

    Warns:
        UserWarning: no installed font has some of the characters of names.
    """
    with fonts_for([comparison.task, *comparison.names, *comparison.languages]):
        figures = {"settings": draw_settings(comparison)}
        if all(run.pairs is not None for run in runs):
            rows, columns, _ = runs[0].pairs
            cells_RXY = np.stack([run.pairs[2] for run in runs])
            figures["heat-maps"] = draw_pairs(comparison, rows, columns, cells_RXY)
            figures["heat-maps-difference"] = draw_pair_differences(comparison, rows, columns, cells_RXY)
        if "mul" in comparison.measures and "rank_distance" in comparison.measures:
            figures["rank-distance"] = draw_distances(comparison)
        more_than_ends = any(sum(map(len, curve.values())) > 2 for curve in curves)
        if more_than_ends and _measured(curves):
            figures["learning-curves"] = draw_curves(comparison.names, curves, comparison.task)
        paths = []
        for name, figure in figures.items():
            paths.append(folder / f"{name}.png")
            save(figure, paths[-1])
    return paths


def draw_pairs(c: Comparison, rows: list[str], columns: list[str], cells_RXY: np.ndarray) -> Figure:
    """A heat map by language pair for every run, on one colour scale.

    Args:
        c: what was compared.
        rows: X names.
        columns: Y names.
        cells_RXY: values; NaN is left blank.
    """
    titles = [
        title_of(
            name, len(columns), [f"{label(m)} {_brief(m, c.measures[m].values[run, 0])}" for m in main_measures(c)]
        )
        for run, name in enumerate(c.names)
    ]
    what = f"{_paired(c)}, {short(c.task)}"
    return heat_maps(titles, rows, columns, cells_RXY, what, axes_names=_axes_names(columns))


def draw_pair_differences(c: Comparison, rows: list[str], columns: list[str], cells_RXY: np.ndarray) -> Figure:
    """Differences of the other runs to the first, in hundredths, on one colour scale.

    Args:
        c: what was compared.
        rows: X names.
        columns: Y names.
        cells_RXY: values; NaN is left blank.
    """
    points = 100 * (cells_RXY[1:] - cells_RXY[:1])
    far = max(np.nanmax(np.abs(points)) if np.isfinite(points).any() else 0.0, 1.0)
    first = title_of(c.names[0], len(columns))
    titles = [f"{title_of(name, len(columns))}\n− {first}" for name in c.names[1:]]
    what = f"difference in {_paired(c)}, × 100, {short(c.task)}"
    style = {"limits": (-far, far), "colours": "RdBu", "form": "{:+.1f}"}
    return heat_maps(titles, rows, columns, points, what, axes_names=_axes_names(columns), **style)


def _axes_names(columns: list[str]) -> tuple[str, str]:
    return RETRIEVAL if columns[-1] == "all" else BITEXT


def _brief(measure: str, value: float) -> str:
    return f"{value:,.0f}" if measure == "rank_distance" else f"{value:.3f}"


def _paired(c: Comparison) -> str:
    return "mAP" if "cr" in c.measures else label(main_measures(c)[0])


def draw_settings(c: Comparison) -> Figure:
    """Bars of the main measures that lie between 0 and 1, with intervals.

    Args:
        c: what was compared.
    """
    names = [name for name in main_measures(c) if name != "rank_distance"]
    runs, width = len(c.names), 0.8 / len(c.names)
    figure, axes = new_figure(max(5.5, 1.2 + 0.42 * len(names) * (runs + 1)), 4.6)
    top = 0.0
    for run, (colour, name) in enumerate(zip(_colours(runs), c.names, strict=True)):
        values = np.array([c.measures[m].values[run, 0] for m in names])
        ends = np.array([c.measures[m].intervals[run, 0] for m in names])
        x = np.arange(len(names)) + (run - (runs - 1) / 2) * width
        axes.bar(x, values, 0.92 * width, color=colour, label=short(name))
        highs = values
        if not np.isnan(ends).any():
            highs = ends[:, 1]
            axes.errorbar(x, values, np.abs(ends.T - values), fmt="none", ecolor="#222", elinewidth=1, capsize=2)
        top = max(top, np.nanmax(highs))
        for place, value, high in zip(x, values, highs, strict=True):
            axes.annotate(
                f"{value:.3f}".lstrip("0"), (place, high), (0, 3), textcoords="offset points", ha="center", fontsize=7.5
            )
    axes.set_xticks(range(len(names)), [label(m) for m in names])
    axes.set_xlim(-0.5, len(names) - 0.5)
    axes.set_ylim(0, 1.08 * top or 1)
    axes.set_ylabel("mAP" if set(names) <= set(PARALLEL) else "")
    axes.tick_params(axis="x", length=0)
    _finish(figure, axes, c, runs)
    return figure


def draw_distances(c: Comparison) -> Figure:
    """Rank distance against mAP in the pool of all languages: of every run with intervals, and faintly by language.

    Args:
        c: what was compared.
    """
    figure, axes = new_figure(8.4, 5.6)
    runs, codes, bars = len(c.names), [], []
    for run, (colour, name) in enumerate(zip(_colours(runs), c.names, strict=True)):
        x, y = (c.measures[m].values[run] for m in ("rank_distance", "mul"))
        parts = list(c.language_columns.values())
        axes.plot(x[parts], y[parts], MARKERS[run % len(MARKERS)], color=colour, alpha=0.35, markersize=3.5, mew=0)
        codes += [(a, b, code, colour) for a, b, code in zip(x[parts], y[parts], c.languages, strict=True) if a == a]
        ends = [c.measures[m].intervals[run, 0] for m in ("rank_distance", "mul")]
        if not np.isnan(ends).any():
            across, along = (np.abs(e - v)[:, None] for e, v in zip(ends, (x[0], y[0]), strict=True))
            bars += [(*(ends[0]), y[0], y[0]), (x[0], x[0], *(ends[1]))]
            axes.errorbar(x[0], y[0], along, across, fmt="none", ecolor=colour, elinewidth=1.4, capsize=2.5)
        axes.plot(
            x[0],
            y[0],
            MARKERS[run % len(MARKERS)],
            color=colour,
            markersize=9,
            mec="white",
            label=short(name),
            zorder=5,
        )
    axes.set_xlabel("rank distance (lower is better)")
    axes.set_ylabel("mAP, pool of all languages")
    axes.grid(color="#e6eaef", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.margins(0.06)
    _finish(figure, axes, c, runs, "large: all languages; small: each query language")
    if len(codes) <= NAMED:
        _name_points(figure, axes, codes, bars)
    return figure


def draw_curves(names: Sequence[str], curves: Sequence[Curve], task: str) -> Figure:
    """The evaluations of training runs over their steps, a panel for each measure.

    Args:
        names: R.
        curves: R; of each the first task is a line, another one marks without a line.
        task: its name.
    """
    from matplotlib.ticker import MaxNLocator

    there = _measured(curves)
    figure, axes = new_figure(9.5, 3.2 * math.ceil(len(there) / 2) + 0.6, math.ceil(len(there) / 2), min(2, len(there)))
    panels = list(np.ravel(axes))
    for panel, m in zip(panels, there, strict=False):
        for run, (colour, name, curve) in enumerate(zip(_colours(len(names)), names, curves, strict=True)):
            mark, named = MARKERS[run % len(MARKERS)], {"color": colour, "label": short(name)}
            for other, points in enumerate(curve.values()):
                points = [(step, values[m]) for step, values in points if m in values]
                style = {"linestyle": "none", "mfc": "white", "markersize": 6} if other else {"markersize": 4}
                if points:
                    panel.plot(*zip(*points, strict=True), marker=mark, **style, **named)
                    named.pop("label", None)
        panel.set_title(label(m) + (", lower is better" if m == "rank_distance" else ""), loc="left", fontsize=10)
        panel.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        panel.grid(color="#e6eaef", linewidth=0.8)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in panels[len(there) :]:
        panel.remove()
    for panel in panels[max(len(there) - 2, 0) : len(there)]:
        panel.set_xlabel("training steps")
    title = f"Evaluations during training, {task}"
    if any(len(curve) > 1 for curve in curves):
        title += "\nlines: a part of the questions; hollow: all of them, before training and of what was exported"
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    _legend(figure, panels[0], len(names))
    return figure


def _measured(curves: Sequence[Curve]) -> list[str]:
    """What the evaluations over the steps are reported by."""
    found = {name for curve in curves for points in curve.values() for _, values in points for name in values}
    return [m for m in (PARALLEL if found & {"cr", "rank_distance"} else (*CUTOFFS, "mo")) if m in found]


def _name_points(
    figure: Figure,
    axes: Axes,
    points: Sequence[tuple[float, float, str, Any]],
    bars: Sequence[tuple[float, float, float, float]],
) -> None:
    """Words beside their points, on a side where neither a word nor a bar lies yet; left out where there is none."""
    figure.draw_without_rendering()  # lays the axes out, which decides what is near
    scale = 72 / figure.dpi
    taken = []  # left, right, low, high in points
    for left, right, low, high in bars:
        (x0, y0), (x1, y1) = axes.transData.transform([(left, low), (right, high)]) * scale
        taken.append((x0 - 2, x1 + 2, y0 - 2, y1 + 2))
    for x, y, text, colour in points:
        at = axes.transData.transform((x, y)) * scale
        wide, high = 5.2 * len(text) + 1, 8
        beside = 5 + wide / 2
        for dx, dy in (
            (beside, 0),
            (-beside, 0),
            (0, 8),
            (0, -8),
            (beside, 7),
            (-beside, -7),
            (beside, -7),
            (-beside, 7),
        ):
            box = (at[0] + dx - wide / 2, at[0] + dx + wide / 2, at[1] + dy - high / 2, at[1] + dy + high / 2)
            if all(box[0] >= t[1] or box[1] <= t[0] or box[2] >= t[3] or box[3] <= t[2] for t in taken):
                taken.append(box)
                style = {"fontsize": 7.5, "color": colour, "alpha": 0.9, "ha": "center", "va": "center"}
                axes.annotate(text, (x, y), (dx, dy), textcoords="offset points", annotation_clip=False, **style)
                break


def _finish(figure: Figure, axes: Axes, c: Comparison, runs: int, more: str = "") -> None:
    bars = f"whiskers: {100 * c.level:g}% intervals" if c.resamples else ""
    axes.set_title("; ".join(part for part in (short(c.task, 40, 1), bars, more) if part), loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    _legend(figure, axes, runs)


def _legend(figure: Figure, axes: Axes, runs: int) -> None:
    """Below the plot, in as many columns as the longest name leaves room for."""
    handles, labels = axes.get_legend_handles_labels()
    longest = max((len(line) for text in labels for line in text.split("\n")), default=1)
    columns = max(1, min(runs, int(figure.get_size_inches()[0] * 13 / (longest + 6))))
    figure.legend(handles, labels, loc="outside lower left", ncols=columns, frameon=False, fontsize=9)


def _colours(runs: int) -> list[Any]:
    if runs <= len(PALETTE):
        return list(PALETTE[:runs])
    from matplotlib import colormaps

    return [colormaps["tab20"](i % 20) for i in range(runs)]
