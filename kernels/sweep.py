"""The three operations with the products made by a library: q @ p^T in an fp32 buffer, then one Triton sweep over it.

The caller makes the chunk small enough for the buffer to stay in L2, so that its 4 bytes per element written and read
(twice in exp_rows) do not reach memory.

Shapes: R queries of a chunk, M passages, A queries of all ranks, D dimensions, T tiles.
"""

# ruff: noqa: ANN001 (Triton types the arguments of its functions itself)
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hbt_fast.kernels.checks import check_coefficients, check_operands, check_scalar, matrix_like
from hbt_fast.kernels.epilogue import (
    Coefficients,
    ExpRows,
    Statistics,
    finite,
    gradient_tile,
    merge_partials,
    store_statistics,
    store_tile,
    window_of,
)
from hbt_fast.kernels.library import add_product
from hbt_fast.kernels.negatives import Negatives, keep_row_negatives
from hbt_fast.kernels.tiles import SWEEP, SWEEP_ROWS, Tile, launch_options, on_device_of


@triton.jit
def _logits(products_RM, stride, scale, rows, columns, R, M):
    """scale * products of a tile; 0 outside, where the epilogue drops it."""
    pointers = products_RM + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    return tl.load(pointers, mask=(rows < R)[:, None] & (columns < M)[None, :], other=0.0) * tl.load(scale)


