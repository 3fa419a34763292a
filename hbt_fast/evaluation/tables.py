"""What tables need: means of what is there, and Markdown."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def nanmean(values: np.ndarray, axis: int | None = None) -> np.ndarray | np.float64:
    """np.nanmean without its warning: the mean of nothing is NaN.

    Args:
        values: of any shape.
        axis: to average over; None: all.
    """
    values = np.asarray(values, dtype=np.float64)
    there = ~np.isnan(values)
    count, total = there.sum(axis=axis), np.where(there, values, 0).sum(axis=axis)
    return np.divide(total, count, out=np.full(np.shape(total), np.nan), where=count > 0)[()]


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> str:
    """A table in GitHub's Markdown, numbers to the right.

    Args:
        header: C names of columns.
        rows: C cells each.
        words: number of first columns that hold words.
    """
    lines = [header, [*["---"] * words, *["---:"] * (len(header) - words)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
