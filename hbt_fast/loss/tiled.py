"""InfoNCE without N x M memory, its gradients written out: the course of the computation, for every tiled backend.

S is worked on panel by panel (some rows, all columns). A panel's first visit makes its logits and takes (maximum, sum
of exp) over the negatives of its rows and columns. Once those are known its second visit makes G = d loss / d S in
their place, and the products G P and G^T Q. One-way, a panel needs the statistics of its own rows only, so both visits
follow each other and S is made once: 3 products. A symmetric loss needs the columns' statistics over all rows first: 3
products if all of S is kept between the visits, else S is made again: 4.

Positives, a term's own and further ones, are kept apart: their logits are row dots, their gradients rank-one.

Gradients of a term with cotangent g, positives j = 1..P and negatives n, m their maximum and z = sum_n exp(s_n - m):
    d s_j = -g/P slope_j        d s_n = g mean_j(slope_j) exp(s_n - m) / z

Shapes: N queries of this rank, A queries of all ranks, M columns (negatives.py), K own negatives, D dimensions,
F further positives.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from hbt_fast.loss.arguments import Options
from hbt_fast.loss.negatives import further_positives, further_queries, layout_of
from hbt_fast.loss.panels import Panels, Statistics
from hbt_fast.loss.panels_triton import TritonPanels
from hbt_fast.loss.planner import SMALLEST_WORKSPACE, explain
from hbt_fast.loss.problem import Problem, prepare
from hbt_fast.loss.ranks import ALONE, Ranks
from hbt_fast.loss.terms import (
    NEGATIVE_INFINITY,
    Margin,
    finite_maximum,
    log_sum,
    margin_of,
    positive_logits,
    row_dots,
    term_loss,
    term_slope,
)


class Gradients(NamedTuple):
    """Of sum_i g_i * loss_i over all ranks. `passages` is this rank's contribution to all passages, not yet reduced."""

    queries: Tensor
    passages: Tensor
    scale: Tensor
    own_negatives: Tensor | None


class _Positives(NamedTuple):
    """Positives beside a term's own, each by the row and the passage of its logit, and the term that it belongs to."""

    row_F: Tensor
    passage_F: Tensor
    term_F: Tensor
    logit_F: Tensor

    def of_terms(self, terms: slice) -> _Positives:
        """Those of a range of terms, which are numbered from its start then."""
        inside_F = (self.term_F >= terms.start) & (self.term_F < terms.stop)
        row_F, passage_F, term_F, logit_F = (x[inside_F] for x in self)
        return _Positives(row_F, passage_F, term_F - terms.start, logit_F)


class _Terms(NamedTuple):
    """T terms. `slope` is the mean of the slopes over a term's positives, `slope_own` that of its own positive."""

    loss_T: Tensor
    lse_T: Tensor
    slope_T: Tensor
    slope_own_T: Tensor
    count_T: Tensor


def tiled_info_nce(
    queries: Tensor,
    passages: Tensor,
    scale: Tensor,
    own_negatives: Tensor | None,
    o: Options,
    ranks: Ranks,
    backend: str,
    cotangents_N: Tensor | None,
    needs: tuple[bool, ...] = (True, True, True, True),
) -> tuple[Tensor, list[Tensor | None]]:
    """The reduced loss and the gradients of the four tensors; cotangents_N are those of reduction="none"."""
    problem = prepare(queries, passages, scale, own_negatives, o, ranks, overlap=True)
    g_N = problem.weighted(torch.ones_like(problem.q_ND[:, 0]) if cotangents_N is None else cotangents_N)
    losses_N, g = tiled_losses(
        problem, backend, g_N if any(needs) else None, need_queries=needs[0] or needs[2], need_passages=needs[1]
    )
    gradients: list[Tensor | None] = [None] * 4
    if needs[0]:
        gradients[0] = _times(g.queries, ranks.world).to(queries.dtype)
    if needs[1]:
        gradients[1] = _times(ranks.add_passage_gradients(g.passages), ranks.world).to(passages.dtype)
    if needs[2]:
        gradients[2] = ranks.sum(g.scale).to(scale)
    if needs[3] and own_negatives is not None:
        gradients[3] = _times(g.own_negatives, ranks.world).to(own_negatives.dtype)
    return problem.reduced(losses_N), gradients