@triton.jit
def _exp_rows_kernel(
    products_RM, scale, who, e_RM, max_R, sum_R, offset_R, R, M, stride, e_stride,
    TARGET: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """A few whole rows: the maximum, then exp and sum. 8 bytes read and 2 written per element (fp32: 4).

    More than one row per program, so that the columns' ids (8 bytes each) are read once for all of them. Maxima are
    kept per lane and merged at the end of a pass: one reduction across lanes per row, not one per block.
    """
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    lane_max = tl.full((BLOCK_R, BLOCK_M), float("-inf"), tl.float32)
    for start in range(0, M, BLOCK_M):
        columns = start + tl.arange(0, BLOCK_M)
        s_RM = _logits(products_RM, stride, scale, rows, columns, R, M)
        lane_max = tl.maximum(lane_max, keep_row_negatives(s_RM, who, rows, columns, R, M))
    maximum_R = tl.max(lane_max, axis=1)
    factor = tl.exp(tl.full((BLOCK_R,), TARGET, tl.float32))
    lane_sum = tl.zeros((BLOCK_R, BLOCK_M), tl.float32)
    for start in range(0, M, BLOCK_M):
        columns = start + tl.arange(0, BLOCK_M)
        s_RM = _logits(products_RM, stride, scale, rows, columns, R, M)
        s_RM = keep_row_negatives(s_RM, who, rows, columns, R, M)
        exp_RM = tl.exp(s_RM - finite(maximum_R)[:, None])
        lane_sum += exp_RM
        store_tile(e_RM, exp_RM * factor[:, None], rows, columns, e_stride, R, M)
    tl.store(max_R + rows, maximum_R, mask=rows < R)
    tl.store(sum_R + rows, tl.sum(lane_sum, axis=1), mask=rows < R)
    tl.store(offset_R + rows, tl.where(maximum_R == float("-inf"), 0.0, maximum_R - TARGET), mask=rows < R)


@triton.jit
def _statistics_kernel(
    products_RM, scale, who, row_out, column_out, R, M, A, stride, BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr
):
    """Each tile's maxima and sums, of rows and of columns: 4 bytes read per element."""
    tile_m, tile_n = tl.program_id(1), tl.program_id(0)
    rows = tile_m * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = tile_n * BLOCK_M + tl.arange(0, BLOCK_M)
    s_RM = _logits(products_RM, stride, scale, rows, columns, R, M)
    row_base, column_base = tile_n.to(tl.int64) * R, tile_m.to(tl.int64) * A
    first_column = tile_n * BLOCK_M
    store_statistics(s_RM, who, rows, columns, first_column, row_out, column_out, row_base, column_base, R, M, A)


@triton.jit
def _gradient_kernel(
    products_RM, scale, who, coefficients, d_RM, R, M, A, stride, d_stride,
    BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The gradient with respect to the negatives' logits: 4 bytes read and 2 written per element (fp32: 4)."""
    tile_m, tile_n = tl.program_id(1), tl.program_id(0)
    rows = tile_m * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = tile_n * BLOCK_M + tl.arange(0, BLOCK_M)
    s_RM = _logits(products_RM, stride, scale, rows, columns, R, M)
    value_RM = gradient_tile(s_RM, who, coefficients, rows, columns, tile_n * BLOCK_M, R, M, A)
    store_tile(d_RM, value_RM, rows, columns, d_stride, R, M)


def products(q_RD: Tensor, p_MD: Tensor, products_RM: Tensor | None = None) -> Tensor:
    """q @ p^T in float32, never rounded below it, by the library.

    Args:
        q_RD: (R, D) queries, float16, bfloat16 or float32, contiguous. Half precision needs a GPU to be quick.
        p_MD: (M, D) passages, same dtype and device, contiguous.
        products_RM: (R, M) float32 output, columns adjacent, rows any stride; None makes it.

    Returns:
        products_RM. Float32 operands are multiplied as torch is set to: torch.backends.cuda.matmul decides about TF32.

    Raises:
        ValueError: a shape or a device is not as above.
        TypeError: a dtype is not as above.
    """
    check_operands(q_RD, p_MD)
    products_RM = matrix_like(products_RM, q_RD.shape[0], p_MD.shape[0], torch.float32, q_RD.device, "products_RM")
    return add_product(products_RM, q_RD, p_MD.T, beta=0)


def _checked(products_RM: Tensor, scale: Tensor, who: Negatives, *, symmetric: bool) -> Tensor:
    if products_RM.dim() != 2 or 0 in products_RM.shape:
        raise ValueError(f"products_RM has shape {tuple(products_RM.shape)}; (R, M) is needed")
    (r, m), device = products_RM.shape, products_RM.device
    check_scalar(scale, device, "scale")
    who.check(r, m, device, symmetric=symmetric)
    return matrix_like(products_RM, r, m, torch.float32, device, "products_RM")


def exp_rows(
    products_RM: Tensor,
    scale: Tensor,
    who: Negatives,
    dtype: torch.dtype,
    *,
    e_RM: Tensor | None = None,
    tile: Tile | None = None,
) -> ExpRows:
    """First pass of the one-directional loss: exp(S) of a chunk's negatives, and the row statistics.

    Rows are read twice, so the offset follows from the true maximum and nothing needs repair: it is the maximum for
    bfloat16 and float32; for float16 the maximum - 7, for the sake of the small elements (`epilogue.window_of`).

    Args:
        products_RM: (R, M) float32 from `products`; s = scale * products_RM. Columns adjacent, rows any stride.
        scale: 0-d float32 tensor on the same device.
        who: the negatives; its column terms are not used.
        dtype: of exp(S): float16, bfloat16 or float32.
        e_RM: (R, M) output of that dtype, columns adjacent, rows any stride; None makes it. In float32 it may be
            products_RM itself.
        tile: rows, columns and warps per program instead of the table's.

    Returns:
        ExpRows. A NaN or infinity in the products shows as NaN in sum_R.

    Raises:
        ValueError: a shape or a device is not as above.
        TypeError: a dtype is not as above.
    """
    products_RM = _checked(products_RM, scale, who, symmetric=False)
    tile = tile or SWEEP_ROWS
    r, m = products_RM.shape
    e_RM = matrix_like(e_RM, r, m, dtype, products_RM.device, "e_RM")
    max_R, sum_R, offset_R = (products_RM.new_empty(r) for _ in range(3))
    with on_device_of(products_RM):
        _exp_rows_kernel[(triton.cdiv(r, tile.rows),)](
            products_RM, scale, who, e_RM, max_R, sum_R, offset_R, r, m, products_RM.stride(0), e_RM.stride(0),
            TARGET=window_of(dtype).target, **_options(tile),
        )  # fmt: skip
    return ExpRows(e_RM, max_R, sum_R, offset_R)


def row_and_column_statistics(
    products_RM: Tensor, scale: Tensor, who: Negatives, *, tile: Tile | None = None
) -> Statistics:
    """First pass of the symmetric loss: statistics of a chunk's rows, and of the columns over the chunk's rows.

    Args:
        products_RM: (R, M) float32 from `products`; s = scale * products_RM. Columns adjacent, rows any stride.
        scale: 0-d float32 tensor on the same device.
        who: the negatives, with column terms; A is the length of `who.y_A`.
        tile: rows, columns and warps per program instead of the table's.

    Returns:
        Statistics. A NaN or infinity in the products shows as NaN in the sums.

    Raises:
        ValueError: a shape or a device is not as above.
        TypeError: a dtype is not as above.
    """
    products_RM = _checked(products_RM, scale, who, symmetric=True)
    tile = tile or SWEEP
    (r, m), a = products_RM.shape, who.y_A.shape[0]
    tiles_m, tiles_n = triton.cdiv(r, tile.rows), triton.cdiv(m, tile.columns)
    row_2TR = products_RM.new_empty(2, tiles_n, r)
    column_2TA = products_RM.new_empty(2, tiles_m, a)
    with on_device_of(products_RM):
        _statistics_kernel[(tiles_n, tiles_m)](
            products_RM, scale, who, tuple(row_2TR), tuple(column_2TA), r, m, a, products_RM.stride(0), **_options(tile)
        )  # fmt: skip
        return Statistics(*merge_partials(*row_2TR), *merge_partials(*column_2TA))


def gradient(
    products_RM: Tensor,
    scale: Tensor,
    who: Negatives,
    coefficients: Coefficients,
    dtype: torch.dtype,
    *,
    d_RM: Tensor | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """Second pass of the symmetric loss: the gradient with respect to the logits of a chunk's negatives.

    normaliser * (row_factor_R[i] * exp(s - row_max_R[i])       where j is a negative of row i
                  + column_factor_A[k] * exp(s - column_max_A[k])   where i is a negative of column k), else 0.

    Args:
        products_RM: (R, M) float32 from `products`; s = scale * products_RM. Columns adjacent, rows any stride.
        scale: 0-d float32 tensor on the same device.
        who: the negatives, with column terms; A is the length of `who.y_A`.
        coefficients: maxima, factors and normaliser. Maxima must be those of all rows and columns, or larger.
        dtype: of the result: float16, bfloat16 or float32.
        d_RM: (R, M) output of that dtype, columns adjacent, rows any stride; None makes it. In float32 it may be
            products_RM itself.
        tile: rows, columns and warps per program instead of the table's.

    Returns:
        d_RM.

    Raises:
        ValueError: a shape or a device is not as above.
        TypeError: a dtype is not as above.
    """
    products_RM = _checked(products_RM, scale, who, symmetric=True)
    tile = tile or SWEEP
    (r, m), a = products_RM.shape, who.y_A.shape[0]
    check_coefficients(coefficients, r, a, products_RM.device)
    d_RM = matrix_like(d_RM, r, m, dtype, products_RM.device, "d_RM")
    with on_device_of(products_RM):
        _gradient_kernel[(triton.cdiv(m, tile.columns), triton.cdiv(r, tile.rows))](
            products_RM, scale, who, coefficients, d_RM, r, m, a, products_RM.stride(0), d_RM.stride(0),
            **_options(tile),
        )  # fmt: skip
    return d_RM


def _options(tile: Tile) -> dict[str, object]:
    return {"BLOCK_R": tile.rows, "BLOCK_M": tile.columns, **launch_options(warps=tile.warps, stages=tile.stages)}
