"""The pieces of InfoNCE that every form of it shares: who is a negative of whom, and a term's loss from three numbers.

A term is one anchor with its positive, against its negatives. A query is the anchor of a row of S (its
candidates: passages and own negatives); in the symmetric half the positive passage of query k is the anchor of a column
of T = S[:, positives] (the queries of all ranks are its candidates). There is one column per query, so two queries that
share a positive passage have a column each, and neither is a negative in the other's.

Joint directions add candidates to a row's term: the other queries (query_to_query); and, with the query's positive
passage as the anchor, the queries (doc_to_query) and the other passages (doc_to_doc). The pair itself is then in the
softmax `copies` times: log(copies exp(s_pos) + Z) - s_pos = log(copies) + log1p(Z / (copies exp(s_pos))). The constant
is left out, so that a term without negatives is 0 as ever: what remains is a term with log_sum(...) - log(copies).

Hardness multiplies logits of negatives, s + strength * similarity, and no gradient flows through that: d loss / d s is
what it would be if the sum were a constant beside s.

Shapes: R a block of this rank's queries, N all of them, A the queries of all ranks, M passages, K own negatives,
C = M + K candidates of a query, D dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from hbt_fast.loss.problem import Problem

NEGATIVE_INFINITY = float("-inf")
BLOCK = 2**22  # elements of embeddings that are converted or multiplied elementwise at a time


def blocks(count: int, width: int) -> Iterator[slice]:
    """Rows of `width` elements, so many at a time that a temporary of them takes 16 MiB in fp32."""
    step = max(1, BLOCK // width)
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


def positive_logits(problem: Problem) -> Tensor:
    """(N,) logits of the positives, as row dots: kept apart from the matrix, so that no rounding of it reaches them."""
    q_ND, dtype = problem.q_ND, problem.scale.dtype
    dots = [row_dots(q_ND[rows], problem.positives(rows), dtype) for rows in blocks(*q_ND.shape)]
    return problem.scale * torch.cat(dots)


def row_dots(a_RD: Tensor, b_RD: Tensor, dtype: torch.dtype) -> Tensor:
    """(R,) dot products of rows, in `dtype`. As a batched product where that cannot be TF32: it needs no temporary."""
    if a_RD.device.type == "cpu" and a_RD.dtype == b_RD.dtype == dtype:
        return (a_RD[:, None] @ b_RD[:, :, None]).flatten()
    return b_RD.to(dtype, copy=True).mul_(a_RD).sum(1)


@dataclass(frozen=True, slots=True)
class Margin:
    """The false-negative margin as a comparison of scale * cosine, for inputs of any norm."""

    inverse_q_N: Tensor
    inverse_p_M: Tensor
    inverse_own_NK: Tensor | None
    limit_N: Tensor  # scale * (cosine of the positive + margin): a candidate above it is dropped
    limit_A: Tensor


def margin_of(problem: Problem, pos_N: Tensor) -> Margin | None:
    """The margin's limits, without gradient: which negatives are dropped is a decision and is not differentiated."""
    if problem.margin is None:
        return None
    with torch.no_grad():
        q_N, p_M = inverse_norm(problem.q_ND, pos_N.dtype), inverse_norm(problem.p_MD, pos_N.dtype)
        own_NK = None if problem.own_NKD is None else inverse_norm(problem.own_NKD, pos_N.dtype)
        limit_N = pos_N * q_N * p_M[problem.positives_N] + problem.scale * problem.margin
        return Margin(q_N, p_M, own_NK, limit_N, problem.ranks.gather_queries(limit_N))


def inverse_norm(x: Tensor, dtype: torch.dtype) -> Tensor:
    """1 / norm of vectors, for the margin, without gradient; a zero vector has cosine 0 with everything."""
    return 1 / torch.linalg.vector_norm(x.detach(), dim=-1, dtype=dtype).clamp_min(torch.finfo(dtype).tiny)


