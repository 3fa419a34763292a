"""Charts for a page: lines and stacked shares as SVG, matrices as tables. Strings of HTML that need nothing else.

Their colours are the page's: classes c0 to c5, and currentColor for what is drawn around them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

WIDTH, HEIGHT = 760, 270
LEFT, RIGHT, TOP, BOTTOM = 76, 14, 10, 38
COLOURS = 6
POINTS = 60  # that a line has at most
PALETTE = ("#3478c6", "#e08a1e", "#2a9d78", "#8d5bc9", "#d1495b", "#8a95a3")  # c0 to c5, for plots that are no page
SCALE = np.array([(255, 255, 217), (199, 233, 180), (65, 182, 196), (34, 94, 168), (8, 29, 88)], float)  # YlGnBu


@dataclass(frozen=True)
class Line:
    """A line of a chart; more than 60 points are drawn as means, with what they range over.

    Attributes:
        name: in the legend.
        x, y: (n,) its points, x rising.
        dots: mark each point.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    dots: bool = False


def line_chart(lines: Sequence[Line], y_label: str, *, zero: bool = True, mark: tuple[float, str] | None = None) -> str:
    """Lines over the steps of a run.

    Args:
        lines: at most six; values that are not finite are left out.
        y_label: what is drawn, with its unit.
        zero: the y axis begins at 0.
        mark: (x, words) of a vertical line.
    """
    means = [_binned(line) for line in lines]
    lows, highs = (np.concatenate([m[k] for m in means]) for k in (2, 3))
    xs = np.concatenate([m[0] for m in means])
    if not len(xs):
        return ""
    axes = _Axes(xs.min(), xs.max(), min(lows.min(), 0) if zero else lows.min(), highs.max())
    parts = [axes.grid(y_label)]
    for number, (line, (x, y, low, high)) in enumerate(zip(lines, means, strict=True)):
        colour = f"c{number % COLOURS}"
        if (high > low).any():
            outline = axes.points([*x, *x[::-1]], [*high, *low[::-1]])
            parts.append(f'<polygon class="band {colour}" points="{outline}"/>')
        if len(x) > 1:
            parts.append(f'<polyline class="line {colour}" points="{axes.points(x, y)}"/>')
        if line.dots or len(x) == 1:
            for a, b in zip(x, y, strict=True):
                said = escape(f"{line.name}, step {a:,.0f}: {b:.4g}")
                where = f'cx="{axes.x(a):.1f}" cy="{axes.y(b):.1f}"'
                parts.append(f'<circle class="dot {colour}" {where} r="3.5"><title>{said}</title></circle>')
    if mark:
        at, words = axes.x(mark[0]), escape(mark[1])
        side = "end" if at > WIDTH / 2 else "start"
        parts.append(f'<line class="mark" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        shift = -6 if side == "end" else 6
        parts.append(f'<text x="{at + shift:.1f}" y="{HEIGHT - BOTTOM - 8}" text-anchor="{side}">{words}</text>')
    return _figure(parts, [line.name for line in lines], y_label)


def stacked_chart(x: Sequence[float], shares: dict[str, Sequence[float]], y_label: str) -> str:
    """Shares that add up to 1 over the steps of a run, one above the other.

    Args:
        x: (n,) rising.
        shares: (n,) by name, at most six.
        y_label: what is drawn.
    """
    names = list(shares)
    x, *rows = ([np.mean(part) for part in _parts(values)] for values in (x, *shares.values()))
    tops = np.cumsum([np.zeros(len(x)), *rows], axis=0)
    if len(x) == 1:
        x, tops = np.array([x[0] - 0.5, x[0] + 0.5]), np.repeat(tops, 2, axis=1)
    axes = _Axes(min(x), max(x), 0, 1)
    parts = []
    for number in range(len(names)):
        outline = axes.points([*x, *x[::-1]], [*tops[number + 1], *tops[number][::-1]])
        parts.append(f'<polygon class="area c{number % COLOURS}" points="{outline}"/>')
    return _figure([*parts, axes.grid(y_label, percent=True)], names, y_label)


def heat_table(
    rows: Sequence[str],
    columns: Sequence[str],
    values: np.ndarray,
    *,
    low: float,
    high: float,
    corner: str,
    form: str = ".2f",
    unit: str = "",
) -> str:
    """A matrix as a table of coloured cells.

    Args:
        rows: R names.
        columns: C names.
        values: (R, C); NaN is an empty cell.
        low: value of the lightest colour.
        high: value of the darkest.
        corner: what the names are.
        form: how a value is written; without a leading 0 where none exceeds 1.
        unit: behind a value, where the mouse is.
    """
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in columns)
    body = []
    for name, line in zip(rows, values, strict=True):
        cells = [f'<th scope="row">{escape(name)}</th>']
        for column, value in zip(columns, line, strict=True):
            if math.isnan(value):
                cells.append("<td></td>")
                continue
            colour, ink = _colour((value - low) / (high - low) if high > low else 0.0)
            said = escape(f"{name} → {column}: {value:.4g}{unit}")
            written = format(value, form)
            written = written[1:] if high <= 1 and written.startswith("0.") else written
            cells.append(f'<td style="background:{colour};color:{ink}" title="{said}">{written}</td>')
        body.append(f"<tr>{''.join(cells)}</tr>")
    head = f'<thead><tr><th class="corner">{escape(corner)}</th>{head}</tr></thead>'
    return f'<div class="wide"><table class="heat">{head}<tbody>{"".join(body)}</tbody></table></div>'


