"""SIGTERM and SIGINT: the running step is finished and kept, then the run stops; a second signal stops it at once."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Self

NUMBERS = (signal.SIGTERM, signal.SIGINT)
SAME_SECONDS = 2.0  # launchers pass on to their ranks what the terminal or the cluster sent these already


class StopSignals:
    """While entered, the first SIGTERM or SIGINT is only noted; a further one, 2 seconds on, ends the process at once.

    Outside the main thread, where Python has no signal handlers, it notes nothing.

    Attributes:
        number: the signal that came, or 0.
    """

    def __init__(self) -> None:
        self.number, self._came, self._before = 0, 0.0, {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in NUMBERS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self.number:
            self.number, self._came = number, time.monotonic()
        elif time.monotonic() - self._came >= SAME_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
