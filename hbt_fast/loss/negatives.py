"""Who is a negative of whom, as keys to compare: what the tiled forms need instead of N x M masks.

The columns of S are laid out anew where the loss is symmetric: first the positive passages of the A queries of all
ranks, column k being query k's positive, then the passages that are nobody's positive. A passage with several queries
then has several columns; in row terms only the first counts (the key of the others is REPEATED).

Shapes: N queries of this rank, A queries of all ranks, M columns, D dimensions, F pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hbt_fast.loss.arguments import capturing
from hbt_fast.loss.problem import Problem
from hbt_fast.loss.terms import Margin, inverse_norm
from hbt_fast.loss.tiles import REPEATED


@dataclass(frozen=True, slots=True)
class Negatives:
    """Row terms: column j is a negative of query i unless their keys, or their owners, are equal or the column's key is
    REPEATED; its logit is s * row_gain.
    Column terms, of the first A columns: query i is a negative of k unless their terms, or their pairs, are equal.
    Both: unless s * row_inverse * column_inverse (scale * cosine) is above the row's, or the column's, limit.
    """

    row_key_N: Tensor  # int32, all keys
    column_key_M: Tensor
    row_term_N: Tensor | None = None
    column_term_A: Tensor | None = None
    row_pair_N: Tensor | None = None
    column_pair_A: Tensor | None = None
    row_inverse_N: Tensor | None = None  # of the computation's dtype, all of the margin
    column_inverse_M: Tensor | None = None
    row_limit_N: Tensor | None = None
    column_limit_A: Tensor | None = None
    row_owner_N: Tensor | None = None  # int32, a second relation
    column_owner_M: Tensor | None = None
    row_gain: Tensor | None = None  # 0-d, of the computation's dtype

    def tile(self, rows: slice, columns: slice) -> tuple[Tensor | None, ...]:
        """The fields, in order, cut to a tile of S; those of column terms are None where the tile has none."""

        def cut(x: Tensor | None, part: slice) -> Tensor | None:
            return None if x is None else x[part]

        width = 0 if self.column_term_A is None else max(0, self.column_term_A.shape[0] - columns.start)
        terms = columns if width else None
        return (
            self.row_key_N[rows],
            self.column_key_M[columns],
            cut(self.row_term_N, rows) if terms else None,
            cut(self.column_term_A, columns) if terms else None,
            cut(self.row_pair_N, rows) if terms else None,
            cut(self.column_pair_A, columns) if terms else None,
            cut(self.row_inverse_N, rows),
            cut(self.column_inverse_M, columns),
            cut(self.row_limit_N, rows),
            cut(self.column_limit_A, columns) if terms else None,
            cut(self.row_owner_N, rows),
            cut(self.column_owner_M, columns),
            self.row_gain,
        )


@dataclass(frozen=True, slots=True)
class Layout:
    """The columns of S and their negatives."""

    p_MD: Tensor  # without source_M, those of other ranks may still be on their way
    source_M: Tensor | None  # the passage of each column; None: columns are the passages
    negatives: Negatives


def layout_of(problem: Problem, margin: Margin | None) -> Layout:
    """Lay out the columns and make the keys; O((A + M) log M) beside copying the passages where columns move."""
    ranks, y_A, m = problem.ranks, problem.positives_A, problem.passages_MD.shape[0]
    own, device = ranks.own_queries, problem.q_ND.device
    key_M = content_keys(problem)
    row_key_A, p_MD, source_M = key_M[y_A], problem.passages_MD, None
    inverse_M = None if margin is None else margin.inverse_p_M
    owner_M = problem.owners_M.to(torch.int32) if problem.own_apart else None

    terms: dict[str, Tensor] = {}
    if problem.columns:
        index_A = torch.arange(y_A.shape[0], device=device)
        if not problem.leading and not torch.equal(y_A, index_A):
            first_M = torch.full((m,), y_A.shape[0], device=device).scatter_reduce_(0, y_A, index_A, "amin")
            rest = first_M == y_A.shape[0]
            others = torch.arange(m, device=device) if capturing(y_A) else rest.nonzero()[:, 0]
            source_M = torch.cat([y_A, others])
            repeated_M = torch.cat([first_M[y_A] != index_A, ~rest[others]])
            key_M = key_M[source_M].masked_fill_(repeated_M, REPEATED)
            p_MD = problem.p_MD[source_M]
            inverse_M, owner_M = (None if x is None else x[source_M] for x in (inverse_M, owner_M))
        same_A = row_key_A
        if problem.query_ids_given:  # a second relation, besides having one positive
            same_A = y_A.to(torch.int32)
            pair_A = _keys(problem.query_ids_A)
            terms |= {"row_pair_N": pair_A[own].contiguous(), "column_pair_A": pair_A}
        terms |= {"row_term_N": same_A[own].contiguous(), "column_term_A": same_A}
    if margin is not None:
        terms |= {"row_inverse_N": margin.inverse_q_N, "column_inverse_M": inverse_M, "row_limit_N": margin.limit_N}
        terms |= {"column_limit_A": margin.limit_A} if problem.columns else {}
    if owner_M is not None:  # its own hard negatives are a query's by pairs, with another gain
        terms |= {"row_owner_N": query_numbers(problem), "column_owner_M": owner_M}
    negatives = Negatives(row_key_A[own].contiguous(), key_M, **terms, row_gain=problem.batch_gain)
    return Layout(p_MD, source_M, negatives)


def layout_of_queries(problem: Problem, margin: Margin | None) -> Layout:
    """query_to_query: columns are the queries of all ranks; those that have this query's positive are no negatives."""
    own, y_A = problem.ranks.own_queries, problem.positives_A.to(torch.int32)
    terms = {}
    if problem.query_ids_A is not None:
        pair_A = _keys(problem.query_ids_A)
        terms = {"row_owner_N": pair_A[own].contiguous(), "column_owner_M": pair_A}
    if margin is not None:
        inverse_A = inverse_norm(problem.queries_AD, problem.scale.dtype)
        terms |= {"row_inverse_N": margin.inverse_q_N, "column_inverse_M": inverse_A, "row_limit_N": margin.limit_N}
    return Layout(problem.queries_AD, None, Negatives(y_A[own].contiguous(), y_A, **terms))