def _times(x: Tensor, factor: int) -> Tensor:
    return x if factor == 1 else x * factor


def tiled_losses(
    problem: Problem, backend: str, cotangents_N: Tensor | None, need_passages: bool = True, need_queries: bool = True
) -> tuple[Tensor, Gradients | None]:
    """(N,) unweighted losses as `dense_losses`, and the gradients for the given cotangents of them (None: none).

    With a group every rank must call this, with the same `need_*`. A gradient that is not needed is left zero; the
    scale's comes with that of the queries.
    """
    ranks, wanted = problem.ranks, cotangents_N is not None
    pos_N = positive_logits(problem)
    margin = margin_of(problem, pos_N)
    own_NK = _own_logits(problem, margin)
    rows_N = Statistics.none(pos_N) if own_NK is None else Statistics.of(own_NK)  # then tile by tile
    layout = layout_of(problem, margin)
    plan = explain(
        pos_N.shape[0], layout.p_MD.shape[0], dtype=pos_N.dtype, symmetric=problem.symmetric, device=pos_N.device,
        workspace_bytes=problem.workspace_bytes, backend=backend, operands=problem.operands,
    )  # fmt: skip
    form = TritonPanels if plan.backend == "triton" else Panels
    panels = form(problem, layout, plan, need_queries and wanted, need_passages and wanted)
    more_rows, more_columns = _further(problem)

    if problem.symmetric:
        columns_A = Statistics.none(ranks.gather_queries(pos_N))
        for rows in panels.rows():
            panels.take_statistics(rows, rows_N, columns_A)
        columns_A = columns_A.over(ranks)
        terms_A = _terms(columns_A, ranks.gather_queries(pos_N), more_columns, ranks)
        terms_N = _terms(rows_N, pos_N, more_rows)
        loss_N = 0.5 * (terms_N.loss_T + terms_A.loss_T[ranks.own_queries])
        if not wanted:
            return loss_N, None
        g_N = 0.5 * cotangents_N
        g_A = ranks.gather_queries(g_N)
        factor_N, factor_A = g_N * rows_N.share(terms_N.slope_T), g_A * columns_A.share(terms_A.slope_T)
        for rows in panels.rows():
            panels.add_products(rows, rows_N, factor_N, columns_A, factor_A)
    else:
        g_N, factor_N = cotangents_N, torch.zeros_like(pos_N)
        for rows in panels.rows():
            panels.take_statistics(rows, rows_N)
            if wanted:
                part = rows_N.part(rows)
                more = None if more_rows is None else more_rows.of_terms(rows)
                factor_N[rows] = g_N[rows] * part.share(_terms(part, pos_N[rows], more).slope_T)
                panels.add_products(rows, rows_N, factor_N)
        terms_N = _terms(rows_N, pos_N, more_rows)
        loss_N = terms_N.loss_T
        if not wanted:
            return loss_N, None

    dq_ND, dp_MD = panels.gradients()
    dpos_N = -g_N * terms_N.slope_own_T / terms_N.count_T
    _add_further(problem, dq_ND, dp_MD, more_rows, g_N, terms_N)
    if problem.symmetric:
        dpos_N -= (g_A * terms_A.slope_own_T / terms_A.count_T)[ranks.own_queries]
        _add_further(problem, dq_ND, dp_MD, more_columns, g_A, terms_A)
    dpos_N1 = (dpos_N * problem.scale)[:, None]
    dq_ND.addcmul_(dpos_N1, problem.positives_ND)
    if problem.positive_rows is not None:
        dp_MD[problem.positive_rows].addcmul_(dpos_N1, problem.q_ND)
    else:
        dp_MD.index_put_((problem.positives_N,), dpos_N1 * problem.q_ND, accumulate=True)
    down_NKD = None
    if own_NK is not None:
        down_NK = (problem.scale * factor_N)[:, None] * (own_NK - finite_maximum(rows_N.maximum)[:, None]).exp()
        dq_ND += (down_NK[:, None] @ problem.own_NKD)[:, 0]
        down_NKD = down_NK[:, :, None] * problem.q_ND[:, None]
    dscale = row_dots(problem.q_ND, dq_ND).sum() / problem.scale
    return loss_N, Gradients(dq_ND, dp_MD, dscale, down_NKD)


