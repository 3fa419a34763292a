"""Panels of S on a CPU: matrix products by the BLAS, tile by tile, with everything elementwise done between them.

A panel is up to 1024 rows of S, a tile as many columns of it as fill 4 MiB: large enough that the three products run as
fast as whole ones (measured at 4096 x 384 fp32 on 2 cores, time of all three in units of the whole products: tiles of
1024 x 1024 0.95, 256 x 4096 1.12, 128 x 4096 1.41), small enough to be in cache still when the elementwise work comes.

Shapes: R rows of a panel, N queries of this rank, A queries of all ranks, M columns, C columns of a tile, D dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hbt_fast.loss import tiles
from hbt_fast.loss.negatives import Layout
from hbt_fast.loss.planner import Plan
from hbt_fast.loss.problem import Problem
from hbt_fast.loss.ranks import Ranks
from hbt_fast.loss.terms import NEGATIVE_INFINITY, finite_maximum


@dataclass(frozen=True, slots=True)
class Statistics:
    """Of each of T terms' negatives: the maximum (-inf: there is none) and the total of exp(s - maximum)."""

    maximum: Tensor
    total: Tensor

    @classmethod
    def none(cls, like_T: Tensor) -> Statistics:
        return cls(torch.full_like(like_T, NEGATIVE_INFINITY), torch.zeros_like(like_T))

    @classmethod
    def of(cls, s_TC: Tensor) -> Statistics:
        """Of logits, -inf being no negative."""
        if s_TC.shape[1] == 0:
            return cls.none(s_TC.new_empty(s_TC.shape[0]))
        maximum_T = s_TC.amax(1)
        return cls(maximum_T, (s_TC - finite_maximum(maximum_T)[:, None]).exp().sum(1))

    def part(self, terms: slice) -> Statistics:
        """A view of some terms."""
        return Statistics(self.maximum[terms], self.total[terms])

    def take(self, other: Statistics) -> None:
        """Take further negatives in, in place."""
        maximum_T = torch.maximum(self.maximum, other.maximum)
        offset_T = finite_maximum(maximum_T)
        self.total.mul_((self.maximum - offset_T).exp()).add_(other.total * (other.maximum - offset_T).exp())
        self.maximum.copy_(maximum_T)

    def over(self, ranks: Ranks) -> Statistics:
        """Of the negatives of all ranks together."""
        maximum_T = ranks.max(self.maximum)
        return Statistics(maximum_T, ranks.sum(self.total * (self.maximum - finite_maximum(maximum_T)).exp()))

    def share(self, slope_T: Tensor) -> Tensor:
        """What exp(s - maximum) is multiplied by for d loss / d s of a negative; 0 without one."""
        return torch.where(self.total > 0, slope_T / self.total, 0.0)


class Panels:
    """The logits of one loss, panel by panel, and the products with their gradient."""

    def __init__(self, problem: Problem, layout: Layout, plan: Plan, need_queries: bool, need_passages: bool) -> None:
        self.q_ND, self.p_MD, self.scale = problem.q_ND, layout.p_MD, problem.scale
        self.negatives, self.source_M = layout.negatives, layout.source_M
        self.passages = problem.p_MD.shape[0]
        self.plan = plan
        n, m = self.q_ND.shape[0], self.p_MD.shape[0]
        self.buffer = self.q_ND.new_empty(n if plan.keep else min(n, plan.panel_rows), m)
        self.held: set[int] = set()  # panels whose logits the buffer holds
        self.dq_ND = torch.zeros_like(self.q_ND) if need_queries else None
        self.dp_MD = torch.zeros_like(self.p_MD) if need_passages else None
        self.tiles = tiles.compiled() if plan.backend == "cpu" else tiles

    def rows(self) -> Iterator[slice]:
        n = self.q_ND.shape[0]
        return (slice(i, min(i + self.plan.panel_rows, n)) for i in range(0, n, self.plan.panel_rows))

    def take_statistics(self, rows: slice, rows_N: Statistics, columns_A: Statistics | None = None) -> None:
        """Make the panel's logits; take its statistics into those of the rows and columns."""
        row, q_RD = rows_N.part(rows), self._scaled(rows)
        for columns, s_RC in self._tiles(rows):
            torch.mm(q_RD, self.p_MD[columns].T, out=s_RC)
            column = self._part(columns_A, columns)
            self.tiles.statistics(s_RC, row, column, self.negatives.tile(rows, columns))
        self.held = self.held | {rows.start} if self.plan.keep else {rows.start}

    def add_products(
        self,
        rows: slice,
        rows_N: Statistics,
        factor_N: Tensor,
        columns_A: Statistics | None = None,
        factor_A: Tensor | None = None,
    ) -> None:
        """Turn the panel's logits into their gradient and add its products with passages and queries."""
        q_RD = self.q_ND[rows]
        made = rows.start in self.held
        scaled_RD = None if made else self._scaled(rows)
        for columns, s_RC in self._tiles(rows):
            p_CD = self.p_MD[columns]
            if not made:
                torch.mm(scaled_RD, p_CD.T, out=s_RC)
            column = self._part(columns_A, columns)
            factor_C = None if column is None else factor_A[columns]
            negatives = self.negatives.tile(rows, columns)
            self.tiles.gradient(s_RC, rows_N.part(rows), factor_N[rows], column, factor_C, negatives)
            if self.dq_ND is not None:
                self.dq_ND[rows].addmm_(s_RC, p_CD)
            if self.dp_MD is not None:
                self.dp_MD[columns].addmm_(s_RC.T, q_RD)
        self.held = self.held - {rows.start} if self.plan.keep else set()

    def gradients(self) -> tuple[Tensor, Tensor]:
        """(N, D) and (number of passages, D) sums of the products, without the factor `scale`."""
        dq_ND = torch.zeros_like(self.q_ND) if self.dq_ND is None else self.dq_ND
        if self.dp_MD is None or self.source_M is None:
            d = self.q_ND.shape[1]
            return dq_ND, self.q_ND.new_zeros(self.passages, d) if self.dp_MD is None else self.dp_MD
        dp_MD = self.q_ND.new_zeros(self.passages, self.q_ND.shape[1])
        return dq_ND, dp_MD.index_put_((self.source_M,), self.dp_MD, accumulate=True)

    def _tiles(self, rows: slice) -> Iterator[tuple[slice, Tensor]]:
        """The panel's tiles, each contiguous, so that the products find it as the BLAS likes it best."""
        r, m = rows.stop - rows.start, self.p_MD.shape[0]
        at = rows.start * m if self.plan.keep else 0
        flat = self.buffer.view(-1)
        for start in range(0, m, self.plan.tile_columns):
            columns = slice(start, min(start + self.plan.tile_columns, m))
            c = columns.stop - columns.start
            yield columns, flat[at : at + r * c].view(r, c)
            at += r * c

    def _scaled(self, rows: slice) -> Tensor:
        return self.q_ND[rows] * self.scale

    @staticmethod
    def _part(columns_A: Statistics | None, columns: slice) -> Statistics | None:
        if columns_A is None or columns.start >= columns_A.total.shape[0]:
            return None
        return columns_A.part(columns)
