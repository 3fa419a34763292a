"""What a caller may pass to the losses, and the error that each mistake gets.

Shapes: N queries of this process, M passages of this process, K own negatives per query, D dimensions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hbt_fast.loss.planner import backend_for
from hbt_fast.loss.ranks import NotFiniteError

COMPUTE_DTYPES = ("fp16", "bf16", "tf32", "fp32")
DUPLICATES = ("mask", "positive")
REDUCTIONS = ("mean", "sum", "none")
BACKENDS = ("auto", "triton", "cpu", "torch", "torch-chunked")
DIRECTIONS = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
HARDNESS_MODES = ("in_batch_negatives", "hard_negatives", "all_negatives")
FP16_OVERFLOW = 65520.0  # rounds to infinity


@dataclass(frozen=True, slots=True)
class Options:
    """Everything of an `info_nce` call that is not differentiated; the fields are that function's arguments."""

    positives: Tensor | None
    passage_ids: Tensor | None
    query_ids: Tensor | None
    duplicates: str
    weights: Tensor | None
    symmetric: bool
    false_negative_margin: float | None
    reduction: str
    group: torch.distributed.ProcessGroup | None
    compute_dtype: str | None
    workspace_bytes: int | None
    backend: str
    joint: tuple[str, ...]
    owners: Tensor | None
    hardness_mode: str | None
    hardness_strength: float


def check_arguments(
    queries: Tensor, passages: Tensor, scale: float | Tensor, own_negatives: Tensor | None, o: Options
) -> None:
    """Raise ValueError for the first argument that is wrong in itself. What depends on other ranks is checked later."""
    check_choice("duplicates", o.duplicates, DUPLICATES)
    check_choice("reduction", o.reduction, REDUCTIONS)
    if o.compute_dtype is not None:
        check_choice("compute_dtype", o.compute_dtype, COMPUTE_DTYPES)
    if o.backend not in BACKENDS:
        raise ValueError(f"backend={o.backend!r} is not available; available: {', '.join(map(repr, BACKENDS))}")
    if o.workspace_bytes is not None and (not isinstance(o.workspace_bytes, int) or o.workspace_bytes < 1):
        raise ValueError(f"workspace_bytes must be an int >= 1 (or None), not {o.workspace_bytes!r}")

    if o.group is not None and not isinstance(o.group, torch.distributed.ProcessGroup):
        raise ValueError(
            "group must be a torch.distributed group that this rank is in, e.g. torch.distributed.group.WORLD, "
            f"not {o.group!r}"
        )
    check_embeddings(queries, passages)
    n, m, d = queries.shape[0], passages.shape[0], queries.shape[1]
    check_scale(scale)
    if own_negatives is not None:
        check_float_tensor("own_negatives", own_negatives)
        if own_negatives.ndim != 3 or own_negatives.shape[0] != n or own_negatives.shape[2] != d:
            shape = tuple(own_negatives.shape)
            raise ValueError(f"own_negatives must have shape (N, K, d) = ({n}, K, {d}), not {shape}")
        check_same_device("own_negatives", own_negatives, queries)
        check_finite("own_negatives", own_negatives)

    if o.compute_dtype == "fp16":
        for name, x in (("queries", queries), ("passages", passages), ("own_negatives", own_negatives)):
            if x is not None and x.numel() and not capturing(x) and _largest(x) >= FP16_OVERFLOW:
                raise ValueError(f'{name} overflows in fp16 (above 65504); normalise it, or use compute_dtype="bf16"')
    check_integers("positives", o.positives, n, "one passage index per query")
    check_integers("passage_ids", o.passage_ids, m, "one content id per passage")
    check_integers("query_ids", o.query_ids, n, "one content id per query")
    if o.positives is None and m < n:
        raise ValueError(
            f"positives is None, which pairs query i with passage i, but there are {n} queries and only {m} passages; "
            "pass positives=, an int64 tensor with the passage index of each query"
        )
    if o.false_negative_margin is not None and not math.isfinite(o.false_negative_margin):
        raise ValueError(f"false_negative_margin must be a finite number or None, not {o.false_negative_margin!r}")
    check_weights(o.weights, n)
    check_joint(o.joint, o.symmetric)
    check_integers("owners", o.owners, m, "the query of each passage, or -1")
    if o.owners is not None and not capturing(o.owners) and not bool(((o.owners >= -1) & (o.owners < n)).all()):
        raise ValueError(f"owners must be queries of this rank, in [0, {n}), or -1")
    if o.hardness_mode is not None:
        check_choice("hardness_mode", o.hardness_mode, HARDNESS_MODES)
    if not (math.isfinite(o.hardness_strength) and o.hardness_strength >= 0):
        raise ValueError(f"hardness_strength must be a finite number >= 0, not {o.hardness_strength!r}")
    backend_for(o.backend, queries.device, computation_dtype(queries, passages, own_negatives))


