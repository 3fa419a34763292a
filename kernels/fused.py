"""The three operations with the logits made inside the kernel: no fp32 logit ever reaches memory.

Each kernel is a matrix product of tile_rows x tile_columns logits over D, then an epilogue on the fp32 accumulators.
Tiles are walked in groups of 8 row tiles, so that the operands of concurrent programs stay in L2. Rows and columns
beyond the edge read the last one instead (no mask in the inner loop, nothing outside is touched) and are dropped in the
epilogue. One tl.dot per kernel.

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
    estimate_offsets,
    gradient_tile,
    merge_partials,
    merge_partials_and_check_offsets,
    row_maximum_and_exp,
    store_statistics,
    store_tile,
    window_of,
)
from hbt_fast.kernels.negatives import Negatives, keep_row_negatives
from hbt_fast.kernels.tiles import Tile, architecture, launch_options, on_device_of, tile_for

ESTIMATE_SHARE = 32  # one in so many column tiles is looked at for the first offsets
REPAIR_PROGRAMS = 32  # per row tile


@triton.jit
def _grouped(tiles_m, tiles_n):
    """(row tile, column tile) of this program: groups of 8 row tiles, column by column within a group."""
    program = tl.program_id(0)
    group = program // (8 * tiles_n)
    height = tl.minimum(tiles_m - group * 8, 8)
    within = program % (8 * tiles_n)
    return group * 8 + within % height, within // height


@triton.jit
def _logits(
    q_RD, p_MD, scale, rows, columns, R, M, D,
    BLOCK_K: tl.constexpr, EVEN_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """scale * q @ p^T of a tile, in fp32."""
    depth = tl.arange(0, BLOCK_K)
    q = q_RD + tl.minimum(rows, R - 1).to(tl.int64)[:, None] * D + depth[None, :]
    p = p_MD + tl.minimum(columns, M - 1).to(tl.int64)[None, :] * D + depth[:, None]
    products = tl.zeros((rows.shape[0], columns.shape[0]), tl.float32)
    for start in range(0, D, BLOCK_K):
        if EVEN_D:
            q_tile = tl.load(q)
            p_tile = tl.load(p)
        else:
            q_tile = tl.load(q, mask=(start + depth < D)[None, :], other=0.0)
            p_tile = tl.load(p, mask=(start + depth < D)[:, None], other=0.0)
        products = tl.dot(q_tile, p_tile, products, input_precision=PRECISION)
        q += BLOCK_K
        p += BLOCK_K
    return products * tl.load(scale)


@triton.jit
def _halves(s_RM):
    return tl.split(tl.permute(tl.reshape(s_RM, (s_RM.shape[0], 2, s_RM.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def _pieces(s_RM, PIECES: tl.constexpr):
    """The tile as 1, 2 or 4 tiles side by side, by renaming registers.

    A thread holds a few rows but many columns of an accumulator, and an epilogue needs up to 48 bytes about each: one
    piece after the other, they need not all be in registers together.
    """
    tl.static_assert(PIECES == 1 or PIECES == 2 or PIECES == 4)
    if PIECES == 1:
        pieces = (s_RM,)
    else:
        left, right = _halves(s_RM)
        if PIECES == 2:
            pieces = (left, right)
        else:
            first, second = _halves(left)
            third, fourth = _halves(right)
            pieces = (first, second, third, fourth)
    return pieces


@triton.jit
def _exp_rows_kernel(
    q_RD, p_MD, scale, who, offset_R, e_RM, max_TR, sum_TR, R, M, D, e_stride, tile_step,
    BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, PIECES: tl.constexpr,
    EVEN_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """exp(S) and each piece's row maxima and sums. One product; 2 bytes written per element (4 in fp32).

    With e_RM None, an estimate: the row maxima of every tile_step-th column tile, nothing else.
    exp is taken once, relative to the piece's own maximum, so that the sum is exact whatever the offset; multiplying by
    exp(that maximum - offset), one number per row, gives the stored element. What that loses lies 87 nats below the
    piece's maximum.
    """
    tiles_n = tl.cdiv(tl.cdiv(M, BLOCK_M), tile_step)
    tile_m, tile_n = _grouped(tl.cdiv(R, BLOCK_R), tiles_n)
    rows = tile_m * BLOCK_R + tl.arange(0, BLOCK_R)
    first_column = tile_n * tile_step * BLOCK_M
    columns = first_column + tl.arange(0, BLOCK_M)
    pieces = _pieces(_logits(q_RD, p_MD, scale, rows, columns, R, M, D, BLOCK_K, EVEN_D, PRECISION), PIECES)
    for i in tl.static_range(PIECES):
        columns = first_column + i * (BLOCK_M // PIECES) + tl.arange(0, BLOCK_M // PIECES)
        s_RM = keep_row_negatives(pieces[i], who, rows, columns, R, M)
        base = (tile_n.to(tl.int64) * PIECES + i) * R
        if e_RM is None:
            tl.store(max_TR + base + rows, tl.max(s_RM, axis=1), mask=rows < R)
        else:
            maximum_R, exp_RM = row_maximum_and_exp(s_RM)
            tl.store(max_TR + base + rows, maximum_R, mask=rows < R)
            tl.store(sum_TR + base + rows, tl.sum(exp_RM, axis=1), mask=rows < R)
            offset = tl.load(offset_R + rows, mask=rows < R, other=0.0)
            exp_RM *= tl.exp(maximum_R - offset)[:, None]
            store_tile(e_RM, exp_RM, rows, columns, e_stride, R, M)


@triton.jit
def _repair_kernel(
    q_RD, p_MD, scale, who, first_offset_R, offset_R, e_RM, R, M, D, e_stride,
    BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, PIECES: tl.constexpr,
    EVEN_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write exp(S) again in the rows whose offset changed; a row tile without such rows costs a look at its offsets.

    Programs of a row tile share its column tiles; there are few of them, so that the usual case, no work, is over at
    once. The flag never leaves the device.
    """
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    offset = tl.load(offset_R + rows, mask=rows < R, other=0.0)
    changed = (tl.load(first_offset_R + rows, mask=rows < R, other=0.0) != offset) & (rows < R)
    tiles_n = tl.where(tl.max(changed.to(tl.int32), axis=0) > 0, tl.cdiv(M, BLOCK_M), 0)
    for tile_n in range(tl.program_id(1), tiles_n, tl.num_programs(1)):
        columns = tile_n * BLOCK_M + tl.arange(0, BLOCK_M)
        pieces = _pieces(_logits(q_RD, p_MD, scale, rows, columns, R, M, D, BLOCK_K, EVEN_D, PRECISION), PIECES)
        for i in tl.static_range(PIECES):
            columns = tile_n * BLOCK_M + i * (BLOCK_M // PIECES) + tl.arange(0, BLOCK_M // PIECES)
            s_RM = keep_row_negatives(pieces[i], who, rows, columns, R, M)
            store_tile(e_RM, tl.exp(s_RM - offset[:, None]), tl.where(changed, rows, R), columns, e_stride, R, M)


@triton.jit
def _statistics_kernel(
    q_RD, p_MD, scale, who, row_out, column_out, R, M, A, D,
    BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, PIECES: tl.constexpr,
    EVEN_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Each piece's maxima and sums, of rows and columns. One product and two exp per element, which is not stored."""
    tile_m, tile_n = _grouped(tl.cdiv(R, BLOCK_R), tl.cdiv(M, BLOCK_M))
    rows = tile_m * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = tile_n * BLOCK_M + tl.arange(0, BLOCK_M)
    pieces = _pieces(_logits(q_RD, p_MD, scale, rows, columns, R, M, D, BLOCK_K, EVEN_D, PRECISION), PIECES)
    for i in tl.static_range(PIECES):
        first = tile_n * BLOCK_M + i * (BLOCK_M // PIECES)
        columns = first + tl.arange(0, BLOCK_M // PIECES)
        row_base, column_base = (tile_n.to(tl.int64) * PIECES + i) * R, tile_m.to(tl.int64) * A
        store_statistics(pieces[i], who, rows, columns, first, row_out, column_out, row_base, column_base, R, M, A)


@triton.jit
def _gradient_kernel(
    q_RD, p_MD, scale, who, coefficients, d_RM, R, M, A, D, d_stride,
    BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, PIECES: tl.constexpr,
    EVEN_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of the negatives' logits. One product, two exp and 2 bytes written per element (fp32: 4)."""
    tile_m, tile_n = _grouped(tl.cdiv(R, BLOCK_R), tl.cdiv(M, BLOCK_M))
    rows = tile_m * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = tile_n * BLOCK_M + tl.arange(0, BLOCK_M)
    pieces = _pieces(_logits(q_RD, p_MD, scale, rows, columns, R, M, D, BLOCK_K, EVEN_D, PRECISION), PIECES)
    for i in tl.static_range(PIECES):
        first = tile_n * BLOCK_M + i * (BLOCK_M // PIECES)
        columns = first + tl.arange(0, BLOCK_M // PIECES)
        value_RM = gradient_tile(pieces[i], who, coefficients, rows, columns, first, R, M, A)
        store_tile(d_RM, value_RM, rows, columns, d_stride, R, M)


def _tile_of(
    q_RD: Tensor, p_MD: Tensor, scale: Tensor, who: Negatives, precision: str, tile: Tile | None, *, symmetric: bool
) -> Tile:
    """Check the arguments; the tile to use."""
    check_operands(q_RD, p_MD)
    check_scalar(scale, q_RD.device, "scale")
    who.check(q_RD.shape[0], p_MD.shape[0], q_RD.device, symmetric=symmetric)
    if precision not in ("ieee", "tf32"):
        raise ValueError(f"precision is {precision!r}: 'ieee' or 'tf32' is needed")
    return tile or tile_for(q_RD.dtype, precision, architecture(q_RD.device), symmetric=symmetric)


def _options(tile: Tile, d: int, precision: str) -> dict[str, object]:
    return {
        "BLOCK_R": tile.rows,
        "BLOCK_M": tile.columns,
        "BLOCK_K": tile.depth,
        "PIECES": tile.pieces,
        "EVEN_D": d % tile.depth == 0,
        "PRECISION": precision,
        **launch_options(warps=tile.warps, stages=tile.stages),
    }


def exp_rows(
    q_RD: Tensor,
    p_MD: Tensor,
    scale: Tensor,
    who: Negatives,
    *,
    precision: str = "ieee",
    e_RM: Tensor | None = None,
    tile: Tile | None = None,
) -> ExpRows:
    """First pass of the one-directional loss: exp(S) of a chunk's negatives, and the row statistics.

    The offset must be one number per row, as it is folded into the operands of the products that follow, and the true
    maximum is not known when the first tile is written. So: estimate the maximum from 1/32 of the columns, spread
    evenly; write exp(s - offset) with it and collect exact maxima and sums; write again, in a launch that finds nothing
    to do otherwise, the rows whose maximum lies outside the window that the dtype of E allows (`epilogue.window_of`).
    The result never depends on the estimate beyond rounding.

    Args:
        q_RD: (R, D) queries, float16, bfloat16 or float32, contiguous.
        p_MD: (M, D) passages, same dtype and device, contiguous.
        scale: 0-d float32 tensor on that device; s = scale * q @ p^T.
        who: the negatives; its column terms are not used.
        precision: products of float32 operands: "ieee" or "tf32". No meaning for half precision.
        e_RM: (R, M) output of the operand dtype, columns adjacent, rows any stride; None makes it.
        tile: tile sizes instead of the table's.

    Returns:
        ExpRows. A NaN or infinity in the operands shows as NaN in sum_R.

    Raises:
        ValueError: a shape, a device or `precision` is not as above.
        TypeError: a dtype is not as above.
    """
    tile = _tile_of(q_RD, p_MD, scale, who, precision, tile, symmetric=False)
    (r, d), m = q_RD.shape, p_MD.shape[0]
    e_RM = matrix_like(e_RM, r, m, q_RD.dtype, q_RD.device, "e_RM")
    window = window_of(q_RD.dtype)
    tiles_m, tiles_n = triton.cdiv(r, tile.rows), triton.cdiv(m, tile.columns)
    step = tiles_n // triton.cdiv(tiles_n, ESTIMATE_SHARE)
    looked_at = triton.cdiv(tiles_n, step)
    options = _options(tile, d, precision)

    max_TR, sum_TR = (q_RD.new_empty(tiles_n * tile.pieces, r, dtype=torch.float32) for _ in range(2))
    with on_device_of(q_RD):
        estimate_TR = max_TR[: looked_at * tile.pieces]
        _exp_rows_kernel[(tiles_m * looked_at,)](
            q_RD, p_MD, scale, who, None, None, estimate_TR, None, r, m, d, 0, step, **options
        )  # fmt: skip
        first_offset_R = estimate_offsets(estimate_TR, window)
        _exp_rows_kernel[(tiles_m * tiles_n,)](
            q_RD, p_MD, scale, who, first_offset_R, e_RM, max_TR, sum_TR, r, m, d, e_RM.stride(0), 1, **options
        )  # fmt: skip
        max_R, sum_R, offset_R = merge_partials_and_check_offsets(max_TR, sum_TR, first_offset_R, window)
        _repair_kernel[(tiles_m, min(tiles_n, REPAIR_PROGRAMS))](
            q_RD, p_MD, scale, who, first_offset_R, offset_R, e_RM, r, m, d, e_RM.stride(0), **options
        )  # fmt: skip
    return ExpRows(e_RM, max_R, sum_R, offset_R)


def row_and_column_statistics(
    q_RD: Tensor,
    p_MD: Tensor,
    scale: Tensor,
    who: Negatives,
    *,
    precision: str = "ieee",
    tile: Tile | None = None,
) -> Statistics:
    """First pass of the symmetric loss: statistics of a chunk's rows, and of the columns over the chunk's rows.

    Args:
        q_RD: (R, D) queries, float16, bfloat16 or float32, contiguous.
        p_MD: (M, D) passages, same dtype and device, contiguous; the first A are the queries' positives.
        scale: 0-d float32 tensor on that device; s = scale * q @ p^T.
        who: the negatives, with column terms; A is the length of `who.y_A`.
        precision: products of float32 operands: "ieee" or "tf32". No meaning for half precision.
        tile: tile sizes instead of the table's.

    Returns:
        Statistics. A NaN or infinity in the operands shows as NaN in the sums.

    Raises:
        ValueError: a shape, a device or `precision` is not as above.
        TypeError: a dtype is not as above.
    """
    tile = _tile_of(q_RD, p_MD, scale, who, precision, tile, symmetric=True)
    (r, d), m, a = q_RD.shape, p_MD.shape[0], who.y_A.shape[0]
    tiles_m, tiles_n = triton.cdiv(r, tile.rows), triton.cdiv(m, tile.columns)
    row_2TR = q_RD.new_empty(2, tiles_n * tile.pieces, r, dtype=torch.float32)
    column_2TA = q_RD.new_empty(2, tiles_m, a, dtype=torch.float32)
    with on_device_of(q_RD):
        _statistics_kernel[(tiles_m * tiles_n,)](
            q_RD, p_MD, scale, who, tuple(row_2TR), tuple(column_2TA), r, m, a, d, **_options(tile, d, precision)
        )  # fmt: skip
        return Statistics(*merge_partials(*row_2TR), *merge_partials(*column_2TA))


def gradient(
    q_RD: Tensor,
    p_MD: Tensor,
    scale: Tensor,
    who: Negatives,
    coefficients: Coefficients,
    *,
    precision: str = "ieee",
    d_RM: Tensor | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """Second pass of the symmetric loss: the gradient with respect to the logits of a chunk's negatives.

    normaliser * (row_factor_R[i] * exp(s - row_max_R[i])       where j is a negative of row i
                  + column_factor_A[k] * exp(s - column_max_A[k])   where i is a negative of column k), else 0.

    Args:
        q_RD: (R, D) queries, float16, bfloat16 or float32, contiguous.
        p_MD: (M, D) passages, same dtype and device, contiguous; the first A are the queries' positives.
        scale: 0-d float32 tensor on that device; s = scale * q @ p^T.
        who: the negatives, with column terms; A is the length of `who.y_A`.
        coefficients: maxima, factors and normaliser. Maxima must be those of all rows and columns, or larger.
        precision: products of float32 operands: "ieee" or "tf32". No meaning for half precision.
        d_RM: (R, M) output of the operand dtype, columns adjacent, rows any stride; None makes it.
        tile: tile sizes instead of the table's.

    Returns:
        d_RM in the operand dtype.

    Raises:
        ValueError: a shape, a device or `precision` is not as above.
        TypeError: a dtype is not as above.
    """
    tile = _tile_of(q_RD, p_MD, scale, who, precision, tile, symmetric=True)
    (r, d), m, a = q_RD.shape, p_MD.shape[0], who.y_A.shape[0]
    check_coefficients(coefficients, r, a, q_RD.device)
    d_RM = matrix_like(d_RM, r, m, q_RD.dtype, q_RD.device, "d_RM")
    tiles = triton.cdiv(r, tile.rows) * triton.cdiv(m, tile.columns)
    with on_device_of(q_RD):
        _gradient_kernel[(tiles,)](
            q_RD, p_MD, scale, who, coefficients, d_RM, r, m, a, d, d_RM.stride(0), **_options(tile, d, precision)
        )  # fmt: skip
    return d_RM
