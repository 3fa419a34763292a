"""Logits beside the panels: of pairs of a row and a passage, each a row dot, its gradient a rank-one correction.

Positives beside a term's own are such pairs; and own hard negatives, where their hardness differs from the panels'.

Shapes: N queries of this rank, M passages of all ranks, F pairs, T terms, D dimensions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hbt_fast.loss.negatives import further_positives, further_queries, own_hard_negatives
from hbt_fast.loss.panels import Statistics
from hbt_fast.loss.problem import Problem
from hbt_fast.loss.terms import NEGATIVE_INFINITY, Margin, blocks, finite_maximum, row_dots


class RankOne(NamedTuple):
    """Parts of d loss / d S beside its panels: of pairs of a row and a passage."""

    row_F: Tensor
    passage_F: Tensor
    ds_F: Tensor

    def of_rows(self, rows: slice) -> RankOne:
        """Those of a range of rows, which are numbered from its start then."""
        inside_F = (self.row_F >= rows.start) & (self.row_F < rows.stop)
        row_F, passage_F, ds_F = (x[inside_F] for x in self)
        return RankOne(row_F - rows.start, passage_F, ds_F)


class Positives(NamedTuple):
    """Positives beside a term's own, each by the row and the passage of its logit, and the term that it belongs to."""

    row_F: Tensor
    passage_F: Tensor
    term_F: Tensor
    logit_F: Tensor

    def of_terms(self, terms: slice) -> Positives:
        """Those of a range of terms, which are numbered from its start then."""
        inside_F = (self.term_F >= terms.start) & (self.term_F < terms.stop)
        row_F, passage_F, term_F, logit_F = (x[inside_F] for x in self)
        return Positives(row_F, passage_F, term_F - terms.start, logit_F)


def further(problem: Problem) -> tuple[Positives | None, Positives | None]:
    """Further positives of the row terms, and of the column terms of all ranks that have their row on this one."""
    rows = columns = None
    if problem.duplicates == "positive" and problem.passage_ids_M is not None:
        row_F, passage_F = further_positives(problem)
        rows = Positives(row_F, passage_F, row_F, _logits(problem, row_F, passage_F))
    if problem.duplicates == "positive" and problem.symmetric:
        row_F, query_F = further_queries(problem)
        passage_F = problem.positives_A[query_F]
        columns = Positives(row_F, passage_F, query_F, _logits(problem, row_F, passage_F))
    return rows, columns


class HardNegatives(NamedTuple):
    """The hard negatives of rows among the passages, with their own hardness; -inf where the margin drops one."""

    row_F: Tensor
    passage_F: Tensor
    logit_F: Tensor

    @classmethod
    def of(cls, problem: Problem, margin: Margin | None) -> HardNegatives | None:
        """None where the panels have them, with the hardness of all others."""
        if not problem.own_apart:
            return None
        row_F, passage_F = own_hard_negatives(problem)
        logit_F = _logits(problem, row_F, passage_F)
        if margin is not None:
            cosine_F = logit_F * margin.inverse_q_N[row_F] * margin.inverse_p_M[passage_F]
            logit_F.masked_fill_(cosine_F > margin.limit_N[row_F], NEGATIVE_INFINITY)
        return cls(row_F, passage_F, logit_F if problem.own_gain is None else logit_F * problem.own_gain)

    def statistics(self, like_N: Tensor) -> Statistics:
        """Of each row's."""
        found = Statistics.none(like_N)
        found.maximum.scatter_reduce_(0, self.row_F, self.logit_F, "amax")
        offset_F = finite_maximum(found.maximum)[self.row_F]
        found.total.index_put_((self.row_F,), (self.logit_F - offset_F).exp(), accumulate=True)
        return found

    def rank_one(self, rows_N: Statistics, factor_N: Tensor) -> RankOne:
        """d loss / d logit."""
        offset_F = finite_maximum(rows_N.maximum)[self.row_F]
        return RankOne(self.row_F, self.passage_F, factor_N[self.row_F] * (self.logit_F - offset_F).exp())


def _logits(problem: Problem, row_F: Tensor, passage_F: Tensor) -> Tensor:
    dtype = problem.scale.dtype
    logit_F = torch.empty_like(row_F, dtype=dtype)
    for block in blocks(row_F.shape[0], problem.q_ND.shape[1]):
        logit_F[block] = row_dots(problem.q_ND[row_F[block]], problem.p_MD[passage_F[block]], dtype)
    return logit_F.mul_(problem.scale)


def add_positives(problem: Problem, dp_MD: Tensor, dpos_N: Tensor, beside: list[RankOne]) -> None:
    """What the positives' logits, and those of other pairs, add to the gradients of the passages."""
    scale, q_ND = problem.scale, problem.q_ND
    if problem.positive_rows is not None:
        dp_MD[problem.positive_rows].addcmul_((scale * dpos_N)[:, None], q_ND)
    else:
        every_N = torch.arange(q_ND.shape[0], device=q_ND.device)
        beside = [RankOne(every_N, problem.positives_N, dpos_N), *beside]
    for row_F, passage_F, ds_F in beside:
        for block in blocks(ds_F.shape[0], q_ND.shape[1]):
            down_FD = (scale * ds_F[block, None]) * q_ND[row_F[block]]
            dp_MD.index_put_((passage_F[block],), down_FD, accumulate=True)
