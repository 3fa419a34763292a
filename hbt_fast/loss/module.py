"""InfoNCE as a module that holds its scale."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hbt_fast.loss.arguments import check_scale
from hbt_fast.loss.interface import InfoNCEGrad, info_nce, info_nce_with_grad


class InfoNCELoss(torch.nn.Module):
    """`info_nce` with a fixed or learnable scale and fixed options.

    A learnable scale is held as its logarithm, `log_scale`, as in CLIP (arXiv 2103.00020, figure 3): it stays positive,
    and a step changes it by a factor.

    Args:
        scale: 1/temperature, at the start if it is learned.
        learnable: make `log_scale` a parameter; else the scale stays as given and is no part of the state dict.
        **options: further arguments of `info_nce`, e.g. symmetric=True; those given to forward come over them.

    Raises:
        ValueError: scale is not finite and positive.
        TypeError: an option that `info_nce` does not have.
    """

    def __init__(self, scale: float = 20.0, *, learnable: bool = False, **options: object) -> None:
        super().__init__()
        check_scale(scale)
        allowed = set(info_nce.__kwdefaults__) - {"scale"}
        if unknown := sorted(set(options) - allowed):
            raise TypeError(f"InfoNCELoss has no option {unknown[0]!r}; its options are {', '.join(sorted(allowed))}")
        self.learnable, self.options = learnable, options
        self.fixed_scale = float(scale)  # exactly as given: exp(log(20)) is not quite 20 in fp32
        if learnable:
            self.log_scale = torch.nn.Parameter(torch.tensor(math.log(float(scale)), dtype=torch.float32))

    @property
    def scale(self) -> float | Tensor:
        """1/temperature: a float, or a 0-d tensor through which the parameter learns."""
        return self.log_scale.float().exp() if self.learnable else self.fixed_scale

    def forward(self, queries: Tensor, passages: Tensor, **options: object) -> Tensor:
        """The loss of (N, d) queries and (M, d) passages; arguments and errors are those of `info_nce`."""
        return info_nce(queries, passages, scale=self.scale, **{**self.options, **options})

    def with_grad(self, queries: Tensor, passages: Tensor, **options: object) -> InfoNCEGrad:
        """As `info_nce_with_grad`. No graph is kept, so the caller passes a learnable scale's gradient on, as those of
        the embeddings: ``module.scale.backward(result.scale)``.
        """
        return info_nce_with_grad(queries, passages, scale=self.scale, **{**self.options, **options})

    def extra_repr(self) -> str:
        return f"scale={float(self.scale):.6g}, learnable={self.learnable}, {self.options}"
