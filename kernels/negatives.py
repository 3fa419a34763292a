"""Who is a negative of whom, for every kernel: the arguments, and the two masks as Triton functions.

Shapes: R queries of a chunk, M passages, A queries of all ranks (their positive passages are the first A columns of S).
"""

# ruff: noqa: ANN001, ANN201 (Triton types the arguments of its functions itself)
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

NEVER = -(2**63)  # as a column id: this column is no negative of any row (it repeats another column)
_NEVER = tl.constexpr(NEVER)


class Negatives(NamedTuple):
    """What decides who is a negative. A NamedTuple: frozen, and Triton takes it as one argument (None costs nothing).

    Row terms: passage j is a negative of row i unless `row_ids_R[i] == column_ids_M[j]`, or `column_ids_M[j]` is
    `NEVER`, or `owner_R[i] == owner_M[j]`, or `s * inverse_q_R[i] * inverse_p_M[j] > limit_R[i]`. A negative's logit is
    `s * gain`.
    Column terms (symmetric loss): row i is a negative of column k < A unless `y_R[i] == y_A[k]`, or
    `query_ids_R[i] == query_ids_A[k]`, or `s * inverse_q_R[i] * inverse_p_M[k] > limit_A[k]`.

    Ids are int64 and compared for equality only; the margin's tensors and gain, 0-d, are float32. Everything is
    contiguous and on the device of the operands. Groups are given whole or not at all.
    """

    row_ids_R: Tensor
    column_ids_M: Tensor
    inverse_q_R: Tensor | None = None  # the margin
    inverse_p_M: Tensor | None = None
    limit_R: Tensor | None = None
    limit_A: Tensor | None = None  # with the margin, for column terms only
    y_R: Tensor | None = None  # column terms
    y_A: Tensor | None = None
    query_ids_R: Tensor | None = None
    query_ids_A: Tensor | None = None
    owner_R: Tensor | None = None
    owner_M: Tensor | None = None
    gain: Tensor | None = None

    def check(self, rows: int, columns: int, device: torch.device, *, symmetric: bool) -> None:
        """Raise ValueError or TypeError, naming the field, unless the fields fit an operation on R x M logits.

        Args:
            rows: R.
            columns: M.
            device: of the operands.
            symmetric: whether the operation has column terms.
        """
        positives = self.y_A.shape[0] if self.y_A is not None else 0
        shape = {"R": (rows,), "M": (columns,), "A": (positives,), "n": ()}  # by the last letter, "n" of gain
        groups = [("inverse_q_R", "inverse_p_M", "limit_R"), ("y_R", "y_A"), ("query_ids_R", "query_ids_A")]
        groups += [("owner_R", "owner_M")]
        for group in groups:
            if len({getattr(self, name) is None for name in group}) > 1:
                raise ValueError(f"{', '.join(group)} belong together: give all of them or none")
        if symmetric and self.y_A is None:
            raise ValueError("column terms need y_R and y_A, the positives of the rows and of the queries of all ranks")
        if symmetric and (self.limit_A is None) != (self.limit_R is None):
            raise ValueError("with a margin, column terms need limit_A beside limit_R")
        if symmetric and not 1 <= positives <= columns:
            raise ValueError(f"y_A has {positives} entries, but its columns are the first of {columns} passages")
        for name, value in self._asdict().items():
            if value is None:
                continue
            dtype = torch.float32 if name.startswith(("inverse", "limit", "gain")) else torch.int64
            if value.dtype != dtype:
                raise TypeError(f"{name} is {value.dtype}, not {dtype}")
            if value.shape != shape[name[-1]] or not value.is_contiguous() or value.device != device:
                raise ValueError(
                    f"{name} has shape {tuple(value.shape)} and strides {value.stride()} on {value.device}; "
                    f"{shape[name[-1]]}, contiguous, on {device} is needed"
                )


@triton.jit
def keep_row_negatives(s_RM, who, rows, columns, R, M):
    """The tile of gained logits, -inf where the column is no negative of the row. Columns from M on are `NEVER`."""
    inside_M = columns < M
    row_ids_R = tl.load(who.row_ids_R + rows, mask=rows < R, other=0)
    column_ids_M = tl.load(who.column_ids_M + columns, mask=inside_M, other=_NEVER)
    negative = (row_ids_R[:, None] != column_ids_M[None, :]) & (column_ids_M != _NEVER)[None, :]
    if who.owner_R is not None:
        owner_R = tl.load(who.owner_R + rows, mask=rows < R, other=0)
        owner_M = tl.load(who.owner_M + columns, mask=inside_M, other=0)
        negative = negative & (owner_R[:, None] != owner_M[None, :])
    if who.limit_R is not None:
        inverse_q_R = tl.load(who.inverse_q_R + rows, mask=rows < R, other=0.0)
        inverse_p_M = tl.load(who.inverse_p_M + columns, mask=inside_M, other=0.0)
        limit_R = tl.load(who.limit_R + rows, mask=rows < R, other=0.0)
        above = s_RM * inverse_q_R[:, None] * inverse_p_M[None, :] > limit_R[:, None]
        negative = negative & (above == 0)
    if who.gain is not None:
        s_RM *= tl.load(who.gain)
    return tl.where(negative, s_RM, float("-inf"))


@triton.jit
def keep_column_negatives(s_RM, who, rows, columns, R, A):
    """The tile of logits with -inf where the row is no negative of the column, and outside of R x A."""
    inside_R = rows < R
    inside_A = columns < A
    y_R = tl.load(who.y_R + rows, mask=inside_R, other=0)
    y_A = tl.load(who.y_A + columns, mask=inside_A, other=0)
    negative = (y_R[:, None] != y_A[None, :]) & inside_R[:, None] & inside_A[None, :]
    if who.query_ids_A is not None:
        query_ids_R = tl.load(who.query_ids_R + rows, mask=inside_R, other=0)
        query_ids_A = tl.load(who.query_ids_A + columns, mask=inside_A, other=0)
        negative = negative & (query_ids_R[:, None] != query_ids_A[None, :])
    if who.limit_A is not None:
        inverse_q_R = tl.load(who.inverse_q_R + rows, mask=inside_R, other=0.0)
        inverse_p_M = tl.load(who.inverse_p_M + columns, mask=inside_A, other=0.0)
        limit_A = tl.load(who.limit_A + columns, mask=inside_A, other=0.0)
        above = s_RM * inverse_q_R[:, None] * inverse_p_M[None, :] > limit_A[None, :]
        negative = negative & (above == 0)
    return tl.where(negative, s_RM, float("-inf"))
