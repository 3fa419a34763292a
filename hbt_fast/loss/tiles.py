"""The elementwise work on a tile of logits, in torch; and the same compiled (csrc/tiles.cpp), where it was built.

Both forms are modules or objects with `statistics` and `gradient`.

Shapes: R rows and C columns of a tile, B <= C of them with column terms.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hbt_fast.loss.terms import NEGATIVE_INFINITY, finite_maximum

if TYPE_CHECKING:
    from hbt_fast.loss.panels import Statistics

REPEATED = -1
ARGUMENTS = 18  # of tile_statistics in csrc/tiles.cpp
Parts = tuple[Tensor | None, ...]  # Negatives.tile


def statistics(s_RC: Tensor, row: Statistics, column: Statistics | None, negatives: Parts) -> None:
    """Take a tile's (maximum, total) over row negatives into `row`, and over column negatives into `column`."""
    of_rows_RC = s_RC.masked_fill(_no_row_negative(s_RC, negatives), NEGATIVE_INFINITY)
    row.take(type(row).of(_gained(of_rows_RC, negatives)))
    if column is not None:
        s_RB = s_RC[:, : column.total.shape[0]]
        s_RB = s_RB.masked_fill(_no_column_negative(s_RB, negatives), NEGATIVE_INFINITY)
        column.take(type(column).of(s_RB.T))


def gradient(
    s_RC: Tensor,
    row: Statistics,
    factor_R: Tensor,
    column: Statistics | None,
    factor_B: Tensor | None,
    negatives: Parts,
) -> None:
    """Overwrite a tile's logits with d loss / d logit of the negatives; where there is none, with 0."""
    dropped_RC = _no_row_negative(s_RC, negatives)
    from_columns_RB = None
    if column is not None:
        s_RB = s_RC[:, : column.total.shape[0]]
        dropped_RB = _no_column_negative(s_RB, negatives)
        from_columns_RB = s_RB.masked_fill(dropped_RB, NEGATIVE_INFINITY).sub_(finite_maximum(column.maximum))
        from_columns_RB.exp_().mul_(factor_B)
    _gained(s_RC.masked_fill_(dropped_RC, NEGATIVE_INFINITY), negatives).sub_(finite_maximum(row.maximum)[:, None])
    s_RC.exp_().mul_(factor_R[:, None])
    if from_columns_RB is not None:
        s_RC[:, : from_columns_RB.shape[1]] += from_columns_RB


def _gained(s_RC: Tensor, negatives: Parts) -> Tensor:
    """A row's logits with their hardness, in place."""
    return s_RC if negatives[-1] is None else s_RC.mul_(negatives[-1])


def _no_row_negative(s_RC: Tensor, negatives: Parts) -> Tensor:
    row_key_R, column_key_C, *_, row_inverse_R, column_inverse_C, row_limit_R, _, row_owner_R, owner_C, _ = negatives
    dropped_RC = row_key_R[:, None] == column_key_C
    dropped_RC |= column_key_C == REPEATED
    if row_owner_R is not None:
        dropped_RC |= row_owner_R[:, None] == owner_C
    if row_inverse_R is not None:
        dropped_RC |= s_RC * row_inverse_R[:, None] * column_inverse_C > row_limit_R[:, None]
    return dropped_RC


def _no_column_negative(s_RB: Tensor, negatives: Parts) -> Tensor:
    row_term_R, column_term_B, row_pair_R, column_pair_B, row_inverse_R, column_inverse_C, _, limit_B = negatives[2:10]
    dropped_RB = row_term_R[:, None] == column_term_B
    if row_pair_R is not None:
        dropped_RB |= row_pair_R[:, None] == column_pair_B
    if row_inverse_R is not None:
        dropped_RB |= s_RB * row_inverse_R[:, None] * column_inverse_C[: s_RB.shape[1]] > limit_B
    return dropped_RB


@functools.cache
def compiled() -> SimpleNamespace | None:
    """The two functions of csrc/tiles.cpp, for fp32 on a CPU; None where the installation did not build it."""
    spec = importlib.util.find_spec("hbt_fast")
    for folder in spec.submodule_search_locations or []:
        for library in sorted(Path(folder).glob("_tiles*.so")):
            torch.ops.load_library(library)
            if len(torch.ops.hbt_fast.tile_statistics.default._schema.arguments) != ARGUMENTS:
                warnings.warn(
                    f"{library} was built from other sources than these, and is not used: build it again (pip install "
                    "--no-build-isolation -e .); until then the loss of CPUs runs in torch",
                    stacklevel=2,
                )
                return None
            return SimpleNamespace(statistics=_compiled_statistics, gradient=_compiled_gradient)
    return None


def _compiled_statistics(s_RC: Tensor, row: Statistics, column: Statistics | None, negatives: Parts) -> None:
    column_max, column_total = (None, None) if column is None else (column.maximum, column.total)
    torch.ops.hbt_fast.tile_statistics(s_RC, row.maximum, row.total, column_max, column_total, *negatives)


def _compiled_gradient(
    s_RC: Tensor,
    row: Statistics,
    factor_R: Tensor,
    column: Statistics | None,
    factor_B: Tensor | None,
    negatives: Parts,
) -> None:
    column_max = None if column is None else finite_maximum(column.maximum)
    torch.ops.hbt_fast.tile_gradient(s_RC, row.maximum, factor_R, column_max, factor_B, *negatives)
