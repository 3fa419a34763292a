"""GradCache (github.com/luyug/GradCache): the `loss_fn` of its cache step, computed by `info_nce`.

The lines you had::

    from grad_cache import GradCache
    from grad_cache.loss import SimpleContrastiveLoss
    step = GradCache(models=[tower, tower], chunk_sizes=32, loss_fn=SimpleContrastiveLoss(n_hard_negatives=7))

The lines you write::

    from grad_cache import GradCache
    from hbt_fast.integrations.gradcache import SimpleContrastiveLoss
    step = GradCache(models=[tower, tower], chunk_sizes=32, loss_fn=SimpleContrastiveLoss(n_hard_negatives=7))

GradCache calls loss_fn(queries, passages, **keywords of the step) and then backward on the result; its functional form
calls it with what `cat_input_tensor` has put together. Without n_hard_negatives, `hbt_fast.InfoNCELoss(scale=50.0)` is
a loss_fn as it is. This module does not need GradCache installed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from hbt_fast.loss import InfoNCELoss


class SimpleContrastiveLoss:
    """The softmax over the passages of this process.

    Args:
        n_hard_negatives: each query has 1 + n_hard_negatives rows among the passages, its positive first.
        scale: 1/temperature. 1.0, as in GradCache, where embeddings are scaled before the loss if at all.
        **options: further arguments of `info_nce`, e.g. symmetric=True.

    Raises:
        ValueError: n_hard_negatives or scale out of range.
        TypeError: an option that `info_nce` does not have.
    """

    def __init__(self, n_hard_negatives: int = 0, *, scale: float = 1.0, **options: object) -> None:
        if n_hard_negatives < 0:
            raise ValueError(f"n_hard_negatives must be 0 or more, not {n_hard_negatives}")
        self.n_hard_negatives = n_hard_negatives
        self.loss = InfoNCELoss(scale, **options)

    def __call__(
        self, x: Tensor, y: Tensor, target: Tensor | None = None, reduction: str = "mean", **options: object
    ) -> Tensor:
        """The loss of queries x (N, d) and passages y (M, d), of any float dtype.

        Args:
            x: queries.
            y: passages, M = N * (1 + n_hard_negatives) unless target is given.
            target: (N,) int64, the row of y with each query's positive; then n_hard_negatives is not used, as there.
            reduction: "mean" or "sum" (a cache step needs a scalar), or "none".
            **options: further arguments of `info_nce`, over the constructor's; passage_ids in the order of y.

        Raises:
            ValueError: the number of passages does not fit, or as `info_nce`.
        """
        rows = 1 + self.n_hard_negatives
        if target is None and rows > 1:
            if len(y) != len(x) * rows:
                raise ValueError(
                    f"n_hard_negatives={rows - 1} means {rows} passages per query, so {len(x) * rows} for {len(x)} "
                    f"queries, but there are {len(y)}; pass target= for any other layout"
                )
            # Positives to the front, where `info_nce` looks for them, also with ranks, whose sizes are not known here.
            order = torch.arange(len(y), device=y.device).view(len(x), rows).T.flatten()
            y = y[order]
            ids = options.get("passage_ids", self.loss.options.get("passage_ids"))
            if isinstance(ids, Tensor):
                options["passage_ids"] = ids.to(y.device)[order]
        if target is not None:
            options["positives"] = target
        return self.loss(x, y, reduction=reduction, **options)


class DistributedContrastiveLoss(SimpleContrastiveLoss):
    """The same with the passages of all ranks as candidates; each rank computes the rows of its own queries only.

    The loss is the mean over the queries of all ranks, on every rank. Gradients are scaled so that DDP's average over
    ranks is the gradient of that mean. Theirs is smaller by the number of ranks, as each rank's gradient holds its own
    embeddings' part only: a factor world_size in your code that makes up for it has to go.

    `target` of a call indexes the passages of all ranks, and has a row for each query of this rank (theirs: of all).

    Raises:
        RuntimeError: no process group; use SimpleContrastiveLoss.
    """

    def __init__(self, n_hard_negatives: int = 0, *, scale: float = 1.0, **options: object) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError(
                "DistributedContrastiveLoss needs torch.distributed.init_process_group; in one process use "
                "SimpleContrastiveLoss"
            )
        super().__init__(n_hard_negatives, scale=scale, **{"group": dist.group.WORLD, **options})


class ContrastiveLossWithQueryClosure(SimpleContrastiveLoss):
    """SimpleContrastiveLoss for a step that caches passages only; queries are embedded on request, with graph.

    `GradCache(models=[passage_tower], ...)` calls it with the passages, and the step's keyword query_closure makes the
    queries; their gradient flows through its graph in the same backward.
    """

    def __call__(
        self,
        *reps: Tensor,
        query_closure: Callable[[], Tensor] | None = None,
        target: Tensor | None = None,
        reduction: str = "mean",
        **options: object,
    ) -> Tensor:
        """The loss of passages (M, d) and the queries (N, d) that query_closure() returns; or of queries and passages.

        Other arguments and errors are those of SimpleContrastiveLoss.

        Raises:
            ValueError: neither passages with a query_closure, nor queries and passages without.
        """
        if len(reps) != (2 if query_closure is None else 1):
            given = "no query_closure" if query_closure is None else "a query_closure"
            raise ValueError(
                f"got {len(reps)} tensors and {given}; pass the passages and query_closure=, a function that returns "
                "the queries, or queries and passages without it"
            )
        x, y = reps if query_closure is None else (query_closure(), *reps)
        return super().__call__(x, y, target=target, reduction=reduction, **options)
