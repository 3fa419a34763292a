"""InfoNCE by row chunks, with its gradients written out: no tensor of N x M unless it fits the workspace.

One sweep over the chunks gives losses and gradients together: 3 products (S, then G P and G^T Q, G being the gradient
with respect to the logits, made in place of S). The symmetric loss first needs the column statistics, so a sweep that
only makes S goes before: 4 products, or 3 when all of S fits the workspace and is kept. (With duplicates="positive" the
logits of the further positives are kept from it as well.) Chunks are also small enough for the processor's cache, where
exp and masks cost little beside the products.

Gradients of a term with cotangent g, positives j = 1..P and negatives n, m their maximum and z = sum_n exp(s_n - m):
    d s_j = -g/P slope_j        d s_n = g mean_j(slope_j) exp(s_n - m) / z

Shapes: R rows of a chunk, N queries of this rank, A queries of all ranks, M passages of all ranks, K own negatives,
C = M + K candidates of a query, D dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from hbt_fast.loss.problem import Problem
from hbt_fast.loss.terms import (
    NEGATIVE_INFINITY,
    Margin,
    column_masks,
    finite_maximum,
    log_sum,
    margin_of,
    positive_logits,
    row_masks,
    term_loss,
    term_slope,
)

CACHE_BYTES = 4 * 2**20  # of logits per chunk on a CPU; on a GPU only the workspace bounds a chunk


class Gradients(NamedTuple):
    """Of sum_i g_i * loss_i over all ranks. `passages` is this rank's contribution to all passages, not yet reduced."""

    queries: Tensor
    passages: Tensor
    scale: Tensor
    own_negatives: Tensor | None


class _Columns(NamedTuple):
    """The passage-to-query half's statistics over all rows of all ranks."""

    maximum_A: Tensor
    z_A: Tensor
    lse_A: Tensor
    loss_N: Tensor
    slope_A: Tensor  # mean of the slopes of a column's positives
    slope_own_N: Tensor  # of the query's own positive alone
    count_A: Tensor | None  # positives of a column; None: one


