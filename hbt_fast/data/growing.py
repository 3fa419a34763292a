"""Arrays that grow on disk: appended to, cut back to an earlier length after a crash, closed as .npy files.

What all rows have alike is not written: a span or periodic array stays a few numbers in memory until the first row
that differs (see `hbt_fast.data.store` for what these are).
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from hbt_fast.data.rows import DataError

HEADER = 128  # bytes of a .npy header, whatever the length
BLOCK = 1 << 20  # elements written or read at a time


class GrowingArray:
    """An array of one or two dimensions in a .npy file. The header is written last: before, it is not readable as .npy.

    Args:
        path: of the file; what is there is kept until `restore`.
        dtype: of the elements.
        width: of the rows, if there are two dimensions.
    """

    def __init__(self, path: Path, dtype: np.dtype | type, width: int | None = None) -> None:
        self.path, self.dtype, self.width = path, np.dtype(dtype), width
        self.length, self.sum = 0, xxhash.xxh3_64()
        self.file = open(path, "r+b" if path.exists() else "w+b")  # noqa: SIM115 - closed by close
        self.file.seek(0)
        self.file.write(bytes(HEADER))

    def append(self, values: np.ndarray) -> None:
        """Write values at the end."""
        values = np.ascontiguousarray(values, self.dtype).reshape(-1)
        if len(values):
            raw = values.view(np.uint8).data
            self.file.write(raw)
            self.sum.update(raw)
            self.length += len(values)

    def state(self) -> dict[str, Any]:
        """What `restore` needs, as JSON; call `sync` first."""
        return {"length": self.length, "xxh3_64": self.sum.hexdigest()}

    def restore(self, state: dict[str, Any] | None) -> None:
        """Go back to an earlier state (None: empty).

        Raises:
            DataError: the file is not what was written.
        """
        state = state or {"length": 0, "xxh3_64": xxhash.xxh3_64_hexdigest(b"")}
        self.file.seek(HEADER)
        left = state["length"] * self.dtype.itemsize
        self.sum = xxhash.xxh3_64()
        while left and (raw := self.file.read(min(left, 8 * BLOCK))):
            self.sum.update(raw)
            left -= len(raw)
        if left or self.sum.hexdigest() != state["xxh3_64"]:
            raise DataError(f"{self.path}: damaged since an interrupted run wrote it; delete {self.path.parent}")
        self.length = state["length"]
        self.file.truncate(self.file.seek(HEADER + self.length * self.dtype.itemsize))

    def sync(self) -> None:
        """Have the disk keep what was appended."""
        self.file.flush()
        os.fsync(self.file.fileno())

    def finish(self) -> dict[str, Any]:
        """Write the header; returns the state."""
        shape = (self.length,) if self.width is None else (self.length // self.width, self.width)
        words = f"{{'descr': {self.dtype.str!r}, 'fortran_order': False, 'shape': {shape}, }}"
        self.file.seek(0)
        self.file.write(b"\x93NUMPY\x01\x00" + (HEADER - 10).to_bytes(2, "little"))
        self.file.write(words.ljust(HEADER - 11).encode() + b"\n")
        self.sync()
        return self.state()

    def close(self) -> None:
        """Let go of the file."""
        with suppress(OSError):  # what a full disk did not take; it was said when it was to be synced
            self.file.close()


class GrowingSpans:
    """The offsets of a span array; one number as long as all rows have the same count."""

    def __init__(self, path: Path, dtype: type) -> None:
        self.array = GrowingArray(path, dtype)
        self.rows = self.each = self.total = 0

    def append(self, counts: np.ndarray) -> None:
        """Add rows by their counts: (rows,) int64."""
        if not len(counts):
            return
        if self.rows == 0:
            self.each = int(counts[0])
        if not self.array.length and (counts != self.each).any():
            for start in range(0, self.rows + 1, BLOCK):
                self.array.append(np.arange(start, min(start + BLOCK, self.rows + 1)) * self.each)
        if self.array.length:
            self.array.append(self.total + counts.cumsum())
        self.rows += len(counts)
        self.total += int(counts.sum())

    def state(self) -> dict[str, Any]:
        """As of GrowingArray."""
        return {"array": self.array.state(), "rows": self.rows, "each": self.each, "total": self.total}

    def restore(self, state: dict[str, Any] | None) -> None:
        """As of GrowingArray."""
        state = state or {"array": None, "rows": 0, "each": 0, "total": 0}
        self.array.restore(state["array"])
        self.rows, self.each, self.total = state["rows"], state["each"], state["total"]

    def sync(self) -> None:
        """As of GrowingArray."""
        self.array.sync()

    def finish(self) -> dict[str, Any]:
        """As of GrowingArray."""
        if not self.array.length:
            self.array.append(np.array([self.each]))
        return self.array.finish()

    def close(self) -> None:
        """As of GrowingArray."""
        self.array.close()


def _equal(some: np.ndarray, others: np.ndarray) -> bool:
    """Whether values are the same ones, NaN included."""
    return bool(((some == others) | ((some != some) & (others != others))).all())


class GrowingPeriodic:
    """A periodic array; one period as long as the values repeat: those of the first row, or one number if all equal."""

    def __init__(self, path: Path, dtype: type) -> None:
        self.array, self.length, self.period = GrowingArray(path, dtype), 0, np.empty(0, dtype)

    def append(self, values: np.ndarray, first: int) -> None:
        """Add values; `first` is how many of them belong to the first row that is added."""
        if not len(values):
            return
        if self.length == 0:
            self.period = values[:1] if _equal(values[:first], values[:1]) else values[:first]
        if not self.array.length and not _equal(self._repeated(self.length, len(values)), values):
            for start in range(0, self.length, BLOCK):
                self.array.append(self._repeated(start, min(BLOCK, self.length - start)))
            self.array.append(values)
        elif self.array.length:
            self.array.append(values)
        self.length += len(values)

    def _repeated(self, start: int, count: int) -> np.ndarray:
        return self.period[np.arange(start, start + count) % len(self.period)]

    def state(self) -> dict[str, Any]:
        """As of GrowingArray."""
        return {"array": self.array.state(), "length": self.length, "period": self.period.tolist()}

    def restore(self, state: dict[str, Any] | None) -> None:
        """As of GrowingArray."""
        state = state or {"array": None, "length": 0, "period": []}
        self.array.restore(state["array"])
        self.length, self.period = state["length"], np.array(state["period"], self.array.dtype)

    def sync(self) -> None:
        """As of GrowingArray."""
        self.array.sync()

    def finish(self) -> dict[str, Any]:
        """As of GrowingArray."""
        if not self.array.length:
            self.array.append(self.period)
        return self.array.finish()

    def close(self) -> None:
        """As of GrowingArray."""
        self.array.close()
