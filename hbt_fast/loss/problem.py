"""A loss call made ready to compute: operands in compute precision, every rank's passages, the ids that decide masks.

Shapes: N queries of this rank, A queries of all ranks, M passages of all ranks, K own negatives, D dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hbt_fast.loss.arguments import (
    BACKENDS,
    COMPUTE_DTYPES,
    DIRECTIONS,
    DUPLICATES,
    HARDNESS_MODES,
    REDUCTIONS,
    Options,
    capturing,
    check_arguments,
    computation_dtype,
)
from hbt_fast.loss.ranks import Gathering, Ranks, meet


@dataclass(frozen=True, slots=True)
class Problem:
    """What both torch forms compute from. Global row order is rank by rank; `positives` index into p_MD."""

    q_ND: Tensor  # for "triton" these are of `operands`, and the caller's own tensors where they are of it already
    passages_MD: Tensor  # those of other ranks may still be on their way: see p_MD
    gathering: Gathering | None
    own_NKD: Tensor | None
    scale: Tensor  # 0-d; its dtype is what logits and sums are computed in
    positives_N: Tensor
    positive_rows: slice | None  # of p_MD, where the positives are consecutive
    positives_A: Tensor
    passage_ids_M: Tensor | None
    query_ids_A: Tensor | None
    query_ids_given: bool
    leading: bool  # positives_A is known to be 0, 1, 2 ...
    duplicates: str
    symmetric: bool
    margin: float | None
    weights_N: Tensor | None  # divided by the sum of all ranks' weights if the reduction is a mean
    reduction: str
    compute_dtype: str | None
    operands: torch.dtype  # what tensor cores may be fed with: the values of q_ND and p_MD are exact in it
    copied_bytes: int  # of operands that are not the caller's tensors
    workspace_bytes: int | None
    ranks: Ranks
    joint: frozenset[str]  # directions beside query_to_doc whose candidates are in a query's softmax
    queries_AD: Tensor | None  # the queries of all ranks, where they are candidates of a block of their own
    owners_M: Tensor | None  # the query that a passage belongs to, as an index into those of all ranks; -1: none
    own_gain: Tensor | None  # 0-d: what hardness multiplies the logits of a query's own hard negatives with
    batch_gain: Tensor | None  # the same, of all other negatives of query_to_doc

    @property
    def columns(self) -> bool:
        """Whether positive passages are anchors too, of terms of their own or in the softmax of their query."""
        return self.symmetric or "doc_to_query" in self.joint

    @property
    def copies(self) -> int:
        """How often a term's own positive is in its softmax: once for each direction that holds the pair."""
        return 1 + ("doc_to_query" in self.joint)

    @property
    def own_apart(self) -> bool:
        """Whether a query's own hard negatives among the passages have another hardness than the rest."""
        return self.owners_M is not None and (self.own_gain is None) != (self.batch_gain is None)

    @property
    def p_MD(self) -> Tensor:
        """The passages of all ranks; waits for those that have not come yet."""
        return self.arrived(slice(0, self.passages_MD.shape[0]))

    def positives(self, rows: slice) -> Tensor:
        """These queries' positives; a view, where they are consecutive, and so of this rank."""
        if self.positive_rows is None:
            return self.p_MD[self.positives_N[rows]]
        return self.passages_MD[self.positive_rows][rows]

    def arrived(self, columns: slice) -> Tensor:
        """Some passages; waits for those of them that have not come yet."""
        return self.passages_MD[columns] if self.gathering is None else self.gathering.wait(columns)

    @property
    def own_count(self) -> int:
        return 0 if self.own_NKD is None else self.own_NKD.shape[1]

    def weighted(self, losses_N: Tensor) -> Tensor:
        return losses_N if self.weights_N is None else losses_N * self.weights_N

    def reduced(self, losses_N: Tensor) -> Tensor:
        """The loss to return: weighted rows, or their sum over all ranks (a mean's weights are already divided)."""
        weighted = self.weighted(losses_N)
        return weighted if self.reduction == "none" else self.ranks.sum(weighted.sum())