def computation_dtype(*tensors: Tensor | None) -> torch.dtype:
    """What logits and sums are computed in: float32, or float64 if a tensor is."""
    dtype = torch.float32
    for x in tensors:
        dtype = dtype if x is None else torch.promote_types(dtype, x.dtype)
    return dtype


def check_embeddings(queries: Tensor, passages: Tensor) -> None:
    """Both are non-empty finite float matrices of one width on one device."""
    for name, x in (("queries", queries), ("passages", passages)):
        check_float_tensor(name, x)
        if x.ndim != 2 or x.shape[0] < 1 or x.shape[1] < 1:
            rows = "N" if name == "queries" else "M"
            raise ValueError(f"{name} must have shape ({rows}, d) with {rows}, d >= 1, not {tuple(x.shape)}")
    if queries.shape[1] != passages.shape[1]:
        raise ValueError(
            f"queries and passages must have the same width d, not {queries.shape[1]} and {passages.shape[1]}"
        )
    check_same_device("passages", passages, queries)
    check_finite("queries", queries)
    check_finite("passages", passages)


def check_scale(scale: float | Tensor) -> None:
    if isinstance(scale, Tensor):
        if scale.ndim != 0 or not scale.is_floating_point():
            raise ValueError(
                f"scale must be a float or a 0-d float tensor, not shape {tuple(scale.shape)} of {scale.dtype}; "
                "write scale.squeeze()"
            )
        if capturing(scale):
            return
    elif isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise ValueError(f"scale must be a float or a 0-d float tensor, not {type(scale).__name__}")
    value = float(scale.detach() if isinstance(scale, Tensor) else scale)
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"scale must be finite and > 0 (it is 1/temperature, e.g. 20.0), not {value}")


def check_weights(weights: Tensor | None, n: int) -> None:
    if weights is None:
        return
    if not isinstance(weights, Tensor) or tuple(weights.shape) != (n,) or weights.is_complex():
        raise ValueError(f"weights must be a tensor of shape ({n},), one weight per query; got {describe(weights)}")
    if weights.requires_grad:
        raise ValueError("weights gets no gradient; pass weights.detach()")
    if not capturing(weights) and not bool((torch.isfinite(weights) & (weights >= 0)).all()):
        raise ValueError("weights must be finite and >= 0")


def check_joint(joint: tuple[str, ...], symmetric: bool) -> None:
    if not isinstance(joint, tuple | list) or not all(isinstance(x, str) for x in joint):
        raise ValueError(f"joint must be a tuple of names, e.g. ('query_to_query',), not {joint!r}")
    for name in joint:
        check_choice("joint", name, DIRECTIONS)
    if symmetric and set(joint) - {"query_to_doc"}:
        raise ValueError(
            "symmetric=True has a softmax per direction and joint one over all; write symmetric=False, with "
            '"doc_to_query" in joint for both ways, or joint=()'
        )


def check_integers(name: str, x: Tensor | None, length: int, meaning: str) -> None:
    if x is None:
        return
    if not isinstance(x, Tensor) or x.dtype != torch.int64 or tuple(x.shape) != (length,):
        raise ValueError(f"{name} must be an int64 tensor of shape ({length},), {meaning}; got {describe(x)}")


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, not {value!r}")


def check_float_tensor(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise ValueError(f"{name} must be a floating-point tensor; got {describe(x)}")


def check_same_device(name: str, x: Tensor, queries: Tensor) -> None:
    if x.device != queries.device:
        raise ValueError(f"{name} is on {x.device} but queries is on {queries.device}; move one with .to(...)")


def check_finite(name: str, x: Tensor) -> None:
    """NaN or Inf raises; while a CUDA graph is captured nothing can be read back, and it shows in the loss instead."""
    if capturing(x) or bool(torch.isfinite(x.detach().sum())):  # one sweep: NaN or Inf anywhere makes the sum so
        return
    if not bool(torch.isfinite(x.detach()).all()):
        rows = (~torch.isfinite(x.detach()).flatten(1).all(1)).nonzero().flatten().tolist()
        raise NotFiniteError(f"{name} contains NaN or Inf, first in row {rows[0]} ({len(rows)} of {x.shape[0]} rows)")


def _largest(x: Tensor) -> float:
    """The largest magnitude; without a copy of x."""
    low, high = x.detach().aminmax()
    return max(-float(low), float(high))


def capturing(x: Tensor) -> bool:
    return torch.compiler.is_compiling() or (x.is_cuda and torch.cuda.is_current_stream_capturing())


def describe(x: object) -> str:
    return f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
