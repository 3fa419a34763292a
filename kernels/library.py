"""Products by the library, and what lets them be added up where they are made.

Shapes: any; (A, K) @ (K, B) -> (A, B).
"""

# ruff: noqa: ANN001 (Triton types the arguments of its functions itself)
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hbt_fast.kernels.tiles import launch_options, on_device_of

RESCALE_BLOCK = 4096


def add_product(out_AB: Tensor, a_AK: Tensor, b_KB: Tensor, *, beta: int = 1) -> Tensor:
    """out = beta * out + a @ b, summed in float32 inside the product: `out` is read and written once, nothing is made.

    Args:
        out_AB: (A, B) float32. With beta 0 it may hold anything.
        a_AK: (A, K) float16, bfloat16 or float32; float32 is multiplied as torch is set to (TF32 or not).
        b_KB: (K, B), same dtype and device.
        beta: 0 or 1.

    Returns:
        out_AB.

    Raises:
        RuntimeError: torch's, for shapes, dtypes or devices that do not go together.
    """
    if a_AK.dtype == torch.float32:
        return torch.addmm(out_AB, a_AK, b_KB, beta=beta, out=out_AB)
    if a_AK.is_cuda:
        return torch.addmm(out_AB, a_AK, b_KB, out_dtype=torch.float32, beta=beta, out=out_AB)
    return _add_product_of_halves(out_AB, a_AK, b_KB, beta)


def _add_product_of_halves(out_AB: Tensor, a_AK: Tensor, b_KB: Tensor, beta: int) -> Tensor:
    """For the interpreter: the CPU's library has no such product, so copies are made that a GPU does without."""
    return torch.addmm(out_AB, a_AK.float(), b_KB.float(), beta=beta, out=out_AB)


@triton.jit
def _rescale_kernel(x, ratio, size, BLOCK: tl.constexpr):
    factor = tl.load(ratio)
    if factor != 1.0:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        tl.store(x + at, tl.load(x + at, mask=at < size) * factor, mask=at < size)


def rescale(x: Tensor, ratio: Tensor) -> None:
    """x *= ratio; where the ratio is 1, which only the device knows, `x` is neither read nor written.

    Args:
        x: float32, contiguous, any shape.
        ratio: 0-d float32 on the same device.

    Raises:
        ValueError: x is not contiguous, or a dtype or device is not as above.
    """
    if x.dtype != torch.float32 or ratio.dtype != torch.float32 or ratio.dim() != 0 or x.device != ratio.device:
        raise ValueError(f"x is {x.dtype} on {x.device}, ratio {tuple(ratio.shape)} {ratio.dtype} on {ratio.device}")
    if not x.is_contiguous():
        raise ValueError("x must be contiguous")
    with on_device_of(x):
        grid = (triton.cdiv(x.numel(), RESCALE_BLOCK),)
        _rescale_kernel[grid](x, ratio, x.numel(), BLOCK=RESCALE_BLOCK, **launch_options(warps=4))
