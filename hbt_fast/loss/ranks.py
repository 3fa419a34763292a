"""The other processes of a loss: gathering shards of unequal length, and sums over ranks that autograd sees through.

Every rank computes the terms of its own queries against the passages of all ranks, so that partial gradients with
respect to foreign passages flow back over a reduction. `ALONE` is the same interface for one process: all identities.

Shapes: N queries and M_r passages of this rank, A queries and M passages of all ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Ranks:
    """Who takes part in a loss, with how many rows each. One process: group None."""

    group: dist.ProcessGroup | None = None
    rank: int = 0
    query_counts: tuple[int, ...] = (0,)
    passage_counts: tuple[int, ...] = (0,)

    @property
    def world(self) -> int:
        return len(self.query_counts)

    @property
    def own_queries(self) -> slice:
        start = sum(self.query_counts[: self.rank])
        return slice(start, start + self.query_counts[self.rank])

    @property
    def passage_blocks(self) -> list[slice]:
        """The rows of each rank among the passages of all."""
        starts = [sum(self.passage_counts[:r]) for r in range(self.world)]
        return [slice(start, start + count) for start, count in zip(starts, self.passage_counts, strict=True)]

    @property
    def own_passages(self) -> slice:
        return self.passage_blocks[self.rank]

    @property
    def own_first(self) -> list[slice]:
        """The passage blocks in the order to work on them: the own is there, the others are coming."""
        return self.passage_blocks[self.rank :] + self.passage_blocks[: self.rank]

    @property
    def of_queries(self) -> Ranks:
        """The same ranks where queries are what is gathered and has its gradients added up."""
        return replace(self, passage_counts=self.query_counts)

    # Differentiable, for the dense form. `sum` and `shared` are a pair: after a sum all ranks hold the same values and
    # computes the same things from them, so each rank's cotangent is already the whole one; where ranks use such a
    # value for different rows, `shared` adds their cotangents up.

    def gather_passages(self, p: Tensor, dtype: torch.dtype) -> Tensor:
        """(M_r, D) -> (M, D) in `dtype`; backwards the ranks' partial gradients are added (in `dtype`, not in half)."""
        return p.to(dtype) if self.group is None else _GatherPassages.apply(p, dtype, self)

    def sum(self, x: Tensor) -> Tensor:
        """Sum over ranks of same-shaped tensors; backwards the identity."""
        return x if self.group is None else _Sum.apply(x, self)

    def shared(self, x: Tensor) -> Tensor:
        """Identity; backwards the sum over ranks."""
        return x if self.group is None else _Shared.apply(x, self)

    def own(self, x_A: Tensor) -> Tensor:
        """This rank's rows of a tensor that all ranks hold; backwards every rank gets the cotangents of all rows."""
        return x_A if self.group is None else _Own.apply(x_A, self)

    def for_averaging(self, loss: Tensor) -> Tensor:
        """Identity; gradients times the number of ranks, which an average over ranks takes out again."""
        return loss if self.group is None else _Times.apply(loss, self.world)

    def shared_scale(self, scale: Tensor) -> Tensor:
        """Identity; the scale's gradient is averaged, so each rank holds the whole one whether or not DDP averages."""
        return scale if self.group is None else _Times.apply(_Shared.apply(scale, self), 1 / self.world)

    # Not differentiable.

    def max(self, x: Tensor) -> Tensor:
        return x if self.group is None else _all_reduce(x, self, dist.ReduceOp.MAX)

    def gather_queries(self, x_N: Tensor) -> Tensor:
        """(N, ...) of each rank -> (A, ...), in the order of ranks."""
        return x_N if self.group is None else _gather(x_N, self.query_counts, self.group)

    def start_gathering(self, p: Tensor, dtype: torch.dtype, finish: Callable[[Tensor], Tensor]) -> Gathering:
        """Send this rank's passages (M_r, D) to all ranks, and receive theirs while other work goes on."""
        return Gathering(self, p.contiguous(), dtype, finish)

    def gather_passage_ids(self, x: Tensor) -> Tensor:
        return x if self.group is None else _gather(x, self.passage_counts, self.group)

    def add_passage_gradients(self, dp_MD: Tensor) -> Tensor:
        """The ranks' partial gradients (M, D) -> the whole gradient of this rank's own passages (M_r, D)."""
        if self.group is None:
            return dp_MD
        # One reduction to each owner, all under way at once: what a reduce-scatter does, for shards of any length.
        dp_MD = dp_MD.contiguous()
        blocks = [dp_MD[block] for block in self.passage_blocks]
        work = [dist.reduce(x, group_dst=r, group=self.group, async_op=True) for r, x in enumerate(blocks)]
        for handle in work:
            handle.wait()
        return blocks[self.rank]


