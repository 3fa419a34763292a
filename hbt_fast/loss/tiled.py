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

import math
from typing import NamedTuple

import torch
from torch import Tensor

from hbt_fast.loss.arguments import Options
from hbt_fast.loss.joint import OtherPassages, OtherQueries
from hbt_fast.loss.negatives import Layout, layout_of
from hbt_fast.loss.pairs import HardNegatives, Positives, RankOne, add_positives, further
from hbt_fast.loss.panels import Panels, Statistics
from hbt_fast.loss.panels_triton import TritonPanels
from hbt_fast.loss.planner import explain
from hbt_fast.loss.problem import Problem, prepare
from hbt_fast.loss.ranks import ALONE, Ranks
from hbt_fast.loss.terms import (
    BLOCK,
    NEGATIVE_INFINITY,
    Margin,
    blocks,
    finite_maximum,
    log_sum,
    margin_of,
    positive_logits,
    row_dots,
    term_loss,
    term_slope,
)


class _Wanted(NamedTuple):
    """Where gradients go; None: not needed. That of the scale comes with the queries'."""

    queries_ND: Tensor | None
    own_negatives_NKD: Tensor | None
    passages: bool
    scale: bool


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
    problem = prepare(queries, passages, scale, own_negatives, o, ranks, backend)
    ones_N = torch.ones(queries.shape[0], dtype=problem.scale.dtype, device=queries.device)
    # times the number of ranks, which an average over ranks takes out again
    g_N = problem.weighted(ones_N if cotangents_N is None else cotangents_N) * ranks.world
    wanted = _Wanted(
        _empty_like(queries) if needs[0] else None,
        _empty_like(own_negatives) if needs[3] and own_negatives is not None else None,
        needs[1],
        needs[2],
    )
    losses_N, dp_MD, dscale = tiled_losses(problem, backend, g_N, wanted, passages.dtype)
    dp_MD = None if dp_MD is None else ranks.add_passage_gradients(dp_MD).to(passages.dtype)
    dscale = None if dscale is None else (ranks.sum(dscale) / ranks.world).to(scale)
    return problem.reduced(losses_N), [wanted.queries_ND, dp_MD, dscale, wanted.own_negatives_NKD]


