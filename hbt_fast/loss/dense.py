"""InfoNCE as plain dense torch: the specification. Every other form and backend is tested against this file.

Autograd derives the gradients; N x M tensors are made freely. Read it with terms.py, which says who is a negative.

Shapes: N queries of this rank, A queries of all ranks, M passages of all ranks, K own negatives per query,
C = M + K candidates of a query, D dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hbt_fast.loss.problem import Problem
from hbt_fast.loss.ranks import ALONE, Ranks
from hbt_fast.loss.terms import (
    NEGATIVE_INFINITY,
    column_masks,
    finite_maximum,
    log_sum,
    margin_of,
    positive_logits,
    row_masks,
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
    row_N = _terms(s_NC, pos_N, dropped_NC, further_NC, dim=1, ranks=ALONE)
    if not problem.symmetric:
        return row_N

    t_NA = s_NM[:, problem.positives_A]
    dropped_NA, further_NA = column_masks(problem, margin, everything, t_NA)
    column_N = _terms(t_NA, pos_N, dropped_NA, further_NA, dim=0, ranks=problem.ranks)
    return 0.5 * (row_N + column_N)


def _terms(s: Tensor, pos_N: Tensor, dropped: Tensor, further: Tensor | None, *, dim: int, ranks: Ranks) -> Tensor:
    """(N,) losses of the terms along `dim`; for columns the other candidates' logits lie on other ranks."""
    negatives = s.masked_fill(dropped, NEGATIVE_INFINITY)
    maximum = finite_maximum(ranks.max(negatives.detach().amax(dim)))
    z = ranks.sum((negatives - maximum.unsqueeze(dim)).exp().sum(dim))
    lse = log_sum(maximum, z)
    loss_N = term_loss(ranks.own(lse), pos_N)
    if further is None:
        return loss_N
    each = torch.where(further, term_loss(ranks.shared(lse).unsqueeze(dim), s), 0.0)
    further_N = ranks.own(ranks.sum(each.sum(dim)))
    count_N = ranks.own(ranks.sum(further.sum(dim).to(s.dtype)))
    return (loss_N + further_N) / (1 + count_N)
