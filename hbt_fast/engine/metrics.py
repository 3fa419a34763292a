"""metrics.jsonl: what a run says of its steps and evaluations, one JSON object a line.

    {"step": 3, "kind": "mono", "loss": 1.2, ...}        a step with an update
    {"step": 4, "kind": "mono", "skipped": "..."}        a step without
    {"drawn_until": 10, "pairs": {...}, ...}             what was drawn in the first 10 steps
    {"evaluation": "during training", "step": 10, ...}   an evaluation of the weights after 10 steps
    {"ended_early": "...", "after": 10}                  training ended before its last step

The file is only appended to, and replaced as a whole where a run goes on from an earlier step. A line that cannot be
read, because a crash or the disk cut it, costs that line and no other. Millions of lines are read one at a time.
"""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

BEFORE, DURING, AFTER = "before training", "during training", "after training"  # when an evaluation was made
NUMBERS = ("loss", "accuracy", "seconds", "waited", "tokens", "memory_gib")


def read_records(path: Path) -> Iterator[dict]:
    """The records of a metrics.jsonl that can be read, one at a time; none where there is no such file."""
    if not path.is_file():
        return
    with open(path, "rb") as file:
        for line in file:
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(record, dict):
                yield record


class Steps:
    """The steps with an update, as columns: a million of them take some 50 MB.

    Attributes:
        kinds: the kinds of batches, in the order in which they came.
    """

    def __init__(self) -> None:
        self.kinds: list[str] = []
        self._step, self._kind = array("q"), array("I")
        self._numbers = {name: array("f") for name in NUMBERS}
        self._phases: dict[str, array] = {}

    def __len__(self) -> int:
        return len(self._step)

    def add(self, record: dict) -> None:
        """Append a record; one that lacks what every step has, or holds something else there, is left out."""
        phases = record.get("phases", {})
        try:
            step, kind = int(record["step"]), str(record["kind"])
            numbers = [float(record.get(name, math.nan)) for name in NUMBERS]
            spent = {str(name): float(seconds) for name, seconds in phases.items()}
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
            return
        if kind not in self.kinds:
            self.kinds.append(kind)
        for name in spent.keys() - self._phases.keys():
            self._phases[name] = array("f", bytes(4 * len(self)))
        self._step.append(step)
        self._kind.append(self.kinds.index(kind))
        for column, value in zip(self._numbers.values(), numbers, strict=True):
            column.append(value)
        for name, column in self._phases.items():
            column.append(spent.get(name, 0.0))

    @property
    def step(self) -> np.ndarray:
        """(n,) int64: numbers of the steps, from 0."""
        return np.array(self._step)

    def of_kind(self, kind: str) -> np.ndarray:
        """(n,) bool: which steps had a batch of this kind."""
        return np.array(self._kind) == self.kinds.index(kind)

    def __getitem__(self, name: str) -> np.ndarray:
        """(n,) float32: one of NUMBERS; NaN where a record has none."""
        return np.array(self._numbers[name])

    @property
    def phases(self) -> dict[str, np.ndarray]:
        """(n,) float32 seconds of every phase."""
        return {name: np.array(column) for name, column in self._phases.items()}


@dataclass
class Metrics:
    """All that a metrics.jsonl says.

    Attributes:
        steps: with an update.
        skipped: the records of those without.
        evaluations: their records.
        drawn: the last record of what was drawn; None: there is none.
        ended_early: the record that says so; None: there is none.
        done: steps done.
    """

    steps: Steps = field(default_factory=Steps)
    skipped: list[dict] = field(default_factory=list)
    evaluations: list[dict] = field(default_factory=list)
    drawn: dict | None = None
    ended_early: dict | None = None
    done: int = 0


def read_metrics(path: Path) -> Metrics:
    """Read a metrics.jsonl, which need not be there."""
    found = Metrics()
    for record in read_records(path):
        if "evaluation" in record:
            found.evaluations.append(record)
        elif "drawn_until" in record:
            found.drawn = record
        elif "ended_early" in record:
            found.ended_early = found.ended_early or record
        elif isinstance(step := record.get("step"), int):
            if "skipped" in record:
                found.skipped.append(record)
            else:
                found.steps.add(record)
            found.done = max(found.done, step + 1)
    return found