def _empty_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def tiled_losses(
    problem: Problem, backend: str, g_N: Tensor, wanted: _Wanted, passages_dtype: torch.dtype
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(N,) unweighted losses as `dense_losses`, and gradients of their sum with the factors g_N.

    Those of queries and own negatives go into `wanted`; returned are this rank's contributions to those of all passages
    (M, D), in the computation's precision, and to the scale's. With a group every rank must call this, and want alike.
    """
    ranks = problem.ranks
    pos_N = positive_logits(problem)
    margin = margin_of(problem, pos_N)
    own_NK = _own_logits(problem, margin)
    rows_N = Statistics.none(pos_N) if own_NK is None else Statistics.of(own_NK)  # then tile by tile
    hard = HardNegatives.of(problem, margin)
    if hard is not None:
        rows_N.take(hard.statistics(pos_N))
    layout = layout_of(problem, margin)
    (n, d), m = problem.q_ND.shape, layout.p_MD.shape[0]
    queries = _Queries(problem, wanted, own_NK, rows_N)
    any_wanted = queries.needed or wanted.passages or wanted.own_negatives_NKD is not None
    plan = explain(
        n, m, d=d, dtype=queries.dtype, operands=problem.operands, symmetric=problem.symmetric, device=pos_N.device,
        workspace_bytes=problem.workspace_bytes, backend=backend, joint=tuple(problem.joint),
        queries=problem.positives_A.shape[0], beside=_beside(problem, layout, wanted, passages_dtype),
    )  # fmt: skip
    form = TritonPanels if plan.backend == "triton" else Panels
    panels = form(problem, layout, plan, wanted.passages)
    other_queries = other_passages = None
    if "query_to_query" in problem.joint:
        other_queries = OtherQueries(problem, margin, plan, queries=wanted.queries_ND is not None)
    if "doc_to_doc" in problem.joint:
        other_passages = OtherPassages(problem, margin, plan, passages=wanted.passages, scale=wanted.scale)
    more_rows, more_columns = further(problem)

    def take_statistics(rows: slice, columns_A: Statistics | None = None) -> None:
        panels.take_statistics(rows, rows_N, columns_A)
        for other in (other_queries, other_passages):
            if other is not None:
                other.take_statistics(rows, rows_N, hold=columns_A is None)

    def add_products(rows: slice, beside: list[RankOne], *of_columns: Statistics | Tensor) -> None:
        dq_RD = queries.begin(rows)
        panels.add_products(rows, rows_N, factor_N, *of_columns, dq_RD=dq_RD)
        if other_queries is not None:
            other_queries.add_products(rows, rows_N, factor_N, dq_RD)
        if other_passages is not None:
            other_passages.add_products(rows, rows_N, factor_N)
        queries.finish(rows, dq_RD, factor_N, dpos_N, [*beside, *hard_negatives()])

    def hard_negatives() -> list[RankOne]:
        return [] if hard is None else [hard.rank_one(rows_N, factor_N)]

    if problem.columns:
        columns_A = Statistics.none(pos_N.new_empty(problem.positives_A.shape[0]))
        for rows in panels.rows():
            take_statistics(rows, columns_A)
        columns_A = columns_A.over(ranks)
        if problem.symmetric:
            terms_A = _terms(columns_A, ranks.gather_queries(pos_N), more_columns, ranks)
            terms_N = _terms(rows_N, pos_N, more_rows)
            loss_N = 0.5 * (terms_N.loss_T + terms_A.loss_T[ranks.own_queries])
            g_N = 0.5 * g_N
            g_A = ranks.gather_queries(g_N)
            dpos_N = _dpos(g_N, terms_N) + _dpos(g_A, terms_A)[ranks.own_queries]
            beside = [*_rank_one(more_rows, g_N, terms_N), *_rank_one(more_columns, g_A, terms_A)]
            factor_N, factor_A = g_N * rows_N.share(terms_N.slope_T), g_A * columns_A.share(terms_A.slope_T)
        else:  # a column's negatives are in the softmax of its query
            columns_A.take(Statistics(*(ranks.gather_queries(x) for x in (rows_N.maximum, rows_N.total))))
            rows_N.take_over(columns_A.part(ranks.own_queries))
            terms_N = _terms(rows_N, pos_N, more_rows, copies=problem.copies)
            loss_N, dpos_N, beside = terms_N.loss_T, _dpos(g_N, terms_N), _rank_one(more_rows, g_N, terms_N)
            factor_N = g_N * rows_N.share(terms_N.slope_T)
            factor_A = ranks.gather_queries(factor_N)
        if not any_wanted:
            return loss_N, None, None
        for rows in panels.rows():
            add_products(rows, beside, columns_A, factor_A)
    else:
        factor_N, dpos_N = torch.zeros_like(pos_N), torch.zeros_like(pos_N)
        for rows in panels.rows():
            take_statistics(rows)
            if any_wanted:
                part, g_R = rows_N.part(rows), g_N[rows]
                more = None if more_rows is None else more_rows.of_terms(rows)
                terms_R = _terms(part, pos_N[rows], more)
                factor_N[rows], dpos_N[rows] = g_R * part.share(terms_R.slope_T), _dpos(g_R, terms_R)
                add_products(rows, _rank_one(more, g_R, terms_R))
        terms_N = _terms(rows_N, pos_N, more_rows)
        loss_N = terms_N.loss_T
        if not any_wanted:
            return loss_N, None, None
        beside = _rank_one(more_rows, g_N, terms_N)

    dp_MD, dots = panels.passages(), queries.dots_N.sum()
    if dp_MD is not None:
        add_positives(problem, dp_MD, dpos_N, [*beside, *hard_negatives()])
    if other_passages is not None:
        dots += other_passages.dots
        if dp_MD is not None:
            other_passages.add_to(dp_MD)
    if other_queries is not None and wanted.queries_ND is not None:
        queries.add(other_queries.of_columns())
    return loss_N, dp_MD, dots / problem.scale if wanted.scale else None


class _Queries:
    """The gradients of a panel's queries and own negatives, finished row by row: beside the products they have parts
    from positives and own negatives. Their row dots with the queries are the gradient of the scale.
    """

    def __init__(self, problem: Problem, wanted: _Wanted, own_NK: Tensor | None, rows_N: Statistics) -> None:
        self.problem, self.wanted, self.own_NK, self.rows_N = problem, wanted, own_NK, rows_N
        self.needed = wanted.queries_ND is not None or wanted.scale
        self.dots_N = torch.zeros_like(rows_N.maximum)
        # whole, in the computation's precision: the result, or one apart where rounding must wait for what comes last
        self.sum_ND = wanted.queries_ND
        if self.sum_ND is not None and self.sum_ND.dtype != problem.scale.dtype:
            later = "query_to_query" in problem.joint
            self.sum_ND = torch.empty_like(problem.q_ND, dtype=problem.scale.dtype) if later else None

    @property
    def dtype(self) -> torch.dtype:
        """The gradients', if they are asked for and narrower than the computation's."""
        dtype, out_ND = self.problem.scale.dtype, self.wanted.queries_ND
        return dtype if out_ND is None or dtype == torch.float64 else out_ND.dtype

    def begin(self, rows: slice) -> Tensor | None:
        """(R, D) to put the products in, in the computation's precision: the result, if it has that."""
        if not self.needed:
            return None
        if self.sum_ND is not None:
            return self.sum_ND[rows]
        return torch.empty_like(self.problem.q_ND[rows], dtype=self.problem.scale.dtype)

    def finish(
        self, rows: slice, dq_RD: Tensor | None, factor_N: Tensor, dpos_N: Tensor, further: list[RankOne]
    ) -> None:
        """Add the other parts; take row dots; store what is not in its place."""
        problem, scale = self.problem, self.problem.scale
        if self.own_NK is not None:
            self._own_negatives(rows, dq_RD, factor_N)
        if dq_RD is None:
            return
        q_RD, dpos_R1 = problem.q_ND[rows], scale * dpos_N[rows, None]
        for some in further:
            row_F, passage_F, ds_F = some.of_rows(rows)
            for block in blocks(row_F.shape[0], q_RD.shape[1]):
                down_FD = (scale * ds_F[block, None]) * problem.p_MD[passage_F[block]]
                dq_RD.index_put_((row_F[block],), down_FD, accumulate=True)
        for block in blocks(*dq_RD.shape):
            whole = slice(rows.start + block.start, rows.start + block.stop)
            dq_RD[block].addcmul_(dpos_R1[block], problem.positives(whole))
            self.dots_N[whole] = row_dots(q_RD[block], dq_RD[block], scale.dtype)
        if self.wanted.queries_ND is not None and self.sum_ND is None:
            self.wanted.queries_ND[rows] = dq_RD

    def add(self, dq_ND: Tensor) -> None:
        """Add what comes when all panels are done."""
        self.sum_ND += dq_ND
        if self.sum_ND is not self.wanted.queries_ND:
            self.wanted.queries_ND.copy_(self.sum_ND)

    def _own_negatives(self, rows: slice, dq_RD: Tensor | None, factor_N: Tensor) -> None:
        problem, out_NKD = self.problem, self.wanted.own_negatives_NKD
        offset_R1 = finite_maximum(self.rows_N.maximum[rows])[:, None]
        down_RK = (problem.scale * factor_N[rows])[:, None] * (self.own_NK[rows] - offset_R1).exp()
        own_RKD, q_RD = problem.own_NKD[rows], problem.q_ND[rows]
        for block in blocks(down_RK.shape[0], max(1, own_RKD[0].numel())):
            down_BK = down_RK[block]
            if dq_RD is not None:
                dq_RD[block] += (down_BK[:, None] @ own_RKD[block].to(down_BK.dtype))[:, 0]
            if out_NKD is not None:
                out_NKD[rows][block] = down_BK[:, :, None] * q_RD[block, None]


def _beside(problem: Problem, layout: Layout, wanted: _Wanted, passages_dtype: torch.dtype) -> int:
    """Bytes of matrices beside the panels: operands that are copies, and passages' gradients that are not returned."""
    element = problem.scale.element_size()
    copied, of_columns = problem.copied_bytes, element * layout.p_MD.numel()
    if problem.gathering is not None:
        copied += element * min(BLOCK, problem.q_ND.numel())  # products with one rank's passages
    if layout.source_M is not None:
        copied += layout.p_MD.nbytes
    if "query_to_query" in problem.joint:  # the queries of all ranks and their gradients, and the sum of both parts
        queries_AD = problem.queries_AD
        copied += 0 if queries_AD.data_ptr() == problem.q_ND.data_ptr() else queries_AD.nbytes
        copied += element * (queries_AD.numel() + problem.q_ND.numel())
    if "doc_to_doc" in problem.joint:
        copied += (element + problem.q_ND.element_size()) * problem.q_ND.numel() + of_columns
    if not wanted.passages:
        return copied
    if layout.source_M is not None:
        copied += of_columns
    returned = passages_dtype == problem.scale.dtype and problem.ranks.group is None
    return copied + (0 if returned else element * problem.passages_MD.numel())


def _terms(
    statistics: Statistics, pos_T: Tensor, further: Positives | None, ranks: Ranks = ALONE, copies: int = 1
) -> _Terms:
    """Terms from the statistics of their negatives; further positives of a term may lie on several ranks."""
    lse_T = log_sum(statistics.maximum, statistics.total) - math.log(copies)
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


def _dpos(g_T: Tensor, terms: _Terms) -> Tensor:
    """d loss / d logit of the terms' own positives."""
    return -g_T * terms.slope_own_T / terms.count_T


def _own_logits(problem: Problem, margin: Margin | None) -> Tensor | None:
    """(N, K) logits of the own negatives, -inf where the margin drops one."""
    own_NKD, q_ND, dtype = problem.own_NKD, problem.q_ND, problem.scale.dtype
    if own_NKD is None:
        return None
    rows = blocks(own_NKD.shape[0], max(1, own_NKD[0].numel()))
    own_NK = torch.cat([(own_NKD[r].to(dtype) @ q_ND[r, :, None].to(dtype))[:, :, 0] for r in rows]).mul_(problem.scale)
    if margin is not None:
        cosine_NK = own_NK * margin.inverse_q_N[:, None] * margin.inverse_own_NK
        own_NK.masked_fill_(cosine_NK > margin.limit_N[:, None], NEGATIVE_INFINITY)
    return own_NK if problem.own_gain is None else own_NK * problem.own_gain


def _rank_one(further: Positives | None, g_T: Tensor, terms: _Terms) -> list[RankOne]:
    """d loss / d logit of further positives, if there are any."""
    if further is None:
        return []
    slope_F = term_slope(terms.lse_T[further.term_F], further.logit_F)
    return [RankOne(further.row_F, further.passage_F, -(g_T / terms.count_T)[further.term_F] * slope_F)]