class _Axes:
    """From values to places in the SVG."""

    def __init__(self, left: float, right: float, low: float, high: float) -> None:
        right = right if right > left else left + 1
        high = high if high > low else low + (abs(low) or 1)
        self.left, self.right = left, right
        self.y_ticks = _ticks(low, high)
        self.low, self.high = min(low, self.y_ticks[0]), max(high, self.y_ticks[-1])

    def x(self, value: float) -> float:
        return LEFT + (value - self.left) / (self.right - self.left) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.low) / (self.high - self.low) * (HEIGHT - TOP - BOTTOM)

    def points(self, xs: Sequence[float], ys: Sequence[float]) -> str:
        return " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in zip(xs, ys, strict=True))

    def grid(self, y_label: str, percent: bool = False) -> str:
        """Lines, numbers and names."""
        parts = []
        for tick in self.y_ticks:
            y, said = self.y(tick), f"{100 * tick:.0f}%" if percent else _number(tick)
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{said}</text>')
        for tick in _ticks(self.left, self.right, whole=True):
            if self.left <= tick <= self.right:
                where = f'x="{self.x(tick):.1f}" y="{HEIGHT - BOTTOM + 17}"'
                parts.append(f'<text {where} text-anchor="middle">{_number(tick)}</text>')
        middle = (TOP + HEIGHT - BOTTOM) / 2
        turned = f'transform="translate(13 {middle:.0f}) rotate(-90)"'
        parts.append(f'<text {turned} text-anchor="middle">{escape(y_label)}</text>')
        parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{HEIGHT - 5}" text-anchor="middle">step</text>')
        return "".join(parts)


def _figure(parts: list[str], names: list[str], label: str) -> str:
    keys = "".join(f'<li class="c{n % COLOURS}">{escape(name)}</li>' for n, name in enumerate(names))
    legend = f'<ul class="legend">{keys}</ul>' if len(names) > 1 else ""
    drawing = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'
    return f'<figure>{legend}<div class="wide">{drawing}</div></figure>'


def _parts(values: Sequence[float]) -> list[np.ndarray]:
    """The values in parts of one size, at most 60."""
    values = np.asarray(values, float)
    size = -(-len(values) // POINTS)
    return [values[i : i + size] for i in range(0, len(values), size)]


def _binned(line: Line) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """x, mean, smallest and largest of a line's points, at most 60 of each."""
    x, y = np.asarray(line.x, float), np.asarray(line.y, float)
    finite = np.isfinite(y)
    x, y = x[finite], y[finite]
    if not len(x):
        return x, y, y, y
    xs, ys = _parts(x), _parts(y)
    return tuple(
        np.array([of(part) for part in parts])
        for of, parts in ((np.mean, xs), (np.mean, ys), (np.min, ys), (np.max, ys))
    )


def _ticks(low: float, high: float, whole: bool = False) -> list[float]:
    """Round numbers that span low to high."""
    step = 10.0 ** math.floor(math.log10((high - low) / 4))
    step *= next(k for k in (1, 2, 2.5, 5, 10) if (high - low) / (k * step) <= 5)
    step = max(math.ceil(step), 1) if whole else step
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [k * step for k in range(first, last + 1)]


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 or value == round(value) else f"{value:.3g}"


def _colour(share: float) -> tuple[str, str]:
    """Background and ink for a value between the lightest (0) and the darkest (1)."""
    place = min(max(share, 0.0), 1.0) * 0.92 * (len(SCALE) - 1)
    number = min(int(place), len(SCALE) - 2)
    red, green, blue = SCALE[number] + (place - number) * (SCALE[number + 1] - SCALE[number])
    return f"#{round(red):02x}{round(green):02x}{round(blue):02x}", "#fff" if share > 0.55 else "#1d2733"