def meet_ranks(
    queries: Tensor, passages: Tensor, scale: float | Tensor, own_negatives: Tensor | None, o: Options
) -> Ranks:
    """Check this rank's arguments and exchange shapes and options with the others. Raises ValueError on all ranks."""
    error, sizes = None, {}
    try:
        check_arguments(queries, passages, scale, own_negatives, o)
    except ValueError as e:
        error = e
    tensors = isinstance(queries, Tensor) and isinstance(passages, Tensor) and queries.ndim == passages.ndim == 2
    if error is not None and not tensors:
        raise error
    if error is None:
        dtypes = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
        graph = torch.is_grad_enabled()
        sizes = {
            "queries": queries.shape[0],
            "passages": passages.shape[0],
            "the width d": queries.shape[1],
            "the dtype of queries (as an index)": dtypes.index(queries.dtype) if queries.dtype in dtypes else -1,
            "the dtype of passages (as an index)": dtypes.index(passages.dtype) if passages.dtype in dtypes else -1,
            "own_negatives.shape[1]": -1 if own_negatives is None else own_negatives.shape[1],
            "passing passage_ids": o.passage_ids is not None,
            "passing query_ids": o.query_ids is not None,
            "passing weights": o.weights is not None,
            "passing owners": o.owners is not None,
            "joint (one bit per direction)": sum((name in o.joint) << i for i, name in enumerate(DIRECTIONS)),
            "the place of hardness_mode in its choices": (None, *HARDNESS_MODES).index(o.hardness_mode),
            "symmetric": bool(o.symmetric),
            "passing false_negative_margin": o.false_negative_margin is not None,
            "the place of duplicates in its choices": DUPLICATES.index(o.duplicates),
            "the place of reduction in its choices": REDUCTIONS.index(o.reduction),
            "the place of backend in its choices": BACKENDS.index(o.backend),
            "the place of compute_dtype in its choices": (None, *COMPUTE_DTYPES).index(o.compute_dtype),
            "queries.requires_grad": graph and queries.requires_grad,
            "passages.requires_grad": graph and passages.requires_grad,
            "own_negatives.requires_grad": graph and own_negatives is not None and own_negatives.requires_grad,
            "scale.requires_grad": graph and isinstance(scale, Tensor) and scale.requires_grad,
        }
    return meet(o.group, sizes, queries.device, error)


