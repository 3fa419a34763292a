"""Counts how many candidates of each language score higher than each relevant candidate, over a chunk of score rows.

Design record. One program takes one row of scores and one segment of a language's columns: up to 16 relevant candidates
down, columns across. A thread loads a score once for all of them, keeps their 16 counts in registers (80 in all) and
meets the other threads once, at the end. A segment lies within one language, so that its sums are final but for the
other segments of that language; those meet in an integer atomic, which is exact in any order. Ties need no index per
column: the candidates that win one lie before a column (`splits`), so a comparison of columns decides.

The product is the library's, in fp32, into a buffer that this kernel reads: 4 bytes written and 4 read per score, out
of L2 as far as the chunk fits. Fused with a tl.dot it would save those (0.4 ms of the 2.6 ms that XQuAD-R's product,
1.3e11 operations, takes at 50 TFLOP/s) and lose more. "ieee" products have no tensor cores, and Triton's reach about
half of the library's speed; TF32 reorders close candidates; and the threshold must come out of the same product as the
scores beside it, of which a fused kernel knows its own tile alone: thresholds would need a pass of their own. These are
estimates from the operations; nothing here is measured on a GPU yet.

Shapes: n rows of a chunk, N queries, M columns, R relevant (query, candidate) pairs, L languages, S segments.
"""

# ruff: noqa: ANN001 (Triton types the arguments of its functions itself)
from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from hbt_fast.kernels.tiles import launch_options, on_device_of

SEGMENT = 4096  # columns per program: enough programs for few rows, few enough atomics for long ones
LANES = 2048  # comparisons at a time: 16 per thread


@triton.jit(do_not_specialize=["first"])
def _count_kernel(
    scores_nM, offsets_N, positions_R, splits_RL, segments_S3, higher_RL, first, stride, L,
    PAIRS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds one row's counts in one segment. 4 bytes read per column and 16 relevant candidates."""
    row, segment = tl.program_id(0), tl.program_id(1)
    begin = tl.load(segments_S3 + 3 * segment)
    end = tl.load(segments_S3 + 3 * segment + 1)
    language = tl.load(segments_S3 + 3 * segment + 2)
    scores_M = scores_nM + row.to(tl.int64) * stride
    last_pair = tl.load(offsets_N + first + row + 1)
    for start in range(tl.load(offsets_N + first + row), last_pair, PAIRS):
        pair = start + tl.arange(0, PAIRS)
        mine = pair < last_pair
        # Out of the very row that is compared: a separately computed dot product may differ in the last bit.
        threshold = tl.load(scores_M + tl.load(positions_R + pair, mask=mine, other=0))[:, None]
        split = tl.load(splits_RL + pair * L + language, mask=mine, other=0)[:, None]
        count = tl.zeros((PAIRS, BLOCK), tl.int32)
        for at in range(begin, end, BLOCK):
            column = at + tl.arange(0, BLOCK)
            score = tl.load(scores_M + column, mask=column < end, other=float("-inf"))[None, :]
            count += ((score > threshold) | ((score == threshold) & (column[None, :] < split))).to(tl.int32)
        tl.atomic_add(higher_RL + pair * L + language, tl.sum(count, axis=1), mask=mine)


def counter(
    offsets: Tensor, positions: Tensor, blocks: Tensor, splits: Tensor, device: str | torch.device
) -> Callable[[Tensor, int, Tensor], None]:
    """Brings what is the same for all chunks to the device and returns the function that counts a chunk.

    count(scores_nM, first, higher_RL) adds to the rows of the chunk's pairs: scores_nM (n, M) float32 on the device,
    columns adjacent, rows any stride, those of queries first .. first + n - 1; higher_RL (R, L) int32, contiguous.

    Args:
        offsets: (N + 1,) int64; pairs of query i are offsets[i] .. offsets[i + 1] - 1.
        positions: (R,) int64 column of each pair's candidate.
        blocks: (L, 2) int64 first column and end of each language.
        splits: (R, L) int32 first column of the language that loses a tie against the pair's candidate.
        device: of the scores.
    """
    segments = [
        (begin, min(begin + SEGMENT, end), language)
        for language, (a, end) in enumerate(blocks.tolist())
        for begin in range(a, end, SEGMENT)
    ]
    segments_S3 = torch.tensor(segments, dtype=torch.int32).to(device)
    most = int((offsets[1:] - offsets[:-1]).max())
    pairs = min(triton.next_power_of_2(max(1, most)), 16)
    block = min(LANES // pairs, 512)  # longer ones would often overhang a language's end
    offsets, positions, splits = (x.contiguous().to(device) for x in (offsets, positions, splits))

    def count(scores_nM: Tensor, first: int, higher_RL: Tensor) -> None:
        with on_device_of(scores_nM):
            _count_kernel[(len(scores_nM), len(segments_S3))](
                scores_nM, offsets, positions, splits, segments_S3, higher_RL, first, scores_nM.stride(0),
                splits.shape[1], PAIRS=pairs, BLOCK=block, **launch_options(warps=4),
            )  # fmt: skip

    return count
