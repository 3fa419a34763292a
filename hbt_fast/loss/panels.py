"""Panels of S on a CPU: matrix products by the BLAS, tile by tile, with everything elementwise done between them.

A panel is up to 1024 rows of S, a tile as many columns of it as fill 16 MiB (4 MiB in torch, which makes temporaries):
large enough that the three products run as fast as whole ones, small enough to be in cache still when the elementwise
work comes. Measured at 4096 x 384, fp32, 2 cores of an AMD EPYC with 32 MiB of L3, the three products by tiles in units
of whole ones, medians of 9 interleaved rounds: 1024 x 4096 0.98, 2048 x 2048 0.99, 1024 x 1024 1.04, 512 x 1024 1.09;
in an earlier run 256 x 4096 1.12, 128 x 4096 1.41.

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

    def take_over(self, other: Statistics) -> None:
        """Become the other, in place."""
        self.maximum.copy_(other.maximum)
        self.total.copy_(other.total)

    def over(self, ranks: Ranks) -> Statistics:
        """Of the negatives of all ranks together."""
        maximum_T = ranks.max(self.maximum)
        return Statistics(maximum_T, ranks.sum(self.total * (self.maximum - finite_maximum(maximum_T)).exp()))

    def share(self, slope_T: Tensor) -> Tensor:
        """What exp(s - maximum) is multiplied by for d loss / d s of a negative; 0 without one."""
        return torch.where(self.total > 0, slope_T / self.total, 0.0)


class Panels:
    """The logits of one loss, panel by panel, and the products with their gradient."""

    def __init__(self, problem: Problem, layout: Layout, plan: Plan, need_passages: bool) -> None:
        self.plan, self.p_MD, self.negatives = plan, layout.p_MD, layout.negatives
        self.source_M, self.problem = layout.source_M, problem
        # A BLAS multiplies by a number for nothing; for a GPU the number stays a tensor, which nothing waits for.
        on_cpu = problem.q_ND.device.type == "cpu"
        self.alpha, self.after = (float(problem.scale), None) if on_cpu else (1.0, problem.scale)
        self.q_ND = problem.q_ND if on_cpu else problem.q_ND * problem.scale
        n, m = self.q_ND.shape[0], self.p_MD.shape[0]
        self.buffer = self.q_ND.new_empty((n if plan.keep else plan.panel_rows) * m)
        self.held: set[int] = set()  # panels whose logits the buffer holds
        self.dp_MD = torch.empty_like(self.p_MD) if need_passages else None
        self.tiles = tiles.compiled() if plan.backend == "cpu" else tiles
        self.columns = self._columns(problem.ranks)

    def rows(self) -> Iterator[slice]:
        """The panels, in order."""
        n, step = self.q_ND.shape[0], self.plan.panel_rows
        return (slice(i, min(i + step, n)) for i in range(0, n, step))

    def take_statistics(
        self, rows: slice, rows_N: Statistics, columns_A: Statistics | None = None, *, hold: bool = True
    ) -> None:
        """Make the panel's logits; take its statistics into those of the rows and columns.

        hold: whether the panel's products follow, before another's statistics. (What fits is kept in either case.)
        """
        for columns, s_RC in self._tiles(rows):
            self._make(s_RC, rows, columns)
            negatives = self.negatives.tile(rows, columns)
            self.tiles.statistics(s_RC, rows_N.part(rows), _part(columns_A, columns), negatives)
        self.held = self.held | {rows.start} if self.plan.keep else {rows.start}

    def add_products(
        self,
        rows: slice,
        rows_N: Statistics,
        factor_N: Tensor,
        columns_A: Statistics | None = None,
        factor_A: Tensor | None = None,
        dq_RD: Tensor | None = None,
    ) -> None:
        """Turn the panel's logits into their gradient. Its product with the passages, whole, into dq_RD; that with the
        queries is added up.
        """
        for columns, s_RC in self._tiles(rows):
            if rows.start not in self.held:
                self._make(s_RC, rows, columns)
            column = _part(columns_A, columns)
            factor_C = None if column is None else factor_A[columns]
            negatives = self.negatives.tile(rows, columns)
            self.tiles.gradient(s_RC, rows_N.part(rows), factor_N[rows], column, factor_C, negatives)
            if dq_RD is not None:
                self._product(dq_RD, s_RC, self.p_MD[columns], first=columns is self.columns[0])
            if self.dp_MD is not None:
                self._product(self.dp_MD[columns], s_RC.T, self.q_ND[rows], first=rows.start == 0)
        if dq_RD is not None and self.after is not None:
            dq_RD.mul_(self.after)
        self.held = self.held - {rows.start} if self.plan.keep else set()

    def passages(self) -> Tensor | None:
        """(number of passages, D) sums of the products with the queries; None if they were not needed."""
        return self.dp_MD if self.dp_MD is None else of_passages(self.dp_MD, self.source_M, self.problem)

    def _tiles(self, rows: slice) -> Iterator[tuple[slice, Tensor]]:
        """The panel's tiles, each contiguous, which is what the BLAS likes best."""
        r = rows.stop - rows.start
        at = rows.start * self.p_MD.shape[0] if self.plan.keep else 0
        for columns in self.columns:
            c = columns.stop - columns.start
            yield columns, self.buffer[at : at + r * c].view(r, c)
            at += r * c

    def _columns(self, ranks: Ranks) -> list[slice]:
        """The columns of a panel's tiles. Of several ranks each one's apart, the own first: others are still coming."""
        blocks = [slice(0, self.p_MD.shape[0])]
        if self.source_M is None and ranks.group is not None:
            blocks = ranks.own_first
        step = self.plan.tile_columns
        return [slice(i, min(i + step, b.stop)) for b in blocks for i in range(b.start, b.stop, step)]

    def _make(self, s_RC: Tensor, rows: slice, columns: slice) -> None:
        if self.source_M is None:
            self.problem.arrived(columns)
        self._product(s_RC, self.q_ND[rows], self.p_MD[columns].T, first=True)

    def _product(self, out: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
        torch.addmm(out, a, b, beta=0 if first else 1, alpha=self.alpha, out=out)


def of_passages(dp_MD: Tensor, source_M: Tensor | None, problem: Problem) -> Tensor:
    """The columns' gradients as those of the passages that they are."""
    if source_M is None:
        return dp_MD
    return dp_MD.new_zeros(problem.passages_MD.shape).index_put_((source_M,), dp_MD, accumulate=True)


def _part(columns_A: Statistics | None, columns: slice) -> Statistics | None:
    return None if columns_A is None or columns.start >= columns_A.total.shape[0] else columns_A.part(columns)