def row_masks(problem: Problem, margin: Margin | None, rows: slice, s_RC: Tensor) -> tuple[Tensor, Tensor | None]:
    """Of a block of rows: which candidates are no negatives (R, C), and which are further positives (R, C) or None."""
    y_R1 = problem.positives_N[rows, None]
    m = problem.p_MD.shape[0]
    dropped_RC = torch.zeros_like(s_RC, dtype=torch.bool).scatter_(1, y_R1, True)
    further_RC = None
    if problem.passage_ids_M is not None:
        same_RM = problem.passage_ids_M[y_R1] == problem.passage_ids_M
        if problem.duplicates == "positive":
            further_RC = torch.zeros_like(dropped_RC)
            further_RC[:, :m] = same_RM & ~dropped_RC[:, :m]
        dropped_RC[:, :m] |= same_RM
    if margin is not None:
        cosine_RC = s_RC.detach() * margin.inverse_q_N[rows, None]
        cosine_RC[:, :m] *= margin.inverse_p_M
        if margin.inverse_own_NK is not None:
            cosine_RC[:, m:] *= margin.inverse_own_NK[rows]
        dropped_RC |= cosine_RC > margin.limit_N[rows, None]
    return dropped_RC, further_RC


def column_masks(problem: Problem, margin: Margin | None, rows: slice, t_RA: Tensor) -> tuple[Tensor, Tensor | None]:
    """The same for a block of rows of T: which queries are no negatives of a positive passage, which further positives.

    Queries of one passage, or of passages that have one content id, are answered by each other's positive.
    """
    own = problem.ranks.own_queries
    y_A = problem.positives_A
    dropped_RA = same_question(problem, rows)
    further_RA = None
    if problem.duplicates == "positive":
        further_RA = dropped_RA.clone()
        index_R = torch.arange(own.start, own.stop, device=y_A.device)[rows]
        further_RA.scatter_(1, index_R[:, None], False)
    if margin is not None:
        cosine_RA = t_RA.detach() * margin.inverse_q_N[rows, None] * margin.inverse_p_M[y_A]
        dropped_RA |= cosine_RA > margin.limit_A
    return dropped_RA, further_RA


def same_question(problem: Problem, rows: slice) -> Tensor:
    """(R, A) whether the positive of a query of all ranks answers this query too; it does its own."""
    own, y_A = problem.ranks.own_queries, problem.positives_A
    same_RA = y_A[own][rows, None] == y_A
    if problem.query_ids_A is not None:
        same_RA |= problem.query_ids_A[own][rows, None] == problem.query_ids_A
    return same_RA


def own_passages(problem: Problem) -> Tensor:
    """(N, M) whether a passage belongs to the query."""
    own = problem.ranks.own_queries
    index_N = torch.arange(own.start, own.stop, device=problem.owners_M.device)
    return index_N[:, None] == problem.owners_M


def finite_maximum(largest: Tensor) -> Tensor:
    """The offset for exp: the largest negative, or 0 where there is none."""
    return torch.where(largest == NEGATIVE_INFINITY, 0.0, largest)


def log_sum(maximum: Tensor, z: Tensor) -> Tensor:
    """log of sum exp over the negatives, from their maximum and z = sum exp(s - maximum); -inf where there is none."""
    some = z > 0
    return torch.where(some, maximum + torch.where(some, z, 1.0).log(), NEGATIVE_INFINITY)


def term_loss(lse: Tensor, positive: Tensor) -> Tensor:
    """log1p(Z_neg / exp(s_pos)): exact near 0 and for large losses; 0 for a term without negatives (lse = -inf).

    Above 40, x and log1p(exp(x)) agree to 4e-18, in float64 too. The default threshold, 20, is off by 2e-9.
    """
    return F.softplus(lse - positive, threshold=40.0)


def term_slope(lse: Tensor, positive: Tensor) -> Tensor:
    """d term_loss / d lse = -d term_loss / d positive: the probability mass on the negatives, without cancellation."""
    return torch.sigmoid(lse - positive)
