"""Tile sizes by architecture, and what every launch needs. Chosen from compiler reports; none is measured yet.

On sm_90 a tile of 128 x 256 with 8 warps is 128 fp32 accumulators a thread, the largest that leaves room for an
epilogue: in 4 pieces exp_rows needs up to 255 of 255 registers with every option on (in one piece it spills), and three
stages 147 KB of shared memory. Row and column terms together are past that with triton 3.6, hence 128 x 128. To be
measured: 128 x 128 in 4 pieces with 3 stages for exp_rows, of which two fit a processor (124 registers, 98 KB), so that
one's epilogue runs beside the other's product; and 128 x 256 for the others with triton 3.9, where it just fits. On
sm_100 accumulators come out of tensor memory with one row and half the columns per thread, and 128 x 256 spills. "ieee"
float32 has no tensor cores: small tiles; with 8 warps ptxas limits itself to fewer registers and spills.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor


class Tile(NamedTuple):
    """Rows x columns of logits per program, `depth` of D per step, Triton's warps and pipeline stages, and in how many
    pieces side by side (1, 2, 4) the epilogue goes through the columns."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    pieces: int = 1


HALF = {8: Tile(128, 128, 64, 8, 3, 2), 9: Tile(128, 256, 64, 8, 3, 4), 10: Tile(128, 128, 64, 8, 4, 4)}
HALF_SYMMETRIC = {8: Tile(128, 128, 64, 8, 3, 2), 9: Tile(128, 128, 64, 8, 4, 4), 10: Tile(128, 128, 64, 8, 4, 4)}
TF32 = {8: Tile(128, 128, 32, 8, 3, 2), 9: Tile(128, 128, 32, 8, 4, 4), 10: Tile(128, 128, 32, 8, 4, 4)}
FP32 = {8: Tile(64, 64, 16, 4, 3), 9: Tile(64, 64, 16, 4, 3), 10: Tile(64, 64, 16, 4, 3)}

# Sweeps move bytes: 8 warps hold 32 x 128 or 4 x 1024 logits, 16 per thread, as 16-byte accesses. (depth is not used.)
SWEEP = Tile(32, 128, 0, 8, 3)
SWEEP_ROWS = Tile(4, 1024, 0, 8, 3)


def architecture(device: torch.device) -> int:
    """The major compute capability that decides the tile: 8, 9 or 10; 9 where there is no GPU (interpreter)."""
    if device.type != "cuda":
        return 9
    return min(max(torch.cuda.get_device_capability(device)[0], 8), 10)


def tile_for(dtype: torch.dtype, precision: str, major: int, *, symmetric: bool) -> Tile:
    """The table's tile.

    Args:
        dtype: of the operands.
        precision: of float32 products, "ieee" or "tf32".
        major: what `architecture` says.
        symmetric: whether the epilogue has row and column terms, which takes more registers.
    """
    if dtype == torch.float32:
        return (TF32 if precision == "tf32" else FP32)[major]
    return (HALF_SYMMETRIC if symmetric else HALF)[major]


def launch_options(*, warps: int, stages: int = 3) -> dict[str, object]:
    """Keyword arguments of a Triton launch. Fused multiply-add is asked for: its default changes with triton 3.10."""
    return {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device: make it that of the tensor."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
