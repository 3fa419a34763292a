"""Panels of S on a GPU: Triton kernels make logits and what is elementwise, the library the products that follow.

One-way, 3 products: `exp_rows` stores exp(s - offset), un-normalised, in the operands' precision; the row factors are
known afterwards and are folded into the operands and results of G P and G^T Q. Symmetric, 4 products: statistics, which
store no matrix, then the gradient itself, normalised so that fp16 does not underflow; or 3, where the workspace holds
all logits in fp32 between the visits. All products accumulate in fp32. No value is waited for: a call can be captured
in a CUDA graph.

Two ways do the same: FUSED kernels keep logits in registers, SWEEPS read them from a buffer that the library's product
wrote. Which is faster on which GPU is for `pytest bench/bench_loss.py` to say; nothing has been measured yet.

Shapes: R rows of a panel, N queries of this rank, A queries of all ranks, M columns, D dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hbt_fast.loss.negatives import Layout
from hbt_fast.loss.panels import Statistics
from hbt_fast.loss.planner import Plan
from hbt_fast.loss.problem import Problem
from hbt_fast.loss.terms import finite_maximum
from hbt_fast.loss.tiles import REPEATED

SMALLEST = 1e-30  # a largest gradient below it is as good as none, and its inverse would overflow


class TritonPanels:
    """The interface of `panels.Panels`."""

    def __init__(self, problem: Problem, layout: Layout, plan: Plan, need_queries: bool, need_passages: bool) -> None:
        from hbt_fast.kernels import NEVER, Negatives, fused, sweep

        self.plan, self.scale, self.sweep, self.fused = plan, problem.scale, sweep, fused
        self.dtype = plan.operands
        if layout.source_M is None:
            problem.p_MD  # noqa: B018 (waits: the kernels read all columns at once)
        self.q_ND, self.p_MD = (x.to(self.dtype).contiguous() for x in (problem.q_ND, layout.p_MD))
        self.source_M, self.passages = layout.source_M, problem.passages_MD.shape[0]
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
        )
        (n, d), m = self.q_ND.shape, self.p_MD.shape[0]
        self.held: dict[int, Tensor] = {}  # by the panel's first row: exp(S) and offsets, or kept products
        self.dq_ND = problem.q_ND.new_empty(n, d, dtype=torch.float32) if need_queries else None
        self.dp_MD = problem.q_ND.new_zeros(m, d, dtype=torch.float32) if need_passages else None

    def rows(self) -> Iterator[slice]:
        """The panels, in order."""
        n, step = self.q_ND.shape[0], self.plan.panel_rows
        return (slice(i, min(i + step, n)) for i in range(0, n, step))

    def take_statistics(self, rows: slice, rows_N: Statistics, columns_A: Statistics | None = None) -> None:
        """Visit a panel's logits; take its statistics into those of the rows and columns."""
        q_RD, who = self.q_ND[rows], self._of(rows)
        if columns_A is None:
            if self.plan.way == "sweep":
                made = self.sweep.exp_rows(self.sweep.products(q_RD, self.p_MD), self.scale, who, self.dtype)
            else:
                made = self.fused.exp_rows(q_RD, self.p_MD, self.scale, who, precision=self.precision)
            self.held = {rows.start: (made.e_RM, made.offset_R)}
            rows_N.part(rows).take(Statistics(made.max_R, made.sum_R))
            return
        if self.plan.way == "sweep":
            products_RM = self.sweep.products(q_RD, self.p_MD)
            if self.plan.keep:
                self.held[rows.start] = products_RM
            found = self.sweep.row_and_column_statistics(products_RM, self.scale, who)
        else:
            found = self.fused.row_and_column_statistics(q_RD, self.p_MD, self.scale, who, precision=self.precision)
        rows_N.part(rows).take(Statistics(found.row_max_R, found.row_sum_R))
        columns_A.take(Statistics(found.column_max_A, found.column_sum_A))

    def add_products(
        self,
        rows: slice,
        rows_N: Statistics,
        factor_N: Tensor,
        columns_A: Statistics | None = None,
        factor_A: Tensor | None = None,
    ) -> None:
        """Add the products of the panel's gradient with passages and queries."""
        q_RD = self.q_ND[rows]
        if columns_A is None:
            g_RM, offset_R = self.held.pop(rows.start)
            # 0 where a row has no negative: its maximum is -inf, its exp(S) all zero
            factor_R = factor_N[rows] * (offset_R - finite_maximum(rows_N.maximum[rows])).exp()
            largest = factor_R.abs().max().clamp_min(SMALLEST)
            q_RD = (q_RD * (factor_R / largest)[:, None]).to(self.dtype)
            after_q, after_p = self.scale * factor_R[:, None], self.scale * largest
        else:
            g_RM, normaliser = self._gradient(rows, rows_N.part(rows), factor_N[rows], columns_A, factor_A)
            after_q = after_p = self.scale / normaliser
        if self.dq_ND is not None:
            self.dq_ND[rows] = _product(g_RM, self.p_MD).mul_(after_q)
        if self.dp_MD is not None:
            self.dp_MD.addcmul_(_product(g_RM.T, q_RD), after_p)

    def gradients(self) -> tuple[Tensor, Tensor]:
        """(N, D) and (number of passages, D), both fp32; zeros for those that were not needed."""
        d = self.q_ND.shape[1]
        dq_ND = self.scale.new_zeros(self.q_ND.shape) if self.dq_ND is None else self.dq_ND
        if self.dp_MD is not None and self.source_M is None:
            return dq_ND, self.dp_MD
        dp_MD = self.scale.new_zeros(self.passages, d)
        if self.dp_MD is not None:
            dp_MD.index_put_((self.source_M,), self.dp_MD, accumulate=True)
        return dq_ND, dp_MD

    def _gradient(
        self, rows: slice, row: Statistics, factor_R: Tensor, columns_A: Statistics, factor_A: Tensor
    ) -> tuple[Tensor, Tensor]:
        """A panel of d loss / d S times a normaliser that brings its largest element near 1."""
        from hbt_fast.kernels import Coefficients

        normaliser = 1 / (factor_R.abs().max() + factor_A.abs().max()).clamp_min(SMALLEST)
        coefficients = Coefficients(row.maximum, factor_R, columns_A.maximum, factor_A, normaliser)
        who = self._of(rows)
        if self.plan.way == "sweep":
            products_RM = self.held.pop(rows.start, None)
            if products_RM is None:
                products_RM = self.sweep.products(self.q_ND[rows], self.p_MD)
            return self.sweep.gradient(products_RM, self.scale, who, coefficients, self.dtype), normaliser
        return self.fused.gradient(
            self.q_ND[rows], self.p_MD, self.scale, who, coefficients, precision=self.precision
        ), normaliser

    def _of(self, rows: slice) -> object:
        """The negatives of a panel."""
        cut = {name: x[rows] for name, x in self.negatives._asdict().items() if name.endswith("_R") and x is not None}
        return self.negatives._replace(**cut)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b with an fp32 result, whatever the operands."""
    if a.dtype == torch.float32:
        return a @ b
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()
