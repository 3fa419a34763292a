"""What happens to a tile of logits, wherever it comes from: statistics, exp(S), the gradient; and merging tiles.

Shapes: R queries of a chunk, M passages, A queries of all ranks, T tiles side by side, N = R or A.
"""

# ruff: noqa: ANN001, ANN201 (Triton types the arguments of its functions itself)
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hbt_fast.kernels.negatives import keep_column_negatives, keep_row_negatives
from hbt_fast.kernels.tiles import launch_options, on_device_of


class ExpRows(NamedTuple):
    """Result of exp_rows. The maximum over negatives is -inf and the sum 0 for a row without negatives."""

    e_RM: Tensor  # exp(s - offset) of negatives, else 0, in the operand dtype
    max_R: Tensor  # float32, over negatives
    sum_R: Tensor  # float32, of exp(s - max) over negatives: not of the rounded e_RM
    offset_R: Tensor  # float32, always finite for finite inputs


class Statistics(NamedTuple):
    """Maxima over negatives and sums of exp(s - maximum), float32; -inf and 0 where there is no negative."""

    row_max_R: Tensor
    row_sum_R: Tensor
    column_max_A: Tensor
    column_sum_A: Tensor


class Coefficients(NamedTuple):
    """What `gradient` multiplies exp(s - maximum) with, all float32; the normaliser is a 0-d tensor.

    The maxima are those over all rows and columns, as merged by the caller. Where a maximum is -inf the factor is not
    used, and may be anything.
    """

    row_max_R: Tensor
    row_factor_R: Tensor
    column_max_A: Tensor
    column_factor_A: Tensor
    normaliser: Tensor


class Window(NamedTuple):
    """Where max - offset of a row may lie, in nats, for exp(s - offset) to be held by a dtype without harm."""

    headroom: float  # added to an estimate of the maximum from some columns, which is never above the maximum
    low: float
    high: float
    target: float  # max - offset of a row whose maximum is known


def window_of(dtype: torch.dtype) -> Window:
    """The window of a dtype of exp(S).

    fp16 ends at 65504 = exp(11.09) and is subnormal below exp(-9.7): the row's maximum belongs into the upper part, so
    that negatives 12 to 20 nats below it, of which there may be many, are still counted. bf16 and fp32 end at
    exp(+-87): 30 on either side leaves room for the sum over the passages, for negatives 50 nats below the maximum,
    and for the factor exp(offset - max) that the caller folds into the other operand.
    """
    if dtype == torch.float16:
        return Window(headroom=-3.0, low=2.0, high=11.0, target=7.0)
    return Window(headroom=30.0, low=-31.0, high=30.0, target=0.0)


@triton.jit
def finite(maximum):
    """A maximum as something to subtract: 0 where there is no negative."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def row_maximum_and_exp(s_RM):
    """A tile's (maximum_R, exp(s - maximum_R)) for logits that are -inf where there is no negative."""
    maximum_R = tl.max(s_RM, axis=1)
    return maximum_R, tl.exp(s_RM - finite(maximum_R)[:, None])


@triton.jit
def store_statistics(s_RM, who, rows, columns, first_column, row_out, column_out, row_base, column_base, R, M, A):
    """Write a tile's maxima and sums of its rows and, where it has positive columns, of its columns."""
    maximum_R, e_RM = row_maximum_and_exp(keep_row_negatives(s_RM, who, rows, columns, R, M))
    tl.store(row_out[0] + row_base + rows, maximum_R, mask=rows < R)
    tl.store(row_out[1] + row_base + rows, tl.sum(e_RM, axis=1), mask=rows < R)
    if first_column < A:
        t_RA = keep_column_negatives(s_RM, who, rows, columns, R, A)
        maximum_A = tl.max(t_RA, axis=0)
        sum_A = tl.sum(tl.exp(t_RA - finite(maximum_A)[None, :]), axis=0)
        tl.store(column_out[0] + column_base + columns, maximum_A, mask=columns < A)
        tl.store(column_out[1] + column_base + columns, sum_A, mask=columns < A)


@triton.jit
def _maximum_and_factor(max_N, factor_N, index, N, normaliser):
    maximum = tl.load(max_N + index, mask=index < N, other=float("-inf"))
    factor = tl.load(factor_N + index, mask=index < N, other=0.0) * tl.load(normaliser)
    return finite(maximum), tl.where(maximum == float("-inf"), 0.0, factor)