def prepare(
    queries: Tensor,
    passages: Tensor,
    scale: float | Tensor,
    own_negatives: Tensor | None,
    o: Options,
    ranks: Ranks,
    backend: str = "torch",
) -> Problem:
    """Cast, round, gather. Differentiable: the gradients of the result's operands flow to the four arguments.

    With a backend other than "torch" the passages of other ranks come while work goes on, and gradients do not flow.

    Raises:
        ValueError: positives out of range, weights that sum to zero; on all ranks alike.
    """
    device = queries.device
    dtype = computation_dtype(queries, passages, own_negatives)
    n, m = queries.shape[0], sum(ranks.passage_counts)
    operands = operand_dtype(queries, passages, o.compute_dtype)
    held = operands if backend == "triton" else dtype  # a tensor core multiplies halves as they are, a CPU does not
    q_ND, own_NKD = rounded(queries.to(held), o.compute_dtype).contiguous(), None
    if own_negatives is not None:
        half = operands if o.compute_dtype in ("fp16", "bf16") else own_negatives.dtype
        own_held = half if backend == "triton" else dtype
        own_NKD = rounded(own_negatives.to(own_held), o.compute_dtype)

    positive_rows = None
    if o.positives is None:
        positive_rows = slice(ranks.own_passages.start, ranks.own_passages.start + n)
        positives_N = torch.arange(positive_rows.start, positive_rows.stop, device=device)
    else:
        positives_N = o.positives.to(device)
    positives_A = ranks.gather_queries(positives_N)
    if not capturing(queries) and not bool(((positives_A >= 0) & (positives_A < m)).all()):
        span = f"{positives_A.min()} .. {positives_A.max()}"
        raise ValueError(f"positives must be passage indices in [0, {m}), not {span}")

    weights_N = None if o.weights is None else o.weights.to(device, dtype)
    if o.reduction == "mean":
        if weights_N is None:
            weights_N = torch.full((n,), 1.0 / sum(ranks.query_counts), dtype=dtype, device=device)
        else:
            total = ranks.gather_queries(weights_N).sum()
            if not capturing(queries) and float(total) == 0:
                raise ValueError('weights sum to zero, so their mean is undefined; use reduction="sum"')
            weights_N = weights_N / total

    passage_ids_M = None if o.passage_ids is None else ranks.gather_passage_ids(o.passage_ids.to(device))
    query_ids_A = None if o.query_ids is None else ranks.gather_queries(o.query_ids.to(device))
    if query_ids_A is None and passage_ids_M is not None:
        query_ids_A = passage_ids_M[positives_A]

    joint, owners_M, queries_AD = frozenset(o.joint) - {"query_to_doc"}, None, None
    if o.owners is not None and ("doc_to_doc" in joint or o.hardness_mode is not None):
        start = ranks.own_queries.start
        owners_M = ranks.gather_passage_ids(torch.where(o.owners < 0, -1, o.owners + start).to(device))
    if "query_to_query" in joint or (backend == "torch" and "doc_to_query" in joint):
        queries_AD = q_ND
        if ranks.group is not None:
            queries_AD = rounded(ranks.of_queries.gather_passages(queries, held), o.compute_dtype).contiguous()
    scale = ranks.shared_scale(as_tensor(scale, device).to(device, dtype))
    gain = None
    if o.hardness_mode is not None and o.hardness_strength > 0:  # the strength is that of similarities, not of logits
        gain = 1 + o.hardness_strength / scale.detach()

    # Last, since a group's collectives are done in order: what is asked for after it would wait for it.
    if ranks.group is not None and backend != "torch":
        gathering = ranks.start_gathering(passages, held, lambda x: rounded(x, o.compute_dtype))
        passages_MD = gathering.passages
    else:
        gathering, passages_MD = None, rounded(ranks.gather_passages(passages, held), o.compute_dtype).contiguous()
    copied_bytes = 0
    if backend != "torch":
        kept = ((q_ND, queries), (passages_MD, passages), (own_NKD, own_negatives))
        copied_bytes = sum(x.nbytes for x, given in kept if x is not None and x.data_ptr() != given.data_ptr())

    return Problem(
        q_ND=q_ND,
        passages_MD=passages_MD,
        gathering=gathering,
        own_NKD=own_NKD,
        scale=scale,
        positives_N=positives_N,
        positive_rows=positive_rows,
        positives_A=positives_A,
        passage_ids_M=passage_ids_M,
        query_ids_A=query_ids_A,
        query_ids_given=o.query_ids is not None,
        leading=o.positives is None and ranks.query_counts == ranks.passage_counts,
        duplicates=o.duplicates,
        symmetric=o.symmetric,
        margin=o.false_negative_margin,
        weights_N=weights_N,
        reduction=o.reduction,
        compute_dtype=o.compute_dtype,
        operands=operands,
        copied_bytes=copied_bytes,
        workspace_bytes=o.workspace_bytes,
        ranks=ranks,
        joint=joint,
        queries_AD=queries_AD,
        owners_M=owners_M,
        own_gain=None if o.hardness_mode == "in_batch_negatives" else gain,
        batch_gain=None if o.hardness_mode == "hard_negatives" else gain,
    )


def as_tensor(scale: float | Tensor, device: torch.device) -> Tensor:
    """A number as 0-d float64, written where it is needed: a copy from the host cannot be captured in a CUDA graph."""
    return scale if isinstance(scale, Tensor) else torch.full((), float(scale), dtype=torch.float64, device=device)


def operand_dtype(queries: Tensor, passages: Tensor, compute_dtype: str | None) -> torch.dtype:
    """The smallest dtype that holds the operands: half where it was asked for, or where both inputs are of one half."""
    if compute_dtype in ("fp16", "bf16"):
        return torch.float16 if compute_dtype == "fp16" else torch.bfloat16
    halves = compute_dtype is None and queries.dtype == passages.dtype in (torch.float16, torch.bfloat16)
    return queries.dtype if halves else torch.float32


def rounded(x: Tensor, compute_dtype: str | None) -> Tensor:
    """`x` with the values that a tensor core would see, in x's own dtype; the gradient passes through unrounded.

    Products of such values, accumulated in fp32, are what fp16, bf16 and TF32 tensor cores compute.
    """
    narrow = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}.get(compute_dtype)
    if compute_dtype is None or x.dtype == narrow:
        return x
    with torch.no_grad():
        if narrow is None:  # tf32: 10 explicit mantissa bits, to nearest
            bits = x.float().contiguous().view(torch.int32)
            y = bits.add(0x1000).bitwise_and_(~0x1FFF).view(torch.float32).to(x.dtype)
        else:
            y = x.to(narrow).to(x.dtype)
    return x + (y - x.detach()) if torch.is_grad_enabled() else y  # exact: the difference to it is representable
