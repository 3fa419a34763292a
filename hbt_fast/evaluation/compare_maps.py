"""Heat maps of a comparison by language pair: every run on one colour scale, and the differences to the first."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hbt_fast.evaluation.compare import Comparison
from hbt_fast.evaluation.compare_report import label, main_measures
from hbt_fast.fonts import FIRST

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LARGE = 14  # columns from which on cells are smaller, and maps are set in twos, not threes
PIXELS = 16e6  # of a figure at most


def draw_pairs(c: Comparison, rows: list[str], columns: list[str], cells_RXY: np.ndarray) -> Figure:
    """A heat map by language pair for every run, on one colour scale.

    Args:
        c: what was compared.
        rows: X names.
        columns: Y names.
        cells_RXY: values; NaN is left blank.
    """
    low, high = (np.nanmin(cells_RXY), np.nanmax(cells_RXY)) if np.isfinite(cells_RXY).any() else (0.0, 1.0)
    if high - low < 0.05:  # nearly equal cells should look nearly equal
        low = max(0.0, high - 0.05)
    titles = [f"{short(name, _letters(columns), 2)}\n{_headline(c, run)}" for run, name in enumerate(c.names)]
    return _maps(c, titles, rows, columns, cells_RXY, (low, high), "YlGnBu", "{:.2f}", _what(c))


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
    titles = [
        f"{short(name, _letters(columns), 2)}\n− {short(c.names[0], _letters(columns), 2)}" for name in c.names[1:]
    ]
    return _maps(c, titles, rows, columns, points, (-far, far), "RdBu", "{:+.1f}", f"difference in {_what(c)}, × 100")


def _maps(
    c: Comparison,
    titles: Sequence[str],
    rows: list[str],
    columns: list[str],
    cells_RXY: np.ndarray,
    limits: tuple[float, float],
    colours: str,
    form: str,
    what: str,
) -> Figure:
    per_row, side = (3, 0.46) if len(columns) < LARGE else (2, 0.34)
    across, down = min(per_row, len(titles)), math.ceil(len(titles) / per_row)
    width = max(side * len(columns) + 0.8, 4.4)
    height = max(side * len(rows), 2.4) + 0.9 + 0.17 * max(title.count("\n") + 1 for title in titles)
    figure, axes = new_figure(across * width + 1.2, down * height + 0.3, down, across)
    panels = list(np.ravel(axes))
    for panel, title, cells in zip(panels, titles, cells_RXY, strict=False):
        image = _panel(panel, cells, rows, columns, limits, colours, form)
        panel.set_title(title, fontsize=9.5, loc="left")
    for panel in panels[len(titles) :]:
        panel.remove()
    bar = figure.colorbar(image, ax=panels[: len(titles)], shrink=min(0.85, 5 / (down * height)), pad=0.02, aspect=30)
    bar.outline.set_visible(False)
    bar.set_label(f"{what}, {short(c.task)}")
    return figure


def _panel(
    axes: Axes,
    cells: np.ndarray,
    rows: list[str],
    columns: list[str],
    limits: tuple[float, float],
    colours: str,
    form: str,
) -> Any:
    n, (low, high) = len(columns), limits
    gap = 0.3 if columns[-1] == "all" else 0.0  # sets the whole pool apart from the single languages
    at = np.arange(n) + gap * (np.arange(n) == n - 1)
    edges = np.concatenate([np.arange(n) - 0.5, [n - 1.5 + gap, n - 0.5 + gap]] if gap else [np.arange(n + 1) - 0.5])
    drawn = np.insert(cells, n - 1, np.nan, axis=1) if gap else cells
    image = axes.pcolormesh(
        edges, np.arange(len(rows) + 1) - 0.5, np.ma.masked_invalid(drawn), cmap=colours, vmin=low, vmax=high,
        edgecolors="white", linewidth=0.8,
    )  # fmt: skip
    size = 7.5 if n < LARGE else 5.5
    for (row, column), value in np.ndenumerate(cells):
        if math.isnan(value):
            continue
        red, green, blue, _ = image.cmap(image.norm(value))
        ink = "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.52 else "#222"
        text = form.format(value)
        text = text[1:] if text.startswith("0.") else "0.0" if text == "-0.0" else text
        bold = "bold" if rows[row] == columns[column] else "normal"
        # Numbers need none of the fonts that names may need, which need not have a bold face.
        style = {"fontsize": size, "color": ink, "fontweight": bold, "fontfamily": FIRST}
        axes.text(at[column], row, text, ha="center", va="center", **style)
    longest = max(map(len, columns))
    axes.set_xticks(at, columns, fontsize=size + 1, rotation=90 if longest > 3 and n > 3 else 0)
    axes.set_yticks(range(len(rows)), rows, fontsize=size + 1)
    axes.set_xlabel('language of the passages ("all": one pool)' if gap else "target language", fontsize=9)
    axes.set_ylabel("query language" if gap else "source language", fontsize=9)
    axes.tick_params(length=0)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_aspect("equal")
    axes.spines[:].set_visible(False)
    return image


def _headline(c: Comparison, run: int) -> str:
    return "   ".join(f"{label(m)} {_brief(m, c.measures[m].values[run, 0])}" for m in main_measures(c))


def _brief(measure: str, value: float) -> str:
    return f"{value:,.0f}" if measure == "rank_distance" else f"{value:.3f}"


def _letters(columns: list[str]) -> int:
    """That fit on a line above a map."""
    return 44 if len(columns) < LARGE else 60


def _what(c: Comparison) -> str:
    return "mAP" if "cr" in c.measures else label(main_measures(c)[0])


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Figure, Any]:
    """A figure that draws to a file whatever backend the program uses, and its axes.

    Args:
        width: inches.
        height: inches.
        rows: of axes.
        columns: of axes.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns)


def short(text: str, width: int = 40, lines: int = 3) -> str:
    """The text on several lines, with what is too much left out of its middle.

    Args:
        text: such as a run's name.
        width: characters a line.
        lines: at most.
    """
    text = " ".join(text.split())
    for kept in range(len(text), 1, -1):
        whole = text if kept == len(text) else text[: kept // 2] + "…" + text[-(kept // 2) :]
        for at_hyphens in (True, False):
            wrapped = textwrap.wrap(whole, width, break_on_hyphens=at_hyphens)
            if len(wrapped) <= lines:
                return "\n".join(wrapped)
    return text[:width]
