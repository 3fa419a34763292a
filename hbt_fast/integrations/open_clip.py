"""open_clip: its ClipLoss, computed by `info_nce`; and CoCaLoss and DistillClipLoss on top of it.

The lines you had::

    from open_clip import ClipLoss
    loss = ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=world_size)
    total = loss(image_features, text_features, logit_scale)

The lines you write::

    from hbt_fast.integrations.open_clip import ClipLoss
    loss = ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=world_size)
    total = loss(image_features, text_features, logit_scale)

On several ranks the loss here is the mean over the pairs of all ranks and its gradient, after DDP's averaging, is exact
for the features and for logit_scale alike. Theirs, for W ranks (open_clip issue #616; measured in the tests):

| local_loss | gather_with_grad | features | logit_scale | here |
|---|---|---|---|---|
| True | True | exact | exact | the same |
| False | True | exact | exact | the same, at 1/W of the work |
| False | False (the default) | 1/W of it | exact | exact: W times theirs for the features |
| True | False | not a multiple of it: the terms of other ranks' rows are missing | exact | refused |

The same holds for the contrastive part of CoCaLoss and DistillClipLoss. What else reads logits (the distillation, or a
loss of your own) has them from `get_logits`, dense and with the gradients of gather_with_grad=True.

This module does not need open_clip installed.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.distributed.nn
import torch.nn.functional as F
from torch import Tensor

from hbt_fast.loss import info_nce


class ClipLoss(torch.nn.Module):
    """Symmetric InfoNCE of normalised image and text features: the mean of image -> text and text -> image.

    Args:
        local_loss: either way each rank computes the rows of its own pairs only.
        gather_with_grad: gradients flow through the gather either way; False with local_loss=True is refused.
        cache_labels: no labels are made, so that there is nothing to cache.
        rank: of this process.
        world_size: number of ranks. If above 1, torch.distributed must be initialised with it at the first call.
        use_horovod: must be False.
        compute_dtype: operands of the products, as in `info_nce`; None: the dtype of the features.
        workspace_bytes: memory for the loss, as in `info_nce`.

    Raises:
        ValueError: use_horovod=True, or local_loss=True without gather_with_grad=True on several ranks.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
        *,
        compute_dtype: str | None = None,
        workspace_bytes: int | None = None,
    ) -> None:
        super().__init__()
        if use_horovod:
            raise ValueError("use_horovod=True is not supported; start the ranks with torchrun and use_horovod=False")
        if world_size > 1 and local_loss and not gather_with_grad:
            raise ValueError(
                "local_loss=True with gather_with_grad=False leaves terms of other ranks' rows out of the gradient; "
                "write gather_with_grad=True"
            )
        self.local_loss, self.gather_with_grad, self.cache_labels = local_loss, gather_with_grad, cache_labels
        self.rank, self.world_size, self.use_horovod = rank, world_size, use_horovod
        self.compute_dtype, self.workspace_bytes = compute_dtype, workspace_bytes

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of N pairs.

        Args:
            image_features: (N, d), any float dtype, normalised.
            text_features: (N, d), row i belongs to image i.
            logit_scale: 1/temperature (not its logarithm), a float or a tensor of one element, which gets its gradient.
            logit_bias: adds the same to all logits, which a softmax does not see; a tensor gets the gradient 0.
            output_dict: return {"contrastive_loss": loss}.

        Returns:
            0-d loss, fp32 or float64.

        Raises:
            ValueError: as `info_nce`; rank and world_size that are not those of torch.distributed.
        """
        if isinstance(logit_scale, Tensor) and logit_scale.numel() == 1:
            logit_scale = logit_scale.reshape(())  # nonscalar_logit_scale makes it (1,)
        loss = info_nce(
            image_features,
            text_features,
            scale=logit_scale,
            symmetric=True,
            group=self._group(),
            compute_dtype=self.compute_dtype,
            workspace_bytes=self.workspace_bytes,
        )
        if isinstance(logit_bias, Tensor) and logit_bias.requires_grad:
            loss = loss + 0.0 * logit_bias.sum()  # so that DDP sees its parameter used
        return {"contrastive_loss": loss} if output_dict else loss

    def get_logits(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(R, A) logits per image and per text, for losses that read them: A pairs of all ranks, and R of them: the
        rank's own N with local_loss, else all. Every rank must have the same N. `forward` makes none of them.
        """
        images, texts, all_images, all_texts = image_features, text_features, image_features, text_features
        if self._group() is not None:
            all_images, all_texts = (
                torch.cat(torch.distributed.nn.all_gather(x.contiguous())) for x in (image_features, text_features)
            )
            images, texts = (images, texts) if self.local_loss else (all_images, all_texts)
        logits = logit_scale * images @ all_texts.T, logit_scale * texts @ all_images.T
        return logits if logit_bias is None else (logits[0] + logit_bias, logits[1] + logit_bias)

    def get_ground_truth(self, device: torch.device, num_logits: int) -> Tensor:
        """(num_logits,) int64: the column of each row's own pair in what `get_logits` returns."""
        start = num_logits * self.rank if self.world_size > 1 and self.local_loss else 0
        return torch.arange(start, start + num_logits, device=device)

    def _group(self) -> dist.ProcessGroup | None:
        if self.world_size == 1:
            return None
        ready = dist.is_available() and dist.is_initialized()
        found = (dist.get_rank(), dist.get_world_size()) if ready else None
        if found != (self.rank, self.world_size):
            actual = "is not initialised" if found is None else f"has rank {found[0]} of {found[1]}"
            raise ValueError(f"rank={self.rank}, world_size={self.world_size}, but torch.distributed {actual}")
        return dist.group.WORLD


