"""The loss of a step and its gradients, from the settings: InfoNCE, the variance regulariser, a learned temperature."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from hbt_fast.engine.backends import SettingError
from hbt_fast.loss import info_nce_with_grad, negative_variance

if TYPE_CHECKING:
    from hbt_fast.config import LossConfig
    from hbt_fast.engine.launch import World
    from hbt_fast.loss.interface import InfoNCEGrad

ACCURACY_ROWS = 1024


class LossGradient(NamedTuple):
    """A loss with its gradients.

    Attributes:
        loss: 0-d, of the global batch.
        embeddings: (n, d), scaled so that averaging the parameters' gradients over ranks gives that of the loss.
        log_scale: (1,), or None if the temperature is not learned.
    """

    loss: Tensor
    embeddings: Tensor
    log_scale: Tensor | None


class Objective:
    """The loss of one rank's share of a batch; called once per step.

    Args:
        settings: what the loss is.
        world: the ranks that share the batch.
        queries: n, how many of the embeddings are queries; the next n are their passages, the rest hard negatives.
        passage_ids: content ids of passages and negatives, int64, on the embeddings' device.

    Attributes:
        accuracy: after the call, the share of queries whose positive is the most similar passage of their rank, from
            the first 1,024 of each rank.
        temperature: after the call, the one that was used.
    """

    def __init__(self, settings: LossConfig, world: World, queries: int, passage_ids: Tensor) -> None:
        self.settings, self.world, self.queries, self.passage_ids = settings, world, queries, passage_ids
        self.accuracy = self.temperature = float("nan")

    def __call__(self, embeddings_nd: Tensor, log_scale: Tensor | None) -> LossGradient:
        """The loss of these embeddings, all (2n + h) of this rank; collective over the ranks.

        Raises:
            NotFiniteError: an embedding is NaN or infinite, on any rank.
        """
        settings, n = self.settings, self.queries
        q_Nd, p_Md = embeddings_nd[:n], embeddings_nd[n:]
        scale = 1 / settings.temperature
        if log_scale is not None:
            scale = log_scale.detach().exp().clamp(max=settings.max_scale).reshape(())
        self.temperature = 1 / float(scale)
        result = self._info_nce(q_Nd, p_Md, scale)
        loss, gradient_nd = result.loss, torch.cat([result.queries, result.passages])
        scale_gradient = result.scale
        for dimensions in settings.matryoshka_dimensions:
            with torch.enable_grad():
                leaf_nd = embeddings_nd.detach().requires_grad_()
                first_nm = F.normalize(leaf_nd[:, :dimensions], dim=-1)
            result = self._info_nce(*first_nm.detach().tensor_split([n]), scale)
            gradient_nm = torch.cat([result.queries, result.passages])
            loss, scale_gradient = loss + result.loss, scale_gradient + result.scale
            gradient_nd = gradient_nd + torch.autograd.grad(first_nm, leaf_nd, gradient_nm)[0]
        if weight := settings.variance_weight:
            with torch.enable_grad():
                leaf_nd = embeddings_nd.detach().requires_grad_()
                extra = negative_variance(leaf_nd[:n], leaf_nd[n : 2 * n], group=self.world.group)
            loss = loss + weight * extra.detach()
            gradient_nd = gradient_nd + weight * torch.autograd.grad(extra, leaf_nd)[0]
        self.accuracy = in_batch_accuracy(q_Nd, p_Md, self.world)
        return LossGradient(loss, gradient_nd, self._log_scale_gradient(log_scale, scale, scale_gradient))

    def _info_nce(self, q_Nd: Tensor, p_Md: Tensor, scale: Tensor | float) -> InfoNCEGrad:
        settings = self.settings
        return info_nce_with_grad(
            q_Nd,
            p_Md,
            scale=scale,
            passage_ids=self.passage_ids,
            query_ids=self.passage_ids[: self.queries] if settings.symmetric else None,
            duplicates=settings.duplicates,
            symmetric=settings.symmetric,
            false_negative_margin=settings.false_negative_margin,
            group=self.world.group,
            backend=settings.backend,
        )

    def _log_scale_gradient(self, log_scale: Tensor | None, scale: Tensor | float, gradient: Tensor) -> Tensor | None:
        """d loss / d log scale. At the largest scale only what would lower it again."""
        if log_scale is None:
            return None
        gradient = (gradient * scale).reshape(1).to(log_scale.dtype)
        at_most = log_scale.detach() >= math.log(self.settings.max_scale)
        return torch.where(at_most, gradient.clamp(min=0), gradient)


def check_loss(settings: LossConfig, dimension: int) -> None:
    """See that the settings can be met by embeddings of so many dimensions.

    Args:
        settings: of the loss.
        dimension: of the embeddings.

    Raises:
        SettingError: they cannot.
    """
    for m in settings.matryoshka_dimensions:
        if not 0 < m < dimension:
            raise SettingError(
                f"loss.matryoshka_dimensions has {m}; write numbers from 1 to {dimension - 1}, as [{dimension // 2}]"
            )


def in_batch_accuracy(q_Nd: Tensor, p_Md: Tensor, world: World) -> float:
    """Share of queries whose positive is the most similar passage of this rank, averaged over ranks.

    Args:
        q_Nd: this rank's queries; the first 1,024 are looked at.
        p_Md: this rank's passages, the positive of query i in row i.
        world: the ranks.
    """
    seen_Nd = q_Nd[:ACCURACY_ROWS]
    hits = ((seen_Nd @ p_Md.T).argmax(1) == torch.arange(len(seen_Nd), device=q_Nd.device)).sum()
    counts = torch.stack([hits.float(), torch.tensor(float(len(seen_Nd)), device=hits.device)])
    if world.group is not None:
        dist.all_reduce(counts, group=world.group)
    return float(counts[0] / counts[1])
