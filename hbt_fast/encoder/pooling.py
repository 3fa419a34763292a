"""From the hidden states of packed texts to one vector of each, in float32.

Shape legend: T tokens in all, n texts, d dimensions.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

Pooling = Literal["mean", "cls", "last", "weighted_mean"]
POOLINGS = get_args(Pooling)


def pool(hidden_Td: Tensor, cu_seqlens: Tensor, text_T: Tensor, how: Pooling) -> Tensor:
    """One vector per text, (n, d), float32 (float64 if the hidden states are).

    Args:
        hidden_Td: hidden states, one text after the other.
        cu_seqlens: (n + 1,) int, text i has the tokens from cu_seqlens[i] to cu_seqlens[i + 1].
        text_T: (T,) int64, the text of each token.
        how: "mean" of the tokens; "cls", the first; "last"; or "weighted_mean", where the token at position p, from 1,
            has the weight p (Muennighoff, arXiv 2202.08904, eq. 2).
    """
    dtype = torch.promote_types(hidden_Td.dtype, torch.float32)
    if how in ("cls", "last"):
        return hidden_Td[cu_seqlens[:-1] if how == "cls" else cu_seqlens[1:] - 1].to(dtype)
    length_n = cu_seqlens.diff().to(dtype)
    if how == "mean":
        weight_T = (1 / length_n)[text_T]
    else:
        position_T = torch.arange(1, len(text_T) + 1, device=text_T.device) - cu_seqlens[:-1][text_T]
        weight_T = position_T.to(dtype) / (length_n * (length_n + 1) / 2)[text_T]
    return _WeightedSum.apply(hidden_Td, weight_T, text_T, len(length_n))


class _WeightedSum(torch.autograd.Function):
    """Sums of weighted rows by text; saves no hidden states, and is the same in every run."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x_Td: Tensor, w_T: Tensor, text_T: Tensor, n: int) -> Tensor:
        ctx.save_for_backward(w_T, text_T)
        ctx.dtype = x_Td.dtype
        weighted_Td = x_Td * w_T[:, None]
        if x_Td.is_cuda:  # where index_add_ would add in any order
            return torch.segment_reduce(weighted_Td, "sum", lengths=torch.bincount(text_T, minlength=n), axis=0)
        return weighted_Td.new_zeros(n, x_Td.shape[1]).index_add_(0, text_T, weighted_Td)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient_nd: Tensor) -> tuple[Tensor, None, None, None]:
        w_T, text_T = ctx.saved_tensors
        return (gradient_nd[text_T] * w_T[:, None]).to(ctx.dtype), None, None, None
