"""Directions beside query_to_doc in the softmax of a query: a matrix of logits each, worked on panel by panel with S.

Row i of such a matrix belongs to the term of query i, as row i of S does: its statistics are taken into the same ones,
and its gradient follows from the same factor. doc_to_query needs no matrix, being columns of S.

Shapes: R rows of a panel, N queries of this rank, A queries and M passages of all ranks, D dimensions.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from hbt_fast.loss.negatives import layout_of_passages, layout_of_queries
from hbt_fast.loss.panels import Panels, Statistics
from hbt_fast.loss.panels_triton import TritonPanels
from hbt_fast.loss.planner import Plan
from hbt_fast.loss.problem import Problem
from hbt_fast.loss.terms import Margin, row_dots


class OtherQueries:
    """query_to_query: rows are the queries of this rank, columns those of all ranks."""

    def __init__(self, problem: Problem, margin: Margin | None, plan: Plan, *, queries: bool) -> None:
        ranks = problem.ranks.of_queries
        here = replace(problem, passages_MD=problem.queries_AD, gathering=None, ranks=ranks)
        self.ranks = ranks
        self.panels = _panels(plan)(here, layout_of_queries(problem, margin), plan, queries)

    def take_statistics(self, rows: slice, rows_N: Statistics, *, hold: bool) -> None:
        self.panels.take_statistics(rows, rows_N, hold=hold)

    def add_products(self, rows: slice, rows_N: Statistics, factor_N: Tensor, dq_RD: Tensor | None) -> None:
        """Add this direction's part to the gradient of the panel's queries, as rows; that as columns is summed up."""
        more_RD = None if dq_RD is None else torch.empty_like(dq_RD)
        self.panels.add_products(rows, rows_N, factor_N, dq_RD=more_RD)
        if dq_RD is not None:
            dq_RD += more_RD

    def of_columns(self) -> Tensor | None:
        """(N, D) gradients of this rank's queries as columns, of the rows of all ranks."""
        dq_AD = self.panels.passages()
        return None if dq_AD is None else self.ranks.add_passage_gradients(dq_AD)


class OtherPassages:
    """doc_to_doc: rows are the positive passages of this rank's queries, columns the passages of all ranks."""

    def __init__(self, problem: Problem, margin: Margin | None, plan: Plan, *, passages: bool, scale: bool) -> None:
        self.problem = problem
        self.here = replace(problem, q_ND=problem.positives(slice(None)).contiguous())
        self.panels = _panels(plan)(self.here, layout_of_passages(problem, margin), plan, passages)
        q_ND, dtype = problem.q_ND, problem.scale.dtype
        self.rows_ND = torch.empty_like(q_ND, dtype=dtype) if passages or scale else None
        self.dots = torch.zeros_like(problem.scale)

    def take_statistics(self, rows: slice, rows_N: Statistics, *, hold: bool) -> None:
        self.panels.take_statistics(rows, rows_N, hold=hold)

    def add_products(self, rows: slice, rows_N: Statistics, factor_N: Tensor) -> None:
        """The gradients of the panel's positives as rows; those of all passages as columns are summed up."""
        dp_RD = None if self.rows_ND is None else self.rows_ND[rows]
        self.panels.add_products(rows, rows_N, factor_N, dq_RD=dp_RD)
        if dp_RD is not None:
            self.dots += row_dots(self.here.q_ND[rows], dp_RD, dp_RD.dtype).sum()

    def add_to(self, dp_MD: Tensor) -> None:
        """Add this rank's contributions to the gradients of all passages, as columns and as rows."""
        problem = self.problem
        dp_MD += self.panels.passages()
        if problem.positive_rows is not None:
            dp_MD[problem.positive_rows] += self.rows_ND
        else:
            dp_MD.index_put_((problem.positives_N,), self.rows_ND, accumulate=True)


def _panels(plan: Plan) -> type[Panels | TritonPanels]:
    return TritonPanels if plan.backend == "triton" else Panels
