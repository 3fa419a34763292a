"""Heat maps by language pair on one colour scale: of one evaluation, before and after, or of several runs."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hbt_fast.fonts import FIRST

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LARGE = 14  # columns from which on cells are smaller, and maps are set in twos, not threes
HUGE = 41  # columns from which on there is no room for numbers in cells
PIXELS = 16e6  # of a figure at most
RETRIEVAL = ("query language", 'language of the passages ("all": one pool)')  # names of the axes
BITEXT = ("source language", "target language")


def heat_maps(
    titles: Sequence[str],
    rows: Sequence[str],
    columns: Sequence[str],
    cells_RXY: np.ndarray,
    what: str,
    *,
    axes_names: tuple[str, str] = RETRIEVAL,
    limits: tuple[float, float] | None = None,
    colours: str = "YlGnBu",
    form: str = "{:.2f}",
) -> Figure:
    """A map for each title, in rows of two or three.

    Args:
        titles: R, put above the maps; see `title_of`.
        rows: X names.
        columns: Y names; one last called "all" is set apart from the single languages.
        cells_RXY: values; NaN is left blank.
        what: the values are.
        axes_names: of rows and columns.
        limits: of the colours; None: of the values.
        colours: a colour map.
        form: of the numbers in cells.
    """
    limits = limits or _limits(cells_RXY)
    per_row, side = (3, 0.46) if len(columns) < LARGE else (2, 0.34 if len(columns) < HUGE else 0.17)
    across, down = min(per_row, len(titles)), math.ceil(len(titles) / per_row)
    width = max(side * len(columns) + 0.8, 4.4)
    height = max(side * len(rows), 2.4) + 0.9 + 0.17 * max(title.count("\n") + 1 for title in titles)
    figure, axes = new_figure(across * width + 1.2, down * height + 0.3, down, across)
    panels = list(np.ravel(axes))
    for panel, title, cells in zip(panels, titles, cells_RXY, strict=False):
        image = _panel(panel, cells, rows, columns, limits, colours, form)
        panel.set_title(title, fontsize=9.5, loc="left")
        panel.set_ylabel(axes_names[0], fontsize=9)
        panel.set_xlabel(axes_names[1], fontsize=9)
    for panel in panels[len(titles) :]:
        panel.remove()
    shrink = min(0.85, max(0.4, 5 / (down * height)))
    bar = figure.colorbar(image, ax=panels[: len(titles)], shrink=shrink, pad=0.02, aspect=30)
    bar.outline.set_visible(False)
    bar.set_label(what)
    return figure


def _limits(cells: np.ndarray) -> tuple[float, float]:
    low, high = (np.nanmin(cells), np.nanmax(cells)) if np.isfinite(cells).any() else (0.0, 1.0)
    return (low if high - low >= 0.05 else max(0.0, high - 0.05)), high  # nearly equal cells should look nearly equal


def _panel(
    axes: Axes,
    cells: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    limits: tuple[float, float],
    colours: str,
    form: str,
) -> Any:
    n, (low, high) = len(columns), limits
    gap = 0.3 if columns[-1] == "all" else 0.0
    at = np.arange(n) + gap * (np.arange(n) == n - 1)
    edges = np.concatenate([np.arange(n) - 0.5, [n - 1.5 + gap, n - 0.5 + gap]] if gap else [np.arange(n + 1) - 0.5])
    drawn = np.insert(cells, n - 1, np.nan, axis=1) if gap else cells
    image = axes.pcolormesh(
        edges, np.arange(len(rows) + 1) - 0.5, np.ma.masked_invalid(drawn), cmap=colours, vmin=low, vmax=high,
        edgecolors="white", linewidth=0.8 if n < HUGE else 0,
    )  # fmt: skip
    size = 7.5 if n < LARGE else 5.5
    for (row, column), value in np.ndenumerate(cells if n < HUGE else np.empty((0, 0))):
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
    upright = n >= HUGE or (n > 3 and max(map(len, columns)) > 3)
    axes.set_xticks(at, columns, fontsize=size + 1, rotation=90 if upright else 0)
    axes.set_yticks(range(len(rows)), rows, fontsize=size + 1)
    axes.tick_params(length=0, labeltop=n >= HUGE, labelright=n >= HUGE)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_aspect("equal")
    axes.spines[:].set_visible(False)
    return image


def title_of(name: str, columns: int, figures: Sequence[str] = ()) -> str:
    """What stands above a map: a name on two lines at most, and figures below it.

    Args:
        name: such as a run's.
        columns: of the map.
        figures: such as "Mo 0.812".
    """
    return "\n".join([short(name, 44 if columns < LARGE else 60, 2), *(["   ".join(figures)] if figures else [])])


def save(figure: Figure, path: Any) -> None:
    """Writes the figure, as a PNG of 150 dots per inch or as many as keep it below `PIXELS`.

    Args:
        figure: to write.
        path: of the file.
    """
    figure.savefig(path, dpi=min(150, math.sqrt(PIXELS / np.prod(figure.get_size_inches()))))


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
