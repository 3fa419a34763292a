"""Hugging Face Trainer: InfoNCE as its `compute_loss_func`, or as a mixin, for a model that returns both embeddings.

The lines you had::

    class RetrievalTrainer(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            out = model(**inputs)
            q, p = F.normalize(out["query_embeddings"], dim=-1), F.normalize(out["passage_embeddings"], dim=-1)
            loss = F.cross_entropy(20.0 * q @ p.T, torch.arange(len(q), device=q.device))
            return (loss, out) if return_outputs else loss

    trainer = RetrievalTrainer(model, args, train_dataset=pairs, data_collator=collate)

The lines you write::

    class RetrievalTrainer(RetrievalTrainerMixin, Trainer):
        pass

    trainer = RetrievalTrainer(
        model, args, train_dataset=pairs, data_collator=collate, retrieval_loss=RetrievalLoss(20.0)
    )

or, where batches hold labels or gradients are not accumulated (see RetrievalLoss)::

    trainer = Trainer(model, args, train_dataset=pairs, data_collator=collate, compute_loss_func=RetrievalLoss(20.0))

This module does not import transformers.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from hbt_fast.loss import InfoNCELoss

IGNORED = -100  # the label of a row without loss, as everywhere in transformers
MADE_HERE = ("positives", "weights", "reduction")


class RetrievalLoss:
    """loss(outputs, labels, num_items_in_batch) with in-batch negatives.

    Trainer takes what a compute_loss_func returns to be normalised over all accumulated batches. It is, if batches hold
    labels, which Trainer counts. Without labels, gradient_accumulation_steps=k makes gradients k times too large, and
    no compute_loss_func can know: use RetrievalTrainerMixin.

    Args:
        scale: 1/temperature.
        normalize: divide embeddings by their norm first (cosine similarity).
        queries: where the model's output holds the (N, d) query embeddings: a key, an attribute, or an index.
        passages: the same for the (M, d) passages, M >= N; those beyond N are hard negatives.
        **options: further arguments of `info_nce`, e.g. symmetric=True or group=torch.distributed.group.WORLD.

    Raises:
        ValueError: an option that is made from the labels here: positives, weights, reduction.
        TypeError: an option that `info_nce` does not have.
    """

    def __init__(
        self,
        scale: float = 20.0,
        *,
        normalize: bool = True,
        queries: str | int = "query_embeddings",
        passages: str | int = "passage_embeddings",
        **options: object,
    ) -> None:
        if wrong := [name for name in MADE_HERE if name in options]:
            raise ValueError(f"{wrong[0]} is made from the labels and num_items_in_batch; leave it out")
        self.loss = InfoNCELoss(scale, **options)
        self.normalize, self.queries, self.passages = normalize, queries, passages

    def __call__(
        self, outputs: Any, labels: Tensor | None = None, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """The loss of one batch.

        Args:
            outputs: of the model: a ModelOutput, dict, tuple, or object with attributes.
            labels: (N,) integers, the row of each query's positive among the passages of this process; -100: no loss of
                this query. None: query i has passage i.
            num_items_in_batch: rows to divide the sum by; None: the mean over the rows.

        Raises:
            ValueError: the output does not hold the embeddings, or as `info_nce`.
        """
        q, p = _find(outputs, self.queries), _find(outputs, self.passages)
        if self.normalize:
            q, p = F.normalize(q, dim=-1), F.normalize(p, dim=-1)
        group, options = self.loss.options.get("group"), {}
        if labels is not None:
            labels = labels.to(q.device, torch.int64).flatten()
            first = _passages_before(len(p), group, q.device)
            options = {"positives": labels.clamp_min(0) + first, "weights": (labels != IGNORED).to(q.dtype)}
        if num_items_in_batch is None:
            return self.loss(q, p, **options)
        ranks = 1 if group is None else dist.get_world_size(group)  # Trainer expects a sum over this rank's rows
        return self.loss(q, p, reduction="sum", **options) / (num_items_in_batch * ranks)


class RetrievalTrainerMixin:
    """`class RetrievalTrainer(RetrievalTrainerMixin, Trainer)`: the loss of a batch is its mean, and Trainer divides it
    by gradient_accumulation_steps, with labels or without. Evaluation reports the loss without labels too.

    Args:
        *args: of Trainer.
        retrieval_loss: a RetrievalLoss, or any callable of (outputs, labels) that returns a mean.
        **kwargs: of Trainer.
    """

    def __init__(self, *args: Any, retrieval_loss: RetrievalLoss, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.compute_loss_func is not None:
            raise ValueError("compute_loss_func and retrieval_loss are two losses; pass one of them")
        self.retrieval_loss = retrieval_loss
        self.model_accepts_loss_kwargs = False  # the loss is a mean per batch, whatever the model's forward takes
        self.can_return_loss = True

    def compute_loss(
        self, model: torch.nn.Module, inputs: dict, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """As Trainer.compute_loss; num_items_in_batch is not used."""
        outputs = model(**{name: x for name, x in inputs.items() if name != "labels"})
        loss = self.retrieval_loss(outputs, inputs.get("labels"))
        return (loss, outputs) if return_outputs else loss


def _find(outputs: Any, name: str | int) -> Tensor:
    try:
        return outputs[name]
    except (KeyError, IndexError, TypeError):
        if isinstance(name, str) and isinstance(getattr(outputs, name, None), Tensor):
            return getattr(outputs, name)
    found = ", ".join(map(repr, outputs)) if isinstance(outputs, dict) else f"a {type(outputs).__name__}"
    raise ValueError(
        f"the model's output has no {name!r}; it holds {found}; pass RetrievalLoss(queries=..., passages=...) the names"
    )


def _passages_before(count: int, group: dist.ProcessGroup | None, device: torch.device) -> int:
    """How many passages lower ranks have: where this rank's begin among those of all."""
    if group is None:
        return 0
    counts = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(dist.get_world_size(group))]
    dist.all_gather(counts, torch.tensor([count], device=device), group=group)
    return int(sum(counts[: dist.get_rank(group)]))
