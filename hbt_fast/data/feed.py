"""The feed: this rank's part of every global batch, prepared by a thread while the training step runs.

What a step needs of its data is planned, shared out among the ranks, freed of repeats and packed ahead of time. Nearly
all of it happens in Numba functions that release the GIL, so that a thread suffices: nothing is forked, copied between
processes or pickled. The thread runs no parallel function of torch, Numba or BLAS, each of which would bring up, or
resize, a pool of threads.
"""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

import numpy as np

from hbt_fast.data.pack import MicroBatch, assign, distinct, pack, row_loads
from hbt_fast.data.rows import DataError

if TYPE_CHECKING:
    from hbt_fast.data.plan import BatchPlan
    from hbt_fast.data.store import SourceStore, Store

QUERY, PASSAGE, NEGATIVE = range(3)  # roles of texts

Rewrite = Callable[
    ["BatchPlan", "SourceStore", np.ndarray, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray] | None
]
"""`rewrite(plan, source, texts, roles, rows)`: other token ids for the texts of one rank, or None for the stored ones.

texts: (n,) int64 text numbers of the source; roles: (n,) int8 QUERY, PASSAGE or NEGATIVE; rows: (n,) int64 position in
the global batch of the row each belongs to (`plan.query_languages[rows]` are the queries' languages, for example).
Returns (tokens, offsets): (T,) int32 and (n + 1,) int64, text i is tokens[offsets[i]:offsets[i + 1]].

It runs in the feed's thread. It must be a function of its arguments, and its answer for one text of that text's: which
texts a rank has depends on how many ranks there are.
"""


class Planner(Protocol):
    """What the feed needs of `hbt_fast.data.plan.BatchPlanner`."""

    def plan(self, step: int) -> BatchPlan:
        """The global batch of a step."""


@dataclass(frozen=True)
class RankBatch:
    """One rank's part of a global batch: n of its rows, and the h hard negatives that belong to them.

    Its texts are n queries, then the n passages, then the negatives.

    Attributes:
        plan: the global batch.
        rows: (n,) int64 which rows of it these are, ascending.
        texts: (2n + h,) int64 text numbers of `plan.source`.
        micro_batches: the distinct texts, packed; `index` counts in order of their first occurrence.
        budget: tokens per micro-batch, padding included.
        inverse: (2n + h,) int64 which distinct text each text is; None if no two are equal.
        passage_ids: (n + h,) int64 those of the plan, of the passages, then of the negatives.
        tokens: how many tokens the encoder reads, each distinct text once.
    """

    plan: BatchPlan
    rows: np.ndarray
    texts: np.ndarray
    micro_batches: list[MicroBatch]
    budget: int
    inverse: np.ndarray | None
    passage_ids: np.ndarray
    tokens: int


def rows_of(plan: BatchPlan, source: SourceStore, rank: int, world: int) -> np.ndarray:
    """Which rows of a global batch a rank computes, ascending; see `hbt_fast.data.pack.assign`.

    Raises:
        DataError: fewer rows than ranks.
    """
    if world == 1:
        return np.arange(len(plan.rows))
    if len(plan.rows) < world:
        raise DataError(f"batch.size is {len(plan.rows)}, for {world} ranks: each needs at least one pair")
    loads = row_loads(plan.queries, plan.passages, plan.negatives, plan.negative_rows, source.token_offsets)
    return np.flatnonzero(assign(loads, world) == rank)


def rank_batch(
    plan: BatchPlan,
    source: SourceStore,
    rows: np.ndarray,
    budget: int,
    *,
    towers: int = 1,
    pin: bool = False,
    rewrite: Rewrite | None = None,
) -> RankBatch:
    """Pack some rows of a global batch.

    Args:
        plan: the global batch.
        source: the one it is drawn from.
        rows: (n,) int64 positions in the batch.
        budget: tokens per micro-batch, padding included.
        towers: 2 packs queries (tower 0) and passages (tower 1) apart.
        pin: write the tokens to pinned memory, from which a GPU copies without waiting.
        rewrite: see `Rewrite`.

    Raises:
        ValueError: `rewrite` returned something else than it should.
    """
    mine = np.zeros(len(plan.rows), np.bool_)
    mine[rows] = True
    extra = np.flatnonzero(mine[plan.negative_rows])
    texts = np.concatenate([plan.queries[rows], plan.passages[rows], plan.negatives[extra]])
    passage_ids = plan.passage_ids[np.concatenate([rows, len(plan.rows) + extra])]
    numbers, tokens, offsets, hashes = texts, source.tokens, source.token_offsets, source.token_hashes
    if rewrite is not None:
        roles = np.repeat(np.array([QUERY, PASSAGE, NEGATIVE], np.int8), [len(rows), len(rows), len(extra)])
        where = np.concatenate([rows, rows, plan.negative_rows[extra]])
        if (rewritten := rewrite(plan, source, texts, roles, where)) is not None:
            tokens, offsets = _checked(*rewritten, len(texts))
            numbers, hashes = np.arange(len(texts)), None
    micro_batches, inverses, m = [], [], 0
    for tower, part in enumerate([numbers] if towers == 1 else [numbers[: len(rows)], numbers[len(rows) :]]):
        kept, inverse = distinct(part, tokens, offsets, hashes)
        packed = pack(kept, tokens, offsets, budget, out=_pinned(kept, offsets) if pin else None)
        micro_batches += [replace(micro, index=m + micro.index, tower=tower) for micro in packed] if tower else packed
        inverses.append(m + (np.arange(len(part)) if inverse is None else inverse))
        m += len(kept)
    inverse = None if m == len(texts) else np.concatenate(inverses)
    total = sum(len(micro.tokens) for micro in micro_batches)
    return RankBatch(plan, rows, texts, micro_batches, budget, inverse, passage_ids, total)


