"""Where a step's time goes: data, embed, loss, re-embed, optimizer."""

from __future__ import annotations

import time

import torch


class Phases:
    """A clock for the phases of one step; on a GPU it times what runs there, without waiting for it.

    Args:
        device: where the work is done.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.marks = device, []

    def begin(self, name: str) -> None:
        """The phase before ends, this one begins."""
        self.marks.append((name, self._now()))

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
