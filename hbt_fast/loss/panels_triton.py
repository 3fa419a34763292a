"""Panels of S on a GPU: Triton kernels make logits and what is elementwise, the library the products that follow.

One-way, 3 products: `exp_rows` stores exp(s - offset), un-normalised, in the operands' precision; the row factors are
known afterwards and are folded into the operands and results of G P and G^T Q. Symmetric, 4 products: statistics, which
store no matrix, then the gradient itself, normalised so that fp16 does not underflow; or 3, where the workspace holds
all logits in fp32 between the visits. All products accumulate in fp32, G^T Q inside the product from panel to panel: it
is kept in units of a power of two near the largest factor so far, which for fp16 must be known and never overflow; when
a panel raises it, and only then, what there is is rescaled. No value is waited for: a call can be captured in a CUDA
graph.

Two ways do the same: FUSED kernels keep logits in registers, SWEEPS read them from a buffer that the library's product
wrote. Which is faster on which GPU is for `pytest bench/bench_loss.py` to say; nothing has been measured yet.

The first panel of a call over several ranks is done in the passages of one rank after the other, the own ones first,
while the others are coming; the next panels find all there.

Shapes: R rows of a panel, N queries of this rank, A queries of all ranks, M columns, C of them at a time, D dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hbt_fast.loss.negatives import Layout
from hbt_fast.loss.panels import Statistics, of_passages
from hbt_fast.loss.planner import Plan
from hbt_fast.loss.problem import Problem
from hbt_fast.loss.terms import NEGATIVE_INFINITY, blocks, finite_maximum
from hbt_fast.loss.tiles import REPEATED

if TYPE_CHECKING:
    from hbt_fast.kernels import Negatives

SMALLEST = 2.0**-100  # a largest gradient below it is as good as none, and its inverse would overflow


class TritonPanels:
    """The interface of `panels.Panels`."""

    def __init__(self, problem: Problem, layout: Layout, plan: Plan, need_passages: bool) -> None:
        from hbt_fast.kernels import NEVER, Negatives, fused, library, sweep

        self.plan, self.problem, self.scale = plan, problem, problem.scale
        self.fused, self.library, self.sweep = fused, library, sweep
        self.q_ND, self.p_MD, self.source_M = problem.q_ND, layout.p_MD, layout.source_M
        self.precision = "tf32" if problem.compute_dtype == "tf32" else "ieee"
        keys = layout.negatives
        column_ids_M = keys.column_key_M.long()
        self.negatives = Negatives(
            row_ids_R=keys.row_key_N.long(),
            column_ids_M=column_ids_M.masked_fill_(column_ids_M == REPEATED, NEVER),
            inverse_q_R=keys.row_inverse_N,
            inverse_p_M=keys.column_inverse_M,
            limit_R=keys.row_limit_N,
            limit_A=keys.column_limit_A,
            y_R=None if keys.row_term_N is None else keys.row_term_N.long(),
            y_A=None if keys.column_term_A is None else keys.column_term_A.long(),
            query_ids_R=None if keys.row_pair_N is None else keys.row_pair_N.long(),
            query_ids_A=None if keys.column_pair_A is None else keys.column_pair_A.long(),
            owner_R=None if keys.row_owner_N is None else keys.row_owner_N.long(),
            owner_M=None if keys.column_owner_M is None else keys.column_owner_M.long(),
            gain=keys.row_gain,
        )
        # By the panel's first row: of its columns exp(S) and offsets, or kept products.
        self.held: dict[int, list[tuple[slice, Tensor | None, Tensor | None]]] = {}
        self.dp_MD = self.q_ND.new_zeros(self.p_MD.shape, dtype=torch.float32) if need_passages else None
        self.unit = torch.full_like(self.scale, SMALLEST)  # what dp_MD is to be multiplied with, besides the scale

    def rows(self) -> Iterator[slice]:
        """The panels, in order."""
        n, step = self.q_ND.shape[0], self.plan.panel_rows
        return (slice(i, min(i + step, n)) for i in range(0, n, step))

    def take_statistics(
        self, rows: slice, rows_N: Statistics, columns_A: Statistics | None = None, *, hold: bool = True
    ) -> None:
        """Visit a panel's logits; take its statistics into those of the rows and columns.

        hold: whether the panel's products follow, before another's statistics. (What fits is kept in either case.)
        """
        row, held = rows_N.part(rows), []
        for columns in self._columns(columns_A is not None):
            q_RD, who = self.q_ND[rows], self._of(rows, columns)
            p_CD = self.p_MD[columns] if self.source_M is not None else self.problem.arrived(columns)
            if columns_A is None:
                made = self._exp_rows(q_RD, p_CD, who)
                # exp(S) of a row without negatives is 0 whatever the offset, which must not overflow a factor
                offset_R = made.offset_R.masked_fill(made.max_R == NEGATIVE_INFINITY, NEGATIVE_INFINITY)
                held.append((columns, made.e_RM, offset_R))
                row.take(Statistics(made.max_R, made.sum_R))
                continue
            if self.plan.way == "sweep":
                products_RC = self.sweep.products(q_RD, p_CD)
                found = self.sweep.row_and_column_statistics(products_RC, self.scale, who)
                held.append((columns, products_RC, None))
                del products_RC
            else:
                found = self.fused.row_and_column_statistics(q_RD, p_CD, self.scale, who, precision=self.precision)
            row.take(Statistics(found.row_max_R, found.row_sum_R))
            columns_A.part(columns).take(Statistics(found.column_max_A, found.column_sum_A))
        if self.plan.keep or (columns_A is None and hold):
            self.held[rows.start] = held

    def add_products(
        self,
        rows: slice,
        rows_N: Statistics,
        factor_N: Tensor,
        columns_A: Statistics | None = None,
        factor_A: Tensor | None = None,
        dq_RD: Tensor | None = None,
    ) -> None:
        """The product of the panel's gradient with the passages, whole, into dq_RD; that with the queries is added up.

        Both are sums of fp32 inside the products, but dq_RD of the first panel of several ranks.
        """
        row, factor_R = rows_N.part(rows), factor_N[rows]
        if columns_A is None:
            if rows.start not in self.held:
                self.take_statistics(rows, Statistics.none(torch.empty_like(rows_N.maximum)))
            for i, (columns, e_RC, offset_R) in enumerate(self.held.pop(rows.start)):
                after_R = factor_R * (offset_R - finite_maximum(row.maximum)).exp()
                self._raise_unit(after_R.abs().max())
                self._add_to_passages(rows, columns, e_RC, after_R / self.unit)
                if dq_RD is not None:
                    self._add_to_queries(dq_RD, columns, e_RC, self.scale * after_R, first=i == 0)
            return
        self.unit = (factor_N.abs().max() + factor_A.abs().max()).clamp_min(SMALLEST)  # the same in every panel
        held = self.held.pop(rows.start, None) or [(slice(0, self.p_MD.shape[0]), None, None)]
        for i, (columns, products_RC, _) in enumerate(held):
            part_A = columns_A.part(columns)
            terms = (row.maximum, factor_R, part_A.maximum, factor_A[columns])
            g_RC = self._gradient(rows, columns, products_RC, terms)
            self._add_to_passages(rows, columns, g_RC)
            if dq_RD is not None:
                self.library.add_product(dq_RD, g_RC, self.p_MD[columns], beta=int(i > 0))
        if dq_RD is not None:
            dq_RD.mul_(self.scale * self.unit)

    def passages(self) -> Tensor | None:
        """(number of passages, D) fp32 sums of the products with the queries; None if they were not needed."""
        if self.dp_MD is None:
            return None
        return of_passages(self.dp_MD.mul_(self.scale * self.unit), self.source_M, self.problem)

    def _columns(self, symmetric: bool) -> list[slice]:
        """The columns that are worked on together: all, but while passages are coming those of each rank.

        Kernels for column terms want some in every block: so they have if every query has its passage of equal place.
        """
        gathering = self.problem.gathering
        coming = self.source_M is None and gathering is not None and gathering.coming
        if coming and (self.problem.leading or not symmetric):
            return self.problem.ranks.own_first
        return [slice(0, self.p_MD.shape[0])]

    def _exp_rows(self, q_RD: Tensor, p_CD: Tensor, who: Negatives) -> object:
        if self.plan.way == "fused":
            return self.fused.exp_rows(q_RD, p_CD, self.scale, who, precision=self.precision)
        products_RC = self.sweep.products(q_RD, p_CD)
        return self.sweep.exp_rows(products_RC, self.scale, who, q_RD.dtype, e_RM=self._in_place(products_RC))

    def _gradient(
        self, rows: slice, columns: slice, products_RC: Tensor | None, coefficients: tuple[Tensor, ...]
    ) -> Tensor:
        """d loss / d S of some of a panel's columns, divided by the unit, which brings the largest near 1."""
        from hbt_fast.kernels import Coefficients

        coefficients, who = Coefficients(*coefficients, 1 / self.unit), self._of(rows, columns)
        q_RD, p_CD = self.q_ND[rows], self.p_MD[columns]
        if self.plan.way == "fused":
            return self.fused.gradient(q_RD, p_CD, self.scale, who, coefficients, precision=self.precision)
        if products_RC is None:
            products_RC = self.sweep.products(q_RD, p_CD)
        out = self._in_place(products_RC)
        return self.sweep.gradient(products_RC, self.scale, who, coefficients, q_RD.dtype, d_RM=out)

    def _in_place(self, products_RC: Tensor) -> Tensor | None:
        """Where a sweep's result goes: over its input, if that is of the operands' dtype."""
        return products_RC if self.q_ND.dtype == torch.float32 else None

    def _raise_unit(self, largest: Tensor) -> None:
        """Make the unit no smaller than the largest factor. By powers of two, so that raising it rounds nothing."""
        if self.dp_MD is not None:
            unit = torch.maximum(self.unit, largest.clamp_min(SMALLEST).log2().ceil().exp2())
            self.library.rescale(self.dp_MD, self.unit / unit)
            self.unit = unit

    def _add_to_passages(self, rows: slice, columns: slice, g_RC: Tensor, weight_R: Tensor | None = None) -> None:
        if self.dp_MD is None:
            return
        q_RD = self.q_ND[rows]
        if weight_R is not None:
            q_RD = torch.mul(q_RD, weight_R[:, None], out=torch.empty_like(q_RD))
        self.library.add_product(self.dp_MD[columns], g_RC.T, q_RD)

    def _add_to_queries(self, dq_RD: Tensor, columns: slice, e_RC: Tensor, after_R: Tensor, *, first: bool) -> None:
        """dq += after * (e p); = for the first. Every block of columns has its own offsets, and so its own factor."""
        p_CD = self.p_MD[columns]
        if first:
            self.library.add_product(dq_RD, e_RC, p_CD, beta=0).mul_(after_R[:, None])
            return
        for part in blocks(*dq_RD.shape):
            product = self.library.add_product(torch.empty_like(dq_RD[part]), e_RC[part], p_CD, beta=0)
            dq_RD[part].addcmul_(product, after_R[part, None])

    def _of(self, rows: slice, columns: slice) -> Negatives:
        """The negatives of some of a panel's columns."""
        given = {name: x for name, x in self.negatives._asdict().items() if x is not None}
        cut = {n: x[rows if n.endswith("_R") else columns] for n, x in given.items() if n != "gain"}
        return self.negatives._replace(**cut)
