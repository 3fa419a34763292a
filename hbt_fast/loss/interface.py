"""InfoNCE for users: `info_nce`, and `info_nce_with_grad` for gradient caching; documentation and choice of form."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hbt_fast.loss.arguments import Options, computation_dtype
from hbt_fast.loss.dense import dense_losses
from hbt_fast.loss.planner import backend_for
from hbt_fast.loss.problem import as_tensor, meet_ranks, prepare
from hbt_fast.loss.ranks import Ranks
from hbt_fast.loss.tiled import tiled_info_nce
from hbt_fast.loss.traced import traced_info_nce


class _LossAndGradients(NamedTuple):
    loss: Tensor
    queries: Tensor
    passages: Tensor
    scale: Tensor


class InfoNCEGrad(_LossAndGradients):
    """A loss and its gradients: unpacks as (loss, queries, passages, scale); `own_negatives` is an attribute besides.

    Gradients have the shape and dtype of their argument; the scale's is 0-d, also for a float scale.
    """

    own_negatives: Tensor | None = None


def info_nce(
    queries: Tensor,
    passages: Tensor,
    *,
    scale: float | Tensor = 20.0,
    positives: Tensor | None = None,
    passage_ids: Tensor | None = None,
    query_ids: Tensor | None = None,
    duplicates: str = "mask",
    weights: Tensor | None = None,
    symmetric: bool = False,
    false_negative_margin: float | None = None,
    own_negatives: Tensor | None = None,
    reduction: str = "mean",
    group: torch.distributed.ProcessGroup | None = None,
    compute_dtype: str | None = None,
    workspace_bytes: int | None = None,
    backend: str = "auto",
    joint: tuple[str, ...] = (),
    owners: Tensor | None = None,
    hardness_mode: str | None = None,
    hardness_strength: float = 0.0,
) -> Tensor:
    """InfoNCE, the softmax contrastive loss with in-batch negatives (arXiv 1807.03748, equation 4).

    Of query i with positive passage y and negatives n:  log(1 + sum_n exp(s_in) / exp(s_iy)),  s = scale * Q P^T.
    Embeddings are not normalised here. Logits, softmax and sums are fp32 whatever the inputs (float64 if one of them
    is float64), also under autocast. The loss of a query without negatives is 0.

    Args:
        queries: (N, d), any float dtype, N >= 1.
        passages: (M, d); those that are nobody's positive are hard negatives shared by all queries.
        scale: 1/temperature, > 0: a float, or a 0-d tensor, which gets its gradient.
        positives: (N,) int64, the passage of each query; None: query i has passage i. Queries may share a passage. With
            a group: indices into the passages of all ranks in rank order; None: query i of a rank has its passage i.
        passage_ids: (M,) int64 content ids. A passage with the id of the query's positive is not a negative of it.
        query_ids: (N,) int64, the same for the passage-to-query half: a query with the id of the passage's own query is
            not a negative. None: queries have the id of their positive, if there are passage_ids. Not used one-way.
        duplicates: what passages (or queries) of equal id are then: "mask", nothing; or "positive", further positives:
            the loss is the mean, over the positives j, of log(1 + sum_n exp(s_in) / exp(s_ij)). Positives are never in
            each other's denominator (equation 2 of arXiv 2004.11362, SupCon, has them there).
        weights: (N,) >= 0, without gradient. They weigh both halves of a query; a mean divides by their sum.
        symmetric: average with the passage-to-query half: for every query k, its positive passage against the queries
            of all ranks. Queries that share that passage are never negatives there; they are what `duplicates` says.
        false_negative_margin: drop negatives whose cosine (of the operands as multiplied; inputs of any norm) exceeds
            that of the positive by more than this; may be below 0. No gradient flows through the comparison. In the
            passage-to-query half: queries whose cosine with the passage exceeds its own query's.
        own_negatives: (N, K, d), negatives that only their own query sees. They have no ids, and gradients.
        reduction: "mean" or "sum" over the queries of all ranks; "none": (N,) losses times weights, of this rank.
        group: passages of all ranks are candidates; each rank computes the terms of its own queries. Shards may
            differ in length. Every rank must call, and must call backward. Gradients of queries, passages and own
            negatives come times the number of ranks, so that averaging over ranks (DDP, ZeRO) gives the gradient of the
            global loss; the scale's is whole on every rank, which averaging leaves so.
        compute_dtype: round the operands to "fp16", "bf16", "tf32" or "fp32" before the products; None: as they are.
        workspace_bytes: memory that logits and temporaries may take, except "torch"; None: an eighth of the free
            memory, 64 MiB to 1 GiB. At least a row of logits is made. See `explain`.
        backend: "torch": dense, differentiable twice. "cpu": compiled, no N x M memory, once differentiable;
            "torch-chunked": the same in torch, on any device. "auto": the fastest that there is.
        joint: further directions, whose candidates join the softmax of each query: "query_to_query", the other queries;
            "doc_to_query", its positive passage against the other queries; "doc_to_doc", its positive passage against
            the other passages. Queries and passages that `positives`, ids or the margin make no negatives are none
            here. "doc_to_query" has the pair itself in the softmax a second time: n's sum is divided by 2. All three
            are equation 2 of GTE (arXiv 2308.03281), less the constant log 2. Not with symmetric.
        owners: (M,) int64, the query of this rank that a passage belongs to (its positive, its hard negatives), or -1.
            It is no negative in the "doc_to_doc" of that query; and it says whose hard negatives are whose.
        hardness_mode: to which negatives of the query-to-passage direction hardness_strength * similarity is added,
            without gradient: "in_batch_negatives", those of others; "hard_negatives", the query's own (by owners, and
            own_negatives); "all_negatives", both (arXiv 2503.04812, equation 5; 2509.20354).
        hardness_strength: >= 0, not multiplied by the scale. 0: no hardness.

    Returns:
        0-d loss, or (N,) with reduction="none"; fp32 or float64.

    Raises:
        ValueError: an argument of wrong type, shape, dtype, range or choice, named in the message; NaN or Inf in an
            input (not read back while a CUDA graph is captured). With a group it raises on every rank.
    """
    o = Options(
        positives, passage_ids, query_ids, duplicates, weights, symmetric, false_negative_margin, reduction, group,
        compute_dtype, workspace_bytes, backend, joint, owners, hardness_mode, hardness_strength,
    )  # fmt: skip
    if torch.compiler.is_compiling() and backend != "torch":
        return traced_info_nce(queries, passages, as_tensor(scale, queries.device), own_negatives, o)
    ranks = meet_ranks(queries, passages, scale, own_negatives, o)
    with torch.autocast(queries.device.type, enabled=False):
        backend, _ = backend_for(o.backend, queries.device, computation_dtype(queries, passages, own_negatives))
        if backend == "torch":
            return _dense(queries, passages, scale, own_negatives, o, ranks)
        return _Tiled.apply(
            *(queries, passages, as_tensor(scale, queries.device), own_negatives),
            o,
            ranks,
            backend,
            torch.is_grad_enabled(),
        )


def info_nce_with_grad(
    queries: Tensor,
    passages: Tensor,
    *,
    scale: float | Tensor = 20.0,
    positives: Tensor | None = None,
    passage_ids: Tensor | None = None,
    query_ids: Tensor | None = None,
    duplicates: str = "mask",
    weights: Tensor | None = None,
    symmetric: bool = False,
    false_negative_margin: float | None = None,
    own_negatives: Tensor | None = None,
    reduction: str = "mean",
    group: torch.distributed.ProcessGroup | None = None,
    compute_dtype: str | None = None,
    workspace_bytes: int | None = None,
    backend: str = "auto",
    joint: tuple[str, ...] = (),
    owners: Tensor | None = None,
    hardness_mode: str | None = None,
    hardness_strength: float = 0.0,
) -> InfoNCEGrad:
    """The loss and its gradients in one call, without an autograd graph: the middle step of gradient caching.

    Arguments, gradients and errors are those of `info_nce`, whether or not the inputs require grad, and also under
    torch.no_grad(). (arXiv 2101.06983, section 3.2.)

    Returns:
        InfoNCEGrad(loss, queries, passages, scale), with the attribute own_negatives.

    Raises:
        ValueError: as `info_nce`; and reduction="none", which has no gradient of its own.
    """
    if reduction == "none":
        raise ValueError('info_nce_with_grad needs a scalar loss: use reduction="mean" or "sum"')
    o = Options(
        positives, passage_ids, query_ids, duplicates, weights, symmetric, false_negative_margin, reduction, group,
        compute_dtype, workspace_bytes, backend, joint, owners, hardness_mode, hardness_strength,
    )  # fmt: skip
    tensors = [x.detach() if isinstance(x, Tensor) else x for x in (queries, passages, scale, own_negatives)]
    ranks = meet_ranks(*tensors, o)
    queries, passages, scale, own_negatives = tensors
    scale = as_tensor(scale, queries.device)
    with torch.autocast(queries.device.type, enabled=False):
        backend, _ = backend_for(o.backend, queries.device, computation_dtype(queries, passages, own_negatives))
        if backend == "torch":
            with torch.inference_mode(False), torch.enable_grad():
                leaves = [_leaf(x) for x in (queries, passages, scale, own_negatives) if x is not None]
                loss = _dense(*leaves, *(() if own_negatives is not None else (None,)), o, ranks)
                gradients = list(torch.autograd.grad(loss, leaves))
            loss = loss.detach()
        else:
            with torch.no_grad():
                loss, gradients = tiled_info_nce(queries, passages, scale, own_negatives, o, ranks, backend, None)
    if not isinstance(tensors[2], Tensor):
        gradients[2] = gradients[2].to(loss)
    result = InfoNCEGrad(loss, *gradients[:3])
    if own_negatives is not None:
        result.own_negatives = gradients[3]
    return result


def _leaf(x: Tensor) -> Tensor:
    return (x.clone() if x.is_inference() else x).requires_grad_()  # autograd cannot save an inference tensor


def _dense(
    queries: Tensor, passages: Tensor, scale: float | Tensor, own_negatives: Tensor | None, o: Options, ranks: Ranks
) -> Tensor:
    problem = prepare(queries, passages, scale, own_negatives, o, ranks)
    return ranks.for_averaging(problem.reduced(dense_losses(problem)))


class _Tiled(torch.autograd.Function):
    """Gradients are made in the forward pass, with the loss; only reduction="none" must wait for its cotangents."""

    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        passages: Tensor,
        scale: Tensor,
        own_negatives: Tensor | None,
        o: Options,
        ranks: Ranks,
        backend: str,
        grad_enabled: bool,
    ) -> Tensor:
        needs = ctx.needs_input_grad[:4] if grad_enabled else (False,) * 4
        ctx.call, ctx.waits = (o, ranks, backend), o.reduction == "none"
        now = (False,) * 4 if ctx.waits else needs
        loss, gradients = tiled_info_nce(queries, passages, scale, own_negatives, *ctx.call, None, now)
        ctx.save_for_backward(*((queries, passages, scale, own_negatives) if ctx.waits else gradients))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.waits:
            needs = ctx.needs_input_grad[:4]
            with torch.autocast(cotangent.device.type, enabled=False):
                _, gradients = tiled_info_nce(*ctx.saved_tensors, *ctx.call, cotangent, needs)
        else:
            gradients = [None if g is None else (g * cotangent).to(g.dtype) for g in ctx.saved_tensors]
        return *gradients, None, None, None, None
