"""Where a step's time goes: data, embed, loss, re-embed, optimizer."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from hbt_fast.engine.watch import Watch


class Phases:
    """A clock for the phases of one step; on a GPU it times what runs there, without waiting for it.

    Args:
        device: where the work is done.
        watch: told what begins.
    """

    def __init__(self, device: torch.device, watch: Watch | None = None) -> None:
        self.device, self.watch, self.marks = device, watch, []

    def begin(self, name: str) -> None:
        """The phase before ends, this one begins."""
        self.marks.append((name, self._now()))
        if self.watch and name:
            self.watch.begin(name)

    def left(self, micro_batches: int) -> None:
        """So many micro-batches of the phase are left."""
        if self.watch:
            self.watch.left(micro_batches)

    def end(self) -> dict[str, float]:
        """The last phase ends: seconds by name."""
        self.begin("")
        if self.device.type == "cuda":
            self.marks[-1][1].synchronize()
        seconds: dict[str, float] = {}
        for (name, began), (_, ended) in zip(self.marks, self.marks[1:], strict=False):
            took = began.elapsed_time(ended) / 1000 if self.device.type == "cuda" else ended - began
            seconds[name] = seconds.get(name, 0.0) + took
        return seconds

    def _now(self) -> float | torch.cuda.Event:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
