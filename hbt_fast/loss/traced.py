"""The loss as one registered operator, so that torch.compile(fullgraph=True) takes it as a whole.

While torch traces, nothing is computed and nothing can be checked; the operator does both when the graph runs. Only
shapes and dtypes of its results are told to the tracer.
"""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hbt_fast.loss.arguments import Options, computation_dtype
from hbt_fast.loss.planner import backend_for
from hbt_fast.loss.problem import meet_ranks
from hbt_fast.loss.tiled import tiled_info_nce

MaybeTensor = Optional[Tensor]  # noqa: UP045 (the operator's schema is read from annotations, which must be old-style)
MaybeFloat, MaybeInt, MaybeStr = Optional[float], Optional[int], Optional[str]  # noqa: UP045


def traced_info_nce(
    queries: Tensor, passages: Tensor, scale: Tensor, own_negatives: Tensor | None, o: Options
) -> Tensor:
    """`info_nce` in a graph that is being traced; the same arguments and result."""
    group = None if o.group is None else o.group.group_name
    settings = (
        o.positives, o.passage_ids, o.query_ids, o.weights, o.duplicates, bool(o.symmetric), o.false_negative_margin,
        o.reduction, group, o.compute_dtype, o.workspace_bytes, o.backend, ",".join(o.joint), o.owners,
        o.hardness_mode, float(o.hardness_strength),
    )  # fmt: skip
    return _Traced.apply(queries, passages, scale, own_negatives, torch.is_grad_enabled(), *settings)


def _operator(
    queries: Tensor,
    passages: Tensor,
    scale: Tensor,
    own_negatives: MaybeTensor,
    cotangents: MaybeTensor,
    needs: list[bool],
    positives: MaybeTensor,
    passage_ids: MaybeTensor,
    query_ids: MaybeTensor,
    weights: MaybeTensor,
    duplicates: str,
    symmetric: bool,
    false_negative_margin: MaybeFloat,
    reduction: str,
    group: MaybeStr,
    compute_dtype: MaybeStr,
    workspace_bytes: MaybeInt,
    backend: str,
    joint: str,
    owners: MaybeTensor,
    hardness_mode: MaybeStr,
    hardness_strength: float,
) -> list[Tensor]:
    """The loss and the gradients of the first four arguments, empty for those that `needs` leaves out."""
    if group is not None:
        group = torch.distributed.distributed_c10d._resolve_process_group(group)
    o = Options(
        positives, passage_ids, query_ids, duplicates, weights, symmetric, false_negative_margin, reduction, group,
        compute_dtype, workspace_bytes, backend, tuple(joint.split(",")) if joint else (), owners, hardness_mode,
        hardness_strength,
    )  # fmt: skip
    inputs = (queries, passages, scale, own_negatives)
    ranks = meet_ranks(*inputs, o)
    backend, _ = backend_for(backend, queries.device, computation_dtype(queries, passages, own_negatives))
    with torch.no_grad(), torch.autocast(queries.device.type, enabled=False):
        loss, gradients = tiled_info_nce(*inputs, o, ranks, backend, cotangents, tuple(needs))
    return [loss, *(queries.new_empty(0) if g is None else g for g in gradients)]


def _shapes(
    queries: Tensor,
    passages: Tensor,
    scale: Tensor,
    own_negatives: Tensor | None,
    cotangents: Tensor | None,
    needs: list[bool],
    *settings: object,
) -> list[Tensor]:
    shape = (queries.shape[0],) if "none" in settings[:8] else ()
    loss = queries.new_empty(shape, dtype=computation_dtype(queries, passages, own_negatives))
    inputs = (queries, passages, scale, own_negatives)
    given = [need and x is not None for need, x in zip(needs, inputs, strict=True)]
    return [loss, *(torch.empty_like(x) if g else queries.new_empty(0) for g, x in zip(given, inputs, strict=True))]


_info_nce = torch.library.custom_op("hbt_fast::info_nce", _operator, mutates_args=())
_info_nce.register_fake(_shapes)


class _Traced(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        passages: Tensor,
        scale: Tensor,
        own_negatives: Tensor | None,
        grad_enabled: bool,
        *settings: object,
    ) -> Tensor:
        inputs = (queries, passages, scale, own_negatives)
        needs = [grad_enabled and need for need in ctx.needs_input_grad[:4]]
        ctx.settings, ctx.waits = settings, "none" in settings[:8]
        loss, *gradients = _info_nce(*inputs, None, [False] * 4 if ctx.waits else needs, *settings)
        ctx.save_for_backward(*(inputs if ctx.waits else gradients))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        needs = list(ctx.needs_input_grad[:4])
        if ctx.waits:
            _, *gradients = _info_nce(*ctx.saved_tensors, cotangent, needs, *ctx.settings)
        else:
            gradients = [(g * cotangent).to(g.dtype) for g in ctx.saved_tensors]
        return *(g if need else None for g, need in zip(gradients, needs, strict=True)), None, *(None,) * 16
