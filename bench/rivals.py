"""Others that compute the same loss, each as one small function: (queries, passages) -> loss and both gradients.

All take unit vectors. A rival that is not installed, or needs what is not here, is left out by name with the reason.
`passes` counts N x M x d products, one-way and symmetric, as their sources have them; None: it has no such direction.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

SCALE = 50.0  # a temperature of 0.02
Answer = tuple[Tensor, Tensor, Tensor]


class Rival(NamedTuple):
    """`make(symmetric)` imports what it needs and returns the loss function; ImportError says what is missing."""

    make: Callable[[bool], Callable[[Tensor, Tensor], Answer]]
    passes: tuple[str | None, str | None]
    cuda_only: bool = True


def _differentiated(loss_of: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Answer]:
    def answer(q: Tensor, p: Tensor) -> Answer:
        leaves = [x.detach().requires_grad_() for x in (q, p)]
        loss = loss_of(*leaves)
        return loss.detach(), *torch.autograd.grad(loss, leaves)

    return answer


def _labels(q: Tensor) -> Tensor:
    return torch.arange(q.shape[0], device=q.device)


def _one_way(q: Tensor, p: Tensor) -> Tensor:
    return F.cross_entropy((SCALE * q @ p.T).float(), _labels(q))


def _symmetric(q: Tensor, p: Tensor) -> Tensor:
    s, y = (SCALE * q @ p.T).float(), _labels(q)
    return (F.cross_entropy(s, y) + F.cross_entropy(s.T, y)) / 2


def dense(symmetric: bool) -> Callable[[Tensor, Tensor], Answer]:
    """What one writes first."""
    return _differentiated(_symmetric if symmetric else _one_way)


def compiled(symmetric: bool) -> Callable[[Tensor, Tensor], Answer]:
    return _differentiated(torch.compile(_symmetric if symmetric else _one_way, dynamic=False))


def linear_cross_entropy(symmetric: bool) -> Callable[[Tensor, Tensor], Answer]:
    """Its chunked form. With the default, options=None, it is the dense loss."""
    if not hasattr(F, "linear_cross_entropy"):
        raise ImportError(f"torch {torch.__version__} has no F.linear_cross_entropy")
    from torch.nn import LinearCrossEntropyOptions

    options = LinearCrossEntropyOptions()
    return _differentiated(lambda q, p: F.linear_cross_entropy(SCALE * q, p, _labels(q), options=options))


def sentence_transformers(symmetric: bool) -> Callable[[Tensor, Tensor], Answer]:
    """The middle step of its cached loss, on embeddings that are there; 32 rows at a time, its default."""
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
    from sentence_transformers.util import dot_score

    model = torch.nn.Sequential(torch.nn.Identity())  # not called: the embeddings are there
    stage = CachedMultipleNegativesRankingLoss(model, scale=SCALE, similarity_fct=dot_score)

    def answer(q: Tensor, p: Tensor) -> Answer:
        q, p = (x.detach().requires_grad_() for x in (q, p))
        loss = stage.calculate_loss([[q], [p]], None, with_backward=True)
        return loss, q.grad, p.grad

    return answer


def inf_cl(symmetric: bool) -> Callable[[Tensor, Tensor], Answer]:
    from inf_cl import cal_flash_loss

    def loss_of(q: Tensor, p: Tensor) -> Tensor:
        if q.shape[1] % 256:
            raise ValueError("inf-cl needs d to be a multiple of 256")
        loss = cal_flash_loss(q, p, scale=SCALE).mean()
        return (loss + cal_flash_loss(p, q, scale=SCALE).mean()) / 2 if symmetric else loss

    return _differentiated(loss_of)


def memeff(symmetric: bool) -> Callable[[Tensor, Tensor], Answer]:
    """stable=False: with its default the gradient is another, rescaled one. margin=2: no false-negative mask."""
    from memeff import MemoryEfficientCLIPLoss, MemoryEfficientQwen3Loss

    common = {"temperature": 1 / SCALE, "normalized_inputs": True, "stable": False}
    return _differentiated(
        MemoryEfficientCLIPLoss(**common) if symmetric else MemoryEfficientQwen3Loss(margin=2.0, **common)
    )


def cut_cross_entropy(symmetric: bool) -> Callable[[Tensor, Tensor], Answer]:
    from cut_cross_entropy import linear_cross_entropy

    return _differentiated(lambda q, p: linear_cross_entropy(SCALE * q, p, _labels(q)))


def liger(symmetric: bool) -> Callable[[Tensor, Tensor], Answer]:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss()
    return _differentiated(lambda q, p: loss(p, SCALE * q, _labels(q)))


RIVALS = {
    "dense torch": Rival(dense, ("3", "3"), cuda_only=False),
    "torch.compile of it": Rival(compiled, ("3", "3"), cuda_only=False),
    "F.linear_cross_entropy": Rival(linear_cross_entropy, ("3", None), cuda_only=False),
    "sentence-transformers": Rival(sentence_transformers, ("3", None), cuda_only=False),
    "inf-cl": Rival(inf_cl, ("5", "10")),
    "memeff": Rival(memeff, ("4-5", "4-5")),
    "cut-cross-entropy": Rival(cut_cross_entropy, ("4", None)),
    "liger": Rival(liger, ("3", None)),
}


@functools.cache  # one torch.compile for all sizes would be dropped with its caller
def rival(name: str, symmetric: bool) -> Callable[[Tensor, Tensor], Answer]:
    """The rival's function. Raises ImportError with the reason where it cannot be had."""
    if RIVALS[name].cuda_only and not torch.cuda.is_available():
        raise ImportError(f"{name} needs a GPU")
    return RIVALS[name].make(symmetric)