def layout_of_passages(problem: Problem, margin: Margin | None) -> Layout:
    """doc_to_doc: rows are the positives, columns all passages; of equal content or of one query they are no negatives.

    They are not laid out anew, and those of other ranks may still be on their way.
    """
    key_M, y_N = content_keys(problem), problem.positives_N
    terms = {}
    if problem.owners_M is not None:
        terms = {"row_owner_N": query_numbers(problem), "column_owner_M": problem.owners_M.to(torch.int32)}
    if margin is not None:
        inverse_M = margin.inverse_p_M
        terms |= {"row_inverse_N": inverse_M[y_N], "column_inverse_M": inverse_M, "row_limit_N": margin.limit_N}
    return Layout(problem.passages_MD, None, Negatives(key_M[y_N].contiguous(), key_M, **terms))


def content_keys(problem: Problem) -> Tensor:
    """(M,) int32, equal for passages of equal content."""
    if problem.passage_ids_M is not None:
        return _keys(problem.passage_ids_M)
    return torch.arange(problem.passages_MD.shape[0], device=problem.q_ND.device, dtype=torch.int32)


def query_numbers(problem: Problem) -> Tensor:
    """(N,) int32, this rank's queries among those of all ranks."""
    own = problem.ranks.own_queries
    return torch.arange(own.start, own.stop, device=problem.q_ND.device, dtype=torch.int32)


def _keys(ids: Tensor) -> Tensor:
    """Small int32 keys, equal where the ids are: an id's place in sorted order. Unlike unique, waits for no GPU."""
    return torch.searchsorted(ids.sort().values, ids).to(torch.int32)


def further_positives(problem: Problem) -> tuple[Tensor, Tensor]:
    """(F,) rows of this rank and (F,) passages that have the content of the row's positive, itself left out."""
    y_N = problem.positives_N
    rows_F, passages_F = _pairs(problem.passage_ids_M[y_N], problem.passage_ids_M)
    other = passages_F != y_N[rows_F]
    return rows_F[other], passages_F[other]


def further_queries(problem: Problem) -> tuple[Tensor, Tensor]:
    """(F,) rows of this rank and (F,) other queries of all ranks whose passages answer the row's query too."""
    y_A, own = problem.positives_A, problem.ranks.own_queries
    rows_F, queries_F = _pairs(y_A[own], y_A)
    if problem.query_ids_A is not None:
        more_rows, more_queries = _pairs(problem.query_ids_A[own], problem.query_ids_A)
        new = y_A[own][more_rows] != y_A[more_queries]
        rows_F, queries_F = torch.cat([rows_F, more_rows[new]]), torch.cat([queries_F, more_queries[new]])
    other = rows_F + own.start != queries_F
    return rows_F[other], queries_F[other]


def own_hard_negatives(problem: Problem) -> tuple[Tensor, Tensor]:
    """(F,) rows of this rank and (F,) passages that belong to them and have not the content of their positive."""
    rows_F, passages_F = _pairs(query_numbers(problem), problem.owners_M)
    key_M = content_keys(problem)
    other = key_M[passages_F] != key_M[problem.positives_N][rows_F]
    return rows_F[other], passages_F[other]


def _pairs(left_N: Tensor, right_M: Tensor) -> tuple[Tensor, Tensor]:
    """All (i, j) with left[i] == right[j], sorted by i: a join, so its size is that of the answer."""
    sorted_M, order_M = right_M.sort(stable=True)
    first_N = torch.searchsorted(sorted_M, left_N)
    count_N = torch.searchsorted(sorted_M, left_N, right=True) - first_N
    rows_F = torch.arange(left_N.shape[0], device=left_N.device).repeat_interleave(count_N)
    within_F = torch.arange(rows_F.shape[0], device=left_N.device) - (count_N.cumsum(0) - count_N)[rows_F]
    return rows_F, order_M[first_N[rows_F] + within_F]
