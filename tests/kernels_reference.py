"""What the kernels compute, in float64 and as plain torch would in the operands' dtype, and made-up problems.

Shapes: R queries, M passages, A queries of all ranks, D dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hbt_fast.kernels import NEVER, Coefficients, Negatives, Statistics

INF = float("inf")


@dataclass(frozen=True)
class Case:
    q_RD: Tensor
    p_MD: Tensor
    scale: Tensor
    who: Negatives


def surrounded(values: Tensor) -> Tensor:
    """The same values, contiguous, in the middle of memory that spoils what reads it: NaN, or ids like real ones."""
    pad, n = 64, values.numel()
    junk = torch.full((n + 2 * pad,), float("nan")) if values.is_floating_point() else torch.arange(n + 2 * pad) % 7
    buffer = junk.to(values.device, values.dtype)
    buffer[pad : pad + n] = values.flatten()
    return buffer[pad : pad + n].view(values.shape)


def widest_gap(values: Tensor, dim: int) -> Tensor:
    """A limit per line, in the widest gap among its upper half: no rounding moves a value across it."""
    ordered = values.sort(dim=dim).values
    if ordered.shape[dim] < 3:
        return ordered.amax(dim) + 1
    upper = ordered.narrow(dim, ordered.shape[dim] // 2, ordered.shape[dim] - ordered.shape[dim] // 2)
    if upper.shape[dim] < 2:
        return upper.amax(dim) + 1
    below, above = upper.narrow(dim, 0, upper.shape[dim] - 1), upper.narrow(dim, 1, upper.shape[dim] - 1)
    at = (above - below).argmax(dim, keepdim=True)
    return ((above + below) / 2).gather(dim, at).squeeze(dim)


def make_case(
    r: int,
    m: int,
    d: int,
    *,
    scale: float,
    dtype: torch.dtype = torch.float32,
    margin: bool = False,
    query_ids: bool = False,
    seed: int = 0,
    device: str = "cpu",
) -> Case:
    """Related vectors, repeated ids, columns that are never negatives, fewer positives than passages. With a margin the
    last row and the first column have no negative."""
    g = torch.Generator().manual_seed(seed)
    p_MD = torch.randn(m, d, generator=g)
    q_RD = torch.randn(r, d, generator=g) + 0.5 * p_MD[torch.randint(m, (r,), generator=g)]
    q_RD, p_MD = (torch.nn.functional.normalize(x, dim=1).to(dtype) for x in (q_RD, p_MD))
    a = max(1, m - m // 3)
    column_ids_M = torch.randint(1, 2 + m, (m,), generator=g) * 2**33  # differ in their upper halves only
    y_A = torch.randint(3, 3 + 2 * a, (a,), generator=g) * 2**33
    y_R = y_A[torch.randint(a, (r,), generator=g)]
    row_ids_R = column_ids_M[torch.randint(m, (r,), generator=g)]
    if m > 4:
        column_ids_M[torch.randint(m, (m // 5,), generator=g)] = NEVER
        column_ids_M[0] = row_ids_R[0]
    query_ids_A = torch.randint(1, 2 + a, (a,), generator=g) if query_ids else None
    query_ids_R = query_ids_A[torch.randint(a, (r,), generator=g)] if query_ids else None
    inverse_q_R = inverse_p_M = limit_R = limit_A = None
    s = scale * q_RD.double() @ p_MD.double().T
    if margin:
        inverse_q_R, inverse_p_M = (1 + 0.2 * torch.rand(n, generator=g) for n in (r, m))
        cosine = s * inverse_q_R.double()[:, None] * inverse_p_M.double()
        limit_R, limit_A = widest_gap(cosine, 1).float(), widest_gap(cosine[:, :a], 0).float()
        if r > 2 and a > 2:
            limit_R[-1], limit_A[0] = -INF, -INF
    who = Negatives(
        row_ids_R, column_ids_M, inverse_q_R, inverse_p_M, limit_R, limit_A, y_R, y_A, query_ids_R, query_ids_A
    )
    who = Negatives(*(None if ids is None else surrounded(ids.to(device)) for ids in who))
    q_RD, p_MD = (surrounded(x.to(device)) for x in (q_RD, p_MD))
    return Case(q_RD, p_MD, torch.tensor(scale, device=device), who)


def logits(case: Case, dtype: torch.dtype) -> Tensor:
    return case.scale.to(dtype) * (case.q_RD.to(dtype) @ case.p_MD.to(dtype).T)


def row_negatives(case: Case, s_RM: Tensor) -> Tensor:
    w = case.who
    negative = (w.row_ids_R[:, None] != w.column_ids_M) & (w.column_ids_M != NEVER)
    if w.limit_R is not None:
        negative &= ~(s_RM * w.inverse_q_R[:, None] * w.inverse_p_M > w.limit_R[:, None])
    return negative


def column_negatives(case: Case, s_RM: Tensor) -> Tensor:
    w, a = case.who, case.who.y_A.shape[0]
    negative = w.y_R[:, None] != w.y_A
    if w.query_ids_A is not None:
        negative &= w.query_ids_R[:, None] != w.query_ids_A
    if w.limit_A is not None:
        negative &= ~(s_RM[:, :a] * w.inverse_q_R[:, None] * w.inverse_p_M[:a] > w.limit_A)
    return negative


def exp_negatives(s: Tensor, negative: Tensor, offset: Tensor, dim: int) -> Tensor:
    kept = s.masked_fill(~negative, -INF)
    return (kept - torch.where(offset == -INF, 0.0, offset).to(s.dtype).unsqueeze(dim)).exp()


def statistics(case: Case, dtype: torch.dtype = torch.float64) -> Statistics:
    s_RM = logits(case, dtype)
    t_RA = s_RM[:, : case.who.y_A.shape[0]]
    found = []
    for s, negative, dim in ((s_RM, row_negatives(case, s_RM), 1), (t_RA, column_negatives(case, s_RM), 0)):
        maximum = s.masked_fill(~negative, -INF).amax(dim)
        found += [maximum, exp_negatives(s, negative, maximum, dim).sum(dim)]
    return Statistics(*found)


def exp_rows(case: Case, offset_R: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    s_RM = logits(case, dtype)
    return exp_negatives(s_RM, row_negatives(case, s_RM), offset_R, 1)


def gradient(case: Case, c: Coefficients, dtype: torch.dtype = torch.float64) -> Tensor:
    s_RM = logits(case, dtype)
    a = case.who.y_A.shape[0]

    def factor(given: Tensor, maximum: Tensor) -> Tensor:
        return torch.where(maximum == -INF, 0.0, given.to(dtype))

    row_RM = exp_negatives(s_RM, row_negatives(case, s_RM), c.row_max_R, 1)
    column_RA = exp_negatives(s_RM[:, :a], column_negatives(case, s_RM), c.column_max_A, 0)
    d_RM = factor(c.row_factor_R, c.row_max_R)[:, None] * row_RM
    d_RM[:, :a] += factor(c.column_factor_A, c.column_max_A) * column_RA
    return c.normaliser.to(dtype) * d_RM
