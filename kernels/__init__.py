"""Triton kernels of the loss. `fused` makes the logits inside its kernels, `sweep` reads them from a buffer.

Both offer exp_rows, row_and_column_statistics and gradient with the same results; who is a negative is said in
`negatives.Negatives`. Nothing here reads a value back to the host, so every operation can be captured in a CUDA graph,
and nothing uses atomics, so equal inputs give equal bits.
"""

from hbt_fast.kernels.epilogue import Coefficients, ExpRows, Statistics
from hbt_fast.kernels.negatives import NEVER, Negatives

__all__ = ["NEVER", "Coefficients", "ExpRows", "Negatives", "Statistics"]
