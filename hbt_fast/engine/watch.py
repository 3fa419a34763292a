"""Ranks that hang: the others find out which one and where it is, say so and end the run, instead of waiting for hours.

Every rank tells its `Watch` what it begins (a tuple is stored, nothing more). A thread reports it to the store that the
ranks share; another, when its own rank has not moved for too long, looks at what the others reported:

    nothing new from a rank      its process is stopped, or its machine or network is gone
    a rank that is behind        it hangs there: the others wait for it in a collective
    all at the same place        a collective does not come back

Time is counted in the thread's own beats, so that a job that was suspended as a whole does not look like one that hung.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import traceback
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple, Self

import torch.distributed as dist

if TYPE_CHECKING:
    from hbt_fast.engine.launch import World

BEAT_SECONDS = 10.0  # between reports, at most
NOT_WATCHED = ("checkpoint", "evaluation")  # rank 0 works, and the others wait as long as train.timeout_minutes


class Place(NamedTuple):
    """Where a rank is; a smaller one is behind.

    Attributes:
        step: that it is in.
        begun: phases of the step begun so far; all ranks begin the same ones.
        left: minus the micro-batches of the phase that are left to do.
        phase: its name.
    """

    step: int
    begun: int = 0
    left: int = 0
    phase: str = "data"

    def __str__(self) -> str:
        return f"step {self.step}, {self.phase}"


class Report(NamedTuple):
    """What a rank last said.

    Attributes:
        beat: how many reports it has made.
        place: where it is.
        idle: seconds that it has been there.
        stack: of its training thread, where it is long there.
    """

    beat: int
    place: Place
    idle: float
    stack: str = ""


class Watch:
    """Ends the process, with status 1, when no rank makes progress; a context manager around the steps.

    Args:
        world: the ranks; nothing is watched where there is only one.
        minutes: without progress; 0 watches nothing.
    """

    def __init__(self, world: World, minutes: float) -> None:
        self.world, self.minutes = world, minutes
        self.limit = 60 * minutes if world.size > 1 else 0.0
        self.interval = min(BEAT_SECONDS, self.limit / 10)
        self.place, self._idle, self._beat = Place(0), 0.0, 0
        self._reports: dict[int, Report] = {}
        self._left = threading.Event()

    def step(self, step: int) -> None:
        """A step begins, with waiting for its data."""
        self.place = Place(step)

    def begin(self, phase: str) -> None:
        """The step's next phase begins."""
        self.place = Place(self.place.step, self.place.begun + 1, 0, phase)

    def left(self, micro_batches: int) -> None:
        """So many micro-batches of the phase are left."""
        self.place = self.place._replace(left=-micro_batches)

    def __enter__(self) -> Self:
        if self.limit:
            self._thread = threading.get_ident()
            for work in (self._report, self._judge):
                threading.Thread(target=work, name="hbt_fast.watch", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._left.set()

    def _report(self) -> None:
        """The thread that talks to the store; it stays in a call where that does not answer."""
        store = None
        while not self._left.is_set():
            try:
                store = store or _connect()
                long = self._idle >= self.limit / 2
                mine = Report(self._beat + 1, self.place, self._idle, self._stack() if long else "")
                store.set(str(self.world.rank), json.dumps(mine))
                if long:
                    ranks = [rank for rank in range(self.world.size) if store.check([str(rank)])]
                    self._reports = {rank: _read(store.get(str(rank))) for rank in ranks}
                self._beat += 1
            except RuntimeError:  # the store is gone: as good as no answer
                store = None
            self._left.wait(self.interval)

    def _judge(self) -> None:
        """The thread that counts how long nothing has happened."""
        before, beats, quiet, now = None, dict.fromkeys(range(-1, self.world.size), (0, 0.0)), set(), time.monotonic()
        while not self._left.wait(self.interval):
            passed, now = min(time.monotonic() - now, 2 * self.interval), time.monotonic()
            self._idle = self._idle + passed if self.place is before else 0.0
            before, reports = self.place, self._reports
            for rank, (beat, seconds) in beats.items():  # -1: the store
                new = self._beat if rank < 0 else reports[rank].beat if rank in reports else 0
                suspected = rank < 0 or self._idle >= self.limit / 2
                beats[rank] = new, seconds + passed if new == beat and suspected else 0.0
            quiet = {rank for rank, (_, seconds) in beats.items() if seconds >= self.limit / 2}
            if self._idle >= self.limit and before.phase not in NOT_WATCHED:
                here = {**reports, self.world.rank: Report(self._beat, before, self._idle, self._stack())}
                if said := verdict(here, quiet, self.world.rank, self.world.size, self.limit):
                    self._end(said)

    def _end(self, said: str) -> None:
        sys.stdout.flush()
        advice = f"train.resume=true goes on (train.hang_minutes is {self.minutes:g})"
        print(f"hbt_fast.train: {said}\n{advice}", file=sys.stderr, flush=True)
        time.sleep(3 * self.interval)  # other ranks come to the same verdict before this one's end disturbs them
        os._exit(1)  # the training thread is in a collective and cannot be reached

    def _stack(self) -> str:
        frame = sys._current_frames().get(self._thread)
        return "".join(traceback.format_stack(frame)[-8:]) if frame else ""


def verdict(reports: dict[int, Report], quiet: set[int], rank: int, size: int, limit: float) -> str | None:
    """Which rank hangs, in words; None: it is not certain yet that one does.

    Args:
        reports: by rank; the newest that are known.
        quiet: ranks that have reported nothing new for long; -1 among them: the store does not answer.
        rank: that asks, which has not moved for `limit` seconds.
        size: number of ranks.
        limit: in seconds.
    """
    mine = reports[rank]
    if -1 in quiet:
        return (
            f"rank {rank} has been in {mine.place} for {mine.idle / 60:.3g} minutes, and the process that the ranks "
            "report to does not answer: rank 0, or the launcher on its machine, is stopped, or the network is gone"
        )
    talking = {other: report for other, report in reports.items() if other not in quiet}
    if any(report.idle < limit or report.place.phase in NOT_WATCHED for report in talking.values()):
        return None
    if len(talking) + len(quiet) < size:
        return None
    if quiet:
        last = [f"rank {r} was in {reports[r].place} when it last reported" for r in sorted(quiet) if r in reports]
        return (
            f"{_ranks(quiet, 'hang')}: nothing has been heard from there for {limit / 120:.3g} minutes or longer (the "
            f"process is stopped, or its machine or network is gone; {'; '.join(last)}); "
            f"{_ranks(set(talking), 'wait')} in {mine.place}"
        )
    least = min(report.place[:3] for report in talking.values())
    behind = {other for other, report in talking.items() if report.place[:3] == least}
    if len(behind) == size:
        return (
            f"all ranks have been in {mine.place} for {mine.idle / 60:.3g} minutes: a collective does not come back "
            f"(the network?). Rank {rank} is here:\n{mine.stack}"
        )
    first = min(behind)
    report = reports[first]
    waiting = set(talking) - behind
    return (
        f"{_ranks(behind, 'hang')} in {report.place} for {report.idle / 60:.3g} minutes; {_ranks(waiting, 'wait')} in "
        f"{reports[min(waiting)].place}. Rank {first} is here:\n{report.stack}"
    )


def _ranks(numbers: set[int], verb: str) -> str:
    one = len(numbers) == 1
    return f"rank{'' if one else 's'} {', '.join(map(str, sorted(numbers)))} {verb}{'s' if one else ''}"


def _connect() -> dist.Store:
    """A connection of its own to the store through which the ranks found each other."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=60))
    return dist.PrefixStore("hbt_fast.watch", store)


def _read(raw: bytes) -> Report:
    beat, place, idle, stack = json.loads(raw)
    return Report(beat, Place(*place), idle, stack)
