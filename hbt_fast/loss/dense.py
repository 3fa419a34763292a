"""InfoNCE as plain dense torch: the specification. Every other form and backend is tested against this file.

Autograd derives the gradients; N x M tensors are made freely. Read it with terms.py, which says who is a negative.

Shapes: N queries of this rank, A queries of all ranks, M passages of all ranks, K own negatives per query,
C = M + K candidates of a query, D dimensions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hbt_fast.loss.problem import Problem
from hbt_fast.loss.ranks import ALONE, Ranks
from hbt_fast.loss.terms import (
    NEGATIVE_INFINITY,
    Margin,
    column_masks,
    finite_maximum,
    inverse_norm,
    log_sum,
    margin_of,
    own_passages,
    positive_logits,
    row_masks,
    same_question,
    term_loss,
)


def dense_losses(problem: Problem) -> Tensor:
    """(N,) unweighted losses of this rank's queries; with symmetric, the mean of a query's two halves."""
    s_NM = problem.scale * (problem.q_ND @ problem.p_MD.T)
    pos_N = positive_logits(problem)
    margin = margin_of(problem, pos_N)
    everything = slice(None)

    s_NC = s_NM
    if problem.own_NKD is not None:
        own_NK = problem.scale * (problem.own_NKD @ problem.q_ND[:, :, None])[:, :, 0]
        s_NC = torch.cat([s_NM, own_NK], dim=1)
    dropped_NC, further_NC = row_masks(problem, margin, everything, s_NC)
    negatives_NC = _hardened(problem, s_NC).masked_fill(dropped_NC, NEGATIVE_INFINITY)
    if not problem.symmetric:
        negatives_NC = torch.cat([negatives_NC, *_joint_negatives(problem, margin)], dim=1)
        return _terms(negatives_NC, s_NC, pos_N, further_NC, dim=1, ranks=ALONE, copies=problem.copies)

    row_N = _terms(negatives_NC, s_NC, pos_N, further_NC, dim=1, ranks=ALONE)
    t_NA = s_NM[:, problem.positives_A]
    dropped_NA, further_NA = column_masks(problem, margin, everything, t_NA)
    negatives_NA = t_NA.masked_fill(dropped_NA, NEGATIVE_INFINITY)
    column_N = _terms(negatives_NA, t_NA, pos_N, further_NA, dim=0, ranks=problem.ranks)
    return 0.5 * (row_N + column_N)


def _hardened(problem: Problem, s_NC: Tensor) -> Tensor:
    """Logits with strength * similarity added to those of the negatives that the mode means."""
    if problem.own_gain is problem.batch_gain is None:
        return s_NC
    own_NC = torch.ones_like(s_NC, dtype=torch.bool)  # own negatives come after the M passages
    m = problem.p_MD.shape[0]
    own_NC[:, :m] = False if problem.owners_M is None else own_passages(problem)
    one = torch.ones_like(problem.scale)
    own, batch = (one if gain is None else gain for gain in (problem.own_gain, problem.batch_gain))
    return s_NC + ((torch.where(own_NC, own, batch) - 1) * s_NC).detach()


def _joint_negatives(problem: Problem, margin: Margin | None) -> list[Tensor]:
    """Logits of further candidates of the rows, -inf where they are no negatives, per direction (N, A) or (N, M)."""
    y_N, scale, blocks = problem.positives_N, problem.scale, []
    q_ND, p_ND = problem.q_ND, problem.p_MD[y_N]

    def negatives(anchor_ND: Tensor, candidates_CD: Tensor, dropped_NC: Tensor) -> Tensor:
        s_NC = scale * (anchor_ND @ candidates_CD.T)
        if margin is not None:
            inverse_N, inverse_C = inverse_norm(anchor_ND, scale.dtype), inverse_norm(candidates_CD, scale.dtype)
            dropped_NC = dropped_NC | (s_NC.detach() * inverse_N[:, None] * inverse_C > margin.limit_N[:, None])
        return s_NC.masked_fill(dropped_NC, NEGATIVE_INFINITY)

    if "query_to_query" in problem.joint:
        blocks.append(negatives(q_ND, problem.queries_AD, same_question(problem, slice(None))))
    if "doc_to_query" in problem.joint:
        blocks.append(negatives(p_ND, problem.queries_AD, same_question(problem, slice(None))))
    if "doc_to_doc" in problem.joint:
        ids_M = problem.passage_ids_M
        if ids_M is None:
            ids_M = torch.arange(problem.p_MD.shape[0], device=y_N.device)
        dropped_NM = ids_M[y_N, None] == ids_M
        if problem.owners_M is not None:
            dropped_NM |= own_passages(problem)
        blocks.append(negatives(p_ND, problem.p_MD, dropped_NM))
    return blocks


def _terms(
    negatives: Tensor, s: Tensor, pos_N: Tensor, further: Tensor | None, *, dim: int, ranks: Ranks, copies: int = 1
) -> Tensor:
    """(N,) losses of the terms along `dim`; for columns the other candidates' logits lie on other ranks.

    `negatives` are logits, -inf where there is none; `s` those of further positives.
    """
    maximum = finite_maximum(ranks.max(negatives.detach().amax(dim)))
    z = ranks.sum((negatives - maximum.unsqueeze(dim)).exp().sum(dim))
    lse = log_sum(maximum, z) - math.log(copies)
    loss_N = term_loss(ranks.own(lse), pos_N)
    if further is None:
        return loss_N
    each = torch.where(further, term_loss(ranks.shared(lse).unsqueeze(dim), s), 0.0)
    further_N = ranks.own(ranks.sum(each.sum(dim)))
    count_N = ranks.own(ranks.sum(further.sum(dim).to(s.dtype)))
    return (loss_N + further_N) / (1 + count_N)