class _Logits:
    """S chunk by chunk: kept if all of it fits the workspace, else made again for each sweep in one scratch buffer."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        q, n, m = problem.q_ND, problem.q_ND.shape[0], problem.p_MD.shape[0]
        self.m, self.width = m, m + problem.own_count
        columns = problem.positives_A.shape[0] if problem.symmetric else 0
        # Beside the logits, a chunk needs as much again for temporaries, twice that with options, and masks of 1 byte.
        options = problem.passage_ids_M is not None or problem.margin is not None
        row_bytes = q.element_size() * (2 + 2 * options) * (self.width + columns) + 2 * (self.width + columns)
        row_cap = n if q.is_cuda else max(1, CACHE_BYTES // (q.element_size() * self.width))
        all_bytes = q.element_size() * n * self.width
        self.kept = problem.symmetric and all_bytes + min(row_cap, n) * row_bytes <= problem.workspace_bytes
        self.rows = min(n, row_cap)
        if not self.kept:
            self.rows = max(1, min(self.rows, problem.workspace_bytes // row_bytes))
        self.buffer = q.new_empty(n if self.kept else self.rows, self.width)
        self.made = 0
        self.qs_ND = q * problem.scale
        # Positives that are the first passages in order, the usual case, make T a view of S.
        y_A = problem.positives_A
        self.leading = problem.symmetric and torch.equal(y_A, torch.arange(columns, device=y_A.device))

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        n = self.qs_ND.shape[0]
        for start in range(0, n, self.rows):
            rows = slice(start, min(start + self.rows, n))
            s_RC = self.buffer[rows] if self.kept else self.buffer[: rows.stop - rows.start]
            if not self.kept or self.made < n:
                torch.mm(self.qs_ND[rows], self.problem.p_MD.T, out=s_RC[:, : self.m])
                if self.problem.own_NKD is not None:
                    own_RKD = self.problem.own_NKD[rows]
                    s_RC[:, self.m :] = (own_RKD @ self.qs_ND[rows, :, None])[:, :, 0]
                self.made = rows.stop
            yield rows, s_RC

    def positive_columns(self, s_RC: Tensor) -> Tensor:
        """T of a chunk; maybe a view."""
        y_A = self.problem.positives_A
        return s_RC[:, : y_A.shape[0]] if self.leading else s_RC[:, y_A]

    def add_to_positive_columns(self, ds_RC: Tensor, dt_RA: Tensor) -> None:
        y_A = self.problem.positives_A
        if self.leading:
            ds_RC[:, : y_A.shape[0]] += dt_RA
        else:  # index_put_ adds in a fixed order on every device; index_add_ on CUDA does not
            index_R1 = torch.arange(ds_RC.shape[0], device=y_A.device)[:, None]
            ds_RC.index_put_((index_R1, y_A[None]), dt_RA, accumulate=True)


def chunked_losses(
    problem: Problem, cotangents_N: Tensor | None, need_passages: bool = True, need_queries: bool = True
) -> tuple[Tensor, Gradients | None]:
    """(N,) unweighted losses as `dense_losses`, and the gradients for the given cotangents of them (None: none).

    With a group every rank must call this, with the same `need_*`. A gradient that is not needed is left zero; the
    scale's comes with that of the queries.
    """
    q_ND, p_MD, scale = problem.q_ND, problem.p_MD, problem.scale
    m = p_MD.shape[0]
    pos_N = positive_logits(problem)
    margin = margin_of(problem, pos_N)
    logits = _Logits(problem)
    columns = _column_statistics(problem, margin, logits, pos_N) if problem.symmetric else None
    share = 0.5 if problem.symmetric else 1.0
    loss_N = torch.zeros_like(pos_N) if columns is None else share * columns.loss_N

    wanted = cotangents_N is not None
    if wanted:
        g_N = share * cotangents_N
        g_A = problem.ranks.gather_queries(g_N) if problem.symmetric else None
        dq_ND, dp_MD = torch.zeros_like(q_ND), torch.zeros_like(p_MD)
        dpos_N = torch.zeros_like(pos_N)  # gradient of the positives' logits, a rank-one correction per row
        down_NKD = None if problem.own_NKD is None else torch.zeros_like(problem.own_NKD)
        if columns is not None:
            own = problem.ranks.own_queries
            dpos_N -= g_N * columns.slope_own_N / (1 if columns.count_A is None else columns.count_A[own])

    for rows, s_RC in logits.chunks():
        if wanted and columns is not None:  # before S is overwritten
            column_gradient_RA = _column_gradient(problem, margin, logits, rows, s_RC, columns, g_A)
        dropped_RC, further_RC = row_masks(problem, margin, rows, s_RC)
        further = None if further_RC is None else (further_RC.nonzero(as_tuple=True), s_RC[further_RC])
        maximum_R = finite_maximum(s_RC.masked_fill_(dropped_RC, NEGATIVE_INFINITY).amax(1))
        e_RC = s_RC.sub_(maximum_R[:, None]).exp_()
        z_R = e_RC.sum(1)
        lse_R = log_sum(maximum_R, z_R)
        term_R, slope_own_R = term_loss(lse_R, pos_N[rows]), term_slope(lse_R, pos_N[rows])
        slope_R, count_R = slope_own_R, 1
        if further is not None:
            (index_R, _), logit_F = further
            count_R = 1 + further_RC.sum(1)
            term_R = term_R.index_put((index_R,), term_loss(lse_R[index_R], logit_F), accumulate=True) / count_R
            slope_F = term_slope(lse_R[index_R], logit_F)
            slope_R = slope_R.index_put((index_R,), slope_F, accumulate=True) / count_R
        loss_N[rows] += share * term_R
        if not wanted:
            continue

        ds_RC = e_RC.mul_((g_N[rows] * slope_R / z_R.clamp_min(1))[:, None])
        if further is not None:
            ds_RC[further[0]] = -(g_N[rows] / count_R)[index_R] * slope_F
        dpos_N[rows] -= g_N[rows] * slope_own_R / count_R
        if columns is not None:
            logits.add_to_positive_columns(ds_RC, column_gradient_RA)
        if need_queries:
            torch.mm(ds_RC[:, :m], p_MD, out=dq_ND[rows])
        if need_passages:
            dp_MD.addmm_(ds_RC[:, :m].T, logits.qs_ND[rows])
        if down_NKD is not None:
            dq_ND[rows] += (ds_RC[:, None, m:] @ problem.own_NKD[rows])[:, 0]
            down_NKD[rows] = ds_RC[:, m:, None] * logits.qs_ND[rows, None]
    if not wanted:
        return loss_N, None

    dq_ND += dpos_N[:, None] * p_MD[problem.positives_N]
    dp_MD.index_put_((problem.positives_N,), dpos_N[:, None] * logits.qs_ND, accumulate=True)
    dscale = (q_ND * dq_ND).sum(1).sum()
    return loss_N, Gradients(dq_ND.mul_(scale), dp_MD, dscale, down_NKD)


def _column_statistics(problem: Problem, margin: Margin | None, logits: _Logits, pos_N: Tensor) -> _Columns:
    """The sweep before: running maximum and sum of every column, then the losses of this rank's own columns."""
    ranks, y_A = problem.ranks, problem.positives_A
    maximum_A = torch.full_like(y_A, NEGATIVE_INFINITY, dtype=pos_N.dtype)
    z_A = torch.zeros_like(maximum_A)
    further = []  # (column, logit) of the further positives: few, so they are kept rather than S made once more
    for rows, s_RC in logits.chunks():
        t_RA = logits.positive_columns(s_RC)
        dropped_RA, further_RA = column_masks(problem, margin, rows, t_RA)
        if further_RA is not None:
            further.append((further_RA.nonzero()[:, 1], t_RA[further_RA]))
        negatives_RA = t_RA.masked_fill(dropped_RA, NEGATIVE_INFINITY)
        larger_A = torch.maximum(maximum_A, negatives_RA.amax(0))
        offset_A = finite_maximum(larger_A)
        z_A.mul_((maximum_A - offset_A).exp()).add_(negatives_RA.sub_(offset_A).exp_().sum(0))
        maximum_A = larger_A
    offset_A = finite_maximum(ranks.max(maximum_A))
    z_A = ranks.sum(z_A.mul_((maximum_A - offset_A).exp()))
    lse_A = log_sum(offset_A, z_A)

    loss_N = term_loss(lse_A[ranks.own_queries], pos_N)
    slope_own_N = term_slope(lse_A[ranks.own_queries], pos_N)
    slope_A, count_A = ranks.gather_queries(slope_own_N), None
    if problem.duplicates == "positive":
        column_F, logit_F = (torch.cat(parts) for parts in zip(*further, strict=True))
        each_F, slope_F = term_loss(lse_A[column_F], logit_F), term_slope(lse_A[column_F], logit_F)
        sums_3A = z_A.new_zeros(3, y_A.shape[0])
        for sums_A, values_F in zip(sums_3A, (each_F, slope_F, torch.ones_like(each_F)), strict=True):
            sums_A.index_put_((column_F,), values_F, accumulate=True)
        more_A, more_slope_A, more_count_A = ranks.sum(sums_3A)
        count_A = 1 + more_count_A
        loss_N = (loss_N + more_A[ranks.own_queries]) / count_A[ranks.own_queries]
        slope_A = (slope_A + more_slope_A) / count_A
    return _Columns(offset_A, z_A, lse_A, loss_N, slope_A, slope_own_N, count_A)


def _column_gradient(
    problem: Problem,
    margin: Margin | None,
    logits: _Logits,
    rows: slice,
    s_RC: Tensor,
    columns: _Columns,
    g_A: Tensor,
) -> Tensor:
    """(R, A) gradient of the passage-to-query half with respect to T, without the own positives."""
    t_RA = logits.positive_columns(s_RC)
    dropped_RA, further_RA = column_masks(problem, margin, rows, t_RA)
    dt_RA = t_RA.masked_fill(dropped_RA, NEGATIVE_INFINITY).sub_(columns.maximum_A).exp_()
    dt_RA.mul_(g_A * columns.slope_A / columns.z_A.clamp_min(1))
    if further_RA is not None:
        index_F, column_F = further_RA.nonzero(as_tuple=True)
        slope_F = term_slope(columns.lse_A[column_F], t_RA[further_RA])
        dt_RA[index_F, column_F] = -(g_A / columns.count_A)[column_F] * slope_F
    return dt_RA