class Gathering:
    """The passages of all ranks on their way to this one: a block of rows from each, in `passages` (M, D) once it came.

    Args:
        ranks: who takes part.
        p: this rank's passages, (M_r, D).
        dtype: of the gathered passages; they travel in p's own, and straight into their place if it is the same.
        finish: turns a block as it came, in `dtype`, into the block to keep.
    """

    def __init__(self, ranks: Ranks, p: Tensor, dtype: torch.dtype, finish: Callable[[Tensor], Tensor]) -> None:
        self.passages = p.new_empty(sum(ranks.passage_counts), p.shape[1], dtype=dtype)
        self.finish, self.coming = finish, []
        for r, block in enumerate(ranks.passage_blocks):
            own = r == ranks.rank
            place = self.passages[block]
            received = p.detach() if own else place if p.dtype == dtype else torch.empty_like(place, dtype=p.dtype)
            work = dist.broadcast(received, group_src=r, group=ranks.group, async_op=True)
            if own:  # there at once; its sending is waited for when all others have come
                self._keep(block, received)
                self.sending = work, received
            else:
                self.coming.append((block, received, work))

    def wait(self, columns: slice) -> Tensor:
        """The passages of these columns, all there."""
        still = []
        for block, received, work in self.coming:
            if block.start < columns.stop and columns.start < block.stop:
                work.wait()
                self._keep(block, received)
            else:
                still.append((block, received, work))
        if self.coming and not still:
            self.sending[0].wait()
        self.coming = still
        return self.passages[columns]

    def _keep(self, block: slice, received: Tensor) -> None:
        place, kept = self.passages[block], self.finish(received.to(self.passages.dtype))
        if kept.data_ptr() != place.data_ptr():
            place.copy_(kept)


class NotFiniteError(ValueError):
    """NaN or infinity in an input, on this rank or another; raised on all ranks."""


ALONE = Ranks()
MEETING_LENGTH = 32


def meet(
    group: dist.ProcessGroup | None, sizes: dict[str, int], device: torch.device, error: ValueError | None
) -> Ranks:
    """Exchange shapes and options before any other collective, so that a mistake raises on every rank and none hangs.

    Args:
        group: the process group; None for one process.
        sizes: the same keys on every rank. "queries" and "passages" are row counts and may differ; the rest must agree.
        device: where the collectives of this group run (that of the embeddings).
        error: what is wrong with this rank's own arguments, if anything.

    Raises:
        ValueError: `error` here, a note of it on the other ranks, or the first entry of `sizes` in which ranks differ.
    """
    if error is not None and (group is None or not isinstance(group, dist.ProcessGroup)):
        raise error
    if group is None:
        return Ranks(query_counts=(sizes["queries"],), passage_counts=(sizes["passages"],))
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    names, row = list(sizes), [_code(error), *map(int, sizes.values())]
    row = torch.tensor(row + [0] * (MEETING_LENGTH - len(row)), device=device)  # an erring rank has no sizes to tell
    table = [torch.empty_like(row) for _ in range(world)]
    dist.all_gather(table, row, group=group)
    rows = [t.tolist() for t in table]
    if error is not None:
        raise error
    wrong = [r for r in range(world) if rows[r][0] != 1]
    if wrong and rows[wrong[0]][0] < 0:
        raise NotFiniteError(f"the loss's arguments are wrong on rank {wrong[0]}: NaN or Inf in one of them")
    if wrong:
        raise ValueError(f"the loss's arguments are wrong on rank {wrong[0]}; its own message says how")
    for column, name in enumerate(names, start=1):
        values = [r[column] for r in rows]
        if name not in ("queries", "passages") and len(set(values)) > 1:
            raise ValueError(f"{name} must be the same on every rank; rank by rank it is {values}")
    counts = {name: tuple(r[1 + names.index(name)] for r in rows) for name in ("queries", "passages")}
    return Ranks(group, rank, counts["queries"], counts["passages"])


def _code(error: ValueError | None) -> int:
    """What a rank tells the others of its arguments: 1 right, 0 wrong, -1 not finite."""
    return int(error is None) - isinstance(error, NotFiniteError)


def _all_reduce(x: Tensor, ranks: Ranks, op: dist.ReduceOp = dist.ReduceOp.SUM) -> Tensor:
    x = x.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, op=op, group=ranks.group)
    return x


def _gather(x: Tensor, counts: tuple[int, ...], group: dist.ProcessGroup) -> Tensor:
    padded = x.new_zeros(max(counts), *x.shape[1:])  # collectives want equal shapes
    padded[: x.shape[0]] = x.detach()
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


class _GatherPassages(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, p: Tensor, dtype: torch.dtype, ranks: Ranks) -> Tensor:
        ctx.ranks, ctx.dtype = ranks, p.dtype
        return _gather(p, ranks.passage_counts, ranks.group).to(dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.ranks.add_passage_gradients(grad).to(ctx.dtype), None, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks) -> Tensor:
        return _all_reduce(x, ranks)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, None


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _all_reduce(grad, ctx.ranks), None


class _Own(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return x[ranks.own_queries].clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.ranks.gather_queries(grad), None


class _Times(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad * ctx.factor, None