class Feed:
    """Iterates over a rank's batches of the steps first .. steps - 1, in order; a thread prepares some ahead.

    A context manager: leaving it ends the thread, wherever the iteration is. An error in the thread is raised by the
    iteration when its step's turn comes, and ends it.

    Args:
        planner: plans the global batches; the thread is the only one to call it while the feed is open.
        store: what they are drawn from.
        rank: of this process.
        world: number of ranks.
        budget: tokens per micro-batch, padding included.
        towers: see `rank_batch`.
        first: the first step.
        steps: the step to end before: the number of steps of the run.
        ahead: so many batches are ready, or being prepared, beside the one that was taken last; at least 1.
        pin: tokens in pinned memory, where there is a GPU. Copy them without waiting (`non_blocking`), but hold on to a
            batch until its copies are done.
        rewrite: replaces the tokens of texts; see `Rewrite`.
    """

    def __init__(
        self,
        planner: Planner,
        store: Store,
        *,
        rank: int = 0,
        world: int = 1,
        budget: int,
        towers: int = 1,
        first: int = 0,
        steps: int,
        ahead: int = 2,
        pin: bool = False,
        rewrite: Rewrite | None = None,
    ) -> None:
        if not 0 <= rank < world or ahead < 1:
            raise ValueError(
                f"rank {rank} of {world} with {ahead} batches ahead: need 0 <= rank < world and ahead >= 1"
            )
        self._options = options = {
            "budget": budget, "towers": towers, "pin": pin and _gpu_is_there(), "rewrite": rewrite
        }  # fmt: skip

        def prepare(step: int) -> RankBatch:
            plan = planner.plan(step)
            source = store.sources[plan.source]
            return rank_batch(plan, source, rows_of(plan, source, rank, world), **options)

        self._left = max(steps - first, 0)
        self._ready: queue.SimpleQueue[RankBatch | BaseException] = queue.SimpleQueue()
        self._free, stop = threading.Semaphore(ahead), threading.Event()
        arguments = (prepare, range(first, steps), self._ready, self._free, stop)
        self._thread = threading.Thread(target=_work, args=arguments, name="hbt_fast.feed", daemon=True)
        self._end = weakref.finalize(self, _stop, stop, self._free)  # also when nobody closes it
        self._thread.start()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> RankBatch:
        if not self._left:
            self.close()
            raise StopIteration
        item = self._ready.get()
        if isinstance(item, BaseException):
            self.close()
            raise item
        self._left -= 1
        self._free.release()
        return item

    def set_budget(self, budget: int) -> None:
        """Pack batches with another budget from now on; those that are ready have the old one."""
        self._options["budget"] = budget

    def close(self) -> None:
        """End the thread, after the batch that it is preparing; the iteration is over."""
        self._left = 0
        self._end()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _work(
    prepare: Callable[[int], RankBatch],
    steps: range,
    ready: queue.SimpleQueue[RankBatch | BaseException],
    free: threading.Semaphore,
    stop: threading.Event,
) -> None:
    """The thread. It knows nothing of the feed, so that a forgotten one is collected and ends it."""
    try:
        for step in steps:
            free.acquire()
            if stop.is_set():
                return
            ready.put(prepare(step))
    except BaseException as error:  # whatever it is: the consumer waits for an answer
        ready.put(error)


def _stop(stop: threading.Event, free: threading.Semaphore) -> None:
    stop.set()
    free.release()


def _checked(tokens: np.ndarray, offsets: np.ndarray, texts: int) -> tuple[np.ndarray, np.ndarray]:
    """What `rewrite` returned, if Numba may read it."""
    right = tokens.dtype == np.int32 and offsets.dtype == np.int64 and offsets.shape == (texts + 1,)
    if not right or offsets[0] < 0 or offsets[-1] > len(tokens) or (np.diff(offsets) < 1).any():
        raise ValueError(
            f"rewrite must return (T,) int32 tokens and ({texts + 1},) int64 offsets, one token per text at least; it "
            f"returned {tokens.dtype} {tokens.shape} and {offsets.dtype} {offsets.shape}"
        )
    return tokens, offsets


def _gpu_is_there() -> bool:
    import torch

    return torch.cuda.is_available()


def _pinned(texts: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Pinned memory for the tokens of the texts; torch keeps it for the next batch when the arrays are gone."""
    import torch

    total = int((offsets[texts + 1] - offsets[texts]).sum())
    return torch.empty(total, dtype=torch.int32, pin_memory=True).numpy()