class CoCaLoss(ClipLoss):
    """ClipLoss times clip_loss_weight, and the cross entropy of the captions' tokens times caption_loss_weight.

    Args:
        caption_loss_weight: of the captions.
        clip_loss_weight: of the pairs; 0: their loss is not computed.
        pad_id: the label of tokens that do not count.
        local_loss, gather_with_grad, cache_labels, rank, world_size, use_horovod, **more: as of ClipLoss.
    """

    def __init__(
        self,
        caption_loss_weight: float,
        clip_loss_weight: float,
        pad_id: int = 0,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
        **more: object,
    ) -> None:
        super().__init__(local_loss, gather_with_grad, cache_labels, rank, world_size, use_horovod, **more)
        self.caption_loss_weight, self.clip_loss_weight = caption_loss_weight, clip_loss_weight
        self.caption_loss = torch.nn.CrossEntropyLoss(ignore_index=pad_id)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logits: Tensor,
        labels: Tensor,
        logit_scale: Tensor | float,
        output_dict: bool = False,
    ) -> tuple[Tensor, Tensor] | dict[str, Tensor]:
        """The two losses of N pairs: (N, L, V) logits and (N, L) int64 labels of the captions; the rest as ClipLoss."""
        contrastive = torch.zeros((), device=logits.device)
        if self.clip_loss_weight:
            contrastive = self.clip_loss_weight * super().forward(image_features, text_features, logit_scale)
        caption = self.caption_loss_weight * self.caption_loss(logits.transpose(1, 2), labels)
        return {"contrastive_loss": contrastive, "caption_loss": caption} if output_dict else (contrastive, caption)


class DistillClipLoss(ClipLoss):
    """ClipLoss, and the cross entropy of the student's softmax against the teacher's, which reads dense logits."""

    def dist_loss(self, teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
        """Mean over rows of (R, A) logits of -sum_j p_teacher log p_student."""
        return F.cross_entropy(student_logits, teacher_logits.softmax(dim=1))

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        dist_image_features: Tensor,
        dist_text_features: Tensor,
        dist_logit_scale: Tensor | float,
        output_dict: bool = False,
    ) -> tuple[Tensor, Tensor] | dict[str, Tensor]:
        """The two losses of N pairs; dist_* are the teacher's features, of any width of their own, and its scale."""
        contrastive = super().forward(image_features, text_features, logit_scale)
        students = self.get_logits(image_features, text_features, logit_scale)
        teachers = self.get_logits(dist_image_features, dist_text_features, dist_logit_scale)
        distill = sum(map(self.dist_loss, teachers, students)) / 2
        return {"contrastive_loss": contrastive, "distill_loss": distill} if output_dict else (contrastive, distill)