def _terms(statistics: Statistics, pos_T: Tensor, further: _Positives | None, ranks: Ranks = ALONE) -> _Terms:
    """Terms from the statistics of their negatives; further positives of a term may lie on several ranks."""
    lse_T = log_sum(statistics.maximum, statistics.total)
    loss_T, slope_own_T = term_loss(lse_T, pos_T), term_slope(lse_T, pos_T)
    if further is None:
        return _Terms(loss_T, lse_T, slope_own_T, slope_own_T, torch.ones_like(pos_T))
    lse_F = lse_T[further.term_F]
    sums_3T = pos_T.new_zeros(3, pos_T.shape[0])
    values_3F = (term_loss(lse_F, further.logit_F), term_slope(lse_F, further.logit_F), torch.ones_like(lse_F))
    for sums_T, values_F in zip(sums_3T, values_3F, strict=True):
        sums_T.index_put_((further.term_F,), values_F, accumulate=True)
    more_loss_T, more_slope_T, more_T = ranks.sum(sums_3T)
    count_T = 1 + more_T
    return _Terms((loss_T + more_loss_T) / count_T, lse_T, (slope_own_T + more_slope_T) / count_T, slope_own_T, count_T)


def _own_logits(problem: Problem, margin: Margin | None) -> Tensor | None:
    """(N, K) logits of the own negatives, -inf where the margin drops one."""
    if problem.own_NKD is None:
        return None
    own_NK = problem.scale * (problem.own_NKD @ problem.q_ND[:, :, None])[:, :, 0]
    if margin is None:
        return own_NK
    cosine_NK = own_NK * margin.inverse_q_N[:, None] * margin.inverse_own_NK
    return own_NK.masked_fill(cosine_NK > margin.limit_N[:, None], NEGATIVE_INFINITY)


def _further(problem: Problem) -> tuple[_Positives | None, _Positives | None]:
    """Further positives of the row terms, and of the column terms of all ranks that have their row on this one."""
    rows = columns = None
    if problem.duplicates == "positive" and problem.passage_ids_M is not None:
        row_F, passage_F = further_positives(problem)
        rows = _Positives(row_F, passage_F, row_F, _logits(problem, row_F, passage_F))
    if problem.duplicates == "positive" and problem.symmetric:
        row_F, query_F = further_queries(problem)
        passage_F = problem.positives_A[query_F]
        columns = _Positives(row_F, passage_F, query_F, _logits(problem, row_F, passage_F))
    return rows, columns


def _blocks(problem: Problem, count: int) -> Iterator[slice]:
    """Of further positives, so many that vectors of them fit the workspace."""
    workspace = problem.workspace_bytes or SMALLEST_WORKSPACE
    step = max(1, workspace // (4 * problem.q_ND.element_size() * problem.q_ND.shape[1]))
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


def _logits(problem: Problem, row_F: Tensor, passage_F: Tensor) -> Tensor:
    logit_F = problem.q_ND.new_empty(row_F.shape[0])
    for block in _blocks(problem, row_F.shape[0]):
        logit_F[block] = row_dots(problem.q_ND[row_F[block]], problem.p_MD[passage_F[block]])
    return logit_F.mul_(problem.scale)


def _add_further(
    problem: Problem, dq_ND: Tensor, dp_MD: Tensor, further: _Positives | None, g_T: Tensor, terms: _Terms
) -> None:
    if further is None:
        return
    slope_F = term_slope(terms.lse_T[further.term_F], further.logit_F)
    ds_F = -(problem.scale * g_T / terms.count_T)[further.term_F] * slope_F
    for block in _blocks(problem, ds_F.shape[0]):
        row_F, passage_F, ds_F1 = further.row_F[block], further.passage_F[block], ds_F[block, None]
        dq_ND.index_put_((row_F,), ds_F1 * problem.p_MD[passage_F], accumulate=True)
        dp_MD.index_put_((passage_F,), ds_F1 * problem.q_ND[row_F], accumulate=True)