@triton.jit
def gradient_tile(s_RM, who, coefficients, rows, columns, first_column, R, M, A):
    """The sum that `fused.gradient` describes; the normaliser is folded into the factors, one per row or column."""
    maximum_R, factor_R = _maximum_and_factor(
        coefficients.row_max_R, coefficients.row_factor_R, rows, R, coefficients.normaliser
    )
    kept_RM = keep_row_negatives(s_RM, who, rows, columns, R, M)
    d_RM = factor_R[:, None] * tl.exp(kept_RM - maximum_R[:, None])
    if first_column < A:
        maximum_A, factor_A = _maximum_and_factor(
            coefficients.column_max_A, coefficients.column_factor_A, columns, A, coefficients.normaliser
        )
        kept_RA = keep_column_negatives(s_RM, who, rows, columns, R, A)
        d_RM += factor_A[None, :] * tl.exp(kept_RA - maximum_A[None, :])
    return d_RM


@triton.jit
def store_tile(out, value_RM, rows, columns, stride, R, M):
    """Write a tile of an (R, M) matrix, rounded to its dtype; rows are `stride` elements apart."""
    pointers = out + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    inside = (rows < R)[:, None] & (columns < M)[None, :]
    tl.store(pointers, value_RM.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _combine_kernel(
    max_TN, sum_TN, first_offset_N, max_N, sum_N, offset_N, T, N,
    HEADROOM: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, TARGET: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Merge the partial maxima and sums of T tiles, in the order of the tiles; one pass, 8 bytes per partial.

    A block reads 32 x 32 partials at a time, since N alone gives too few threads to hide the loads. Offsets, where
    asked for: without first_offset_N, estimates from maxima alone; with it, the first offset if the maximum lies within
    the window about it, else one that follows from the maximum.
    """
    index = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = index < N
    maximum = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, T, BLOCK_T):
        tiles = start + tl.arange(0, BLOCK_T)
        at = tiles.to(tl.int64)[:, None] * N + index[None, :]
        mask = (tiles < T)[:, None] & inside[None, :]
        part_max = tl.load(max_TN + at, mask=mask, other=float("-inf"))
        larger = tl.maximum(maximum, tl.max(part_max, axis=0))
        if sum_TN is not None:
            part_sum = tl.load(sum_TN + at, mask=mask, other=0.0)
            part_sum *= tl.exp(part_max - finite(larger)[None, :])
            total = total * tl.exp(maximum - finite(larger)) + tl.sum(part_sum, axis=0)
        maximum = larger
    none = maximum == float("-inf")
    if sum_TN is not None:
        tl.store(max_N + index, maximum, mask=inside)
        tl.store(sum_N + index, total, mask=inside)
        if first_offset_N is not None:
            first = tl.load(first_offset_N + index, mask=inside, other=0.0)
            above = maximum - first
            good = none | ((above >= LOW) & (above <= HIGH))
            tl.store(offset_N + index, tl.where(good, first, maximum - TARGET), mask=inside)
    else:
        tl.store(offset_N + index, tl.where(none, 0.0, maximum + HEADROOM), mask=inside)


def _combine(max_TN: Tensor, sum_TN: Tensor | None, first_N: Tensor | None, window: Window) -> tuple[Tensor, ...]:
    tiles, n = max_TN.shape
    max_N, sum_N, offset_N = (max_TN.new_empty(n) for _ in range(3))
    with on_device_of(max_TN):
        _combine_kernel[(triton.cdiv(n, 32),)](
            max_TN, sum_TN, first_N, max_N, sum_N, offset_N, tiles, n,
            HEADROOM=window.headroom, LOW=window.low, HIGH=window.high, TARGET=window.target,
            BLOCK_T=32, BLOCK_N=32, **launch_options(warps=4),
        )  # fmt: skip
    return max_N, sum_N, offset_N


def merge_partials(max_TN: Tensor, sum_TN: Tensor) -> tuple[Tensor, Tensor]:
    """(max_N, sum_N) of T tiles from their maxima and their sums relative to these; both (T, N) float32."""
    return _combine(max_TN, sum_TN, None, window_of(torch.float32))[:2]


def estimate_offsets(max_TN: Tensor, window: Window) -> Tensor:
    """(N,) offsets from the maxima of some tiles; 0 for a row in which they have no negative."""
    return _combine(max_TN, None, None, window)[2]


def merge_partials_and_check_offsets(
    max_TN: Tensor, sum_TN: Tensor, first_offset_N: Tensor, window: Window
) -> tuple[Tensor, Tensor, Tensor]:
    """(max_N, sum_N, offset_N): the first offsets where they will do, others where they will not."""
    return _combine(max_TN, sum_TN, first_offset_N, window)
