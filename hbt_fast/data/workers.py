"""Processes that tokenise or encode: chunks go out to them and what they made of these comes back in order."""

from __future__ import annotations

import os
import subprocess
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from queue import SimpleQueue
from typing import Any

from hbt_fast.data.rows import DataError
from hbt_fast.data.tokenise import line_of, receive

Start = tuple[Sequence[str], dict[str, str]]  # a process: its command, and what it has in its environment besides


class Workers:
    """Processes that read lines of JSON and answer each by arrays; every one is fed by a thread of this process.

    They end with this process, however it ends: their input is closed.

    Args:
        starts: of each process.
        setup: the line that each gets first.
        died: what to say if one ends by itself; its {status} is filled in.
    """

    def __init__(self, starts: Sequence[Start], setup: object, died: str) -> None:
        self.setup, self.died, self.free = line_of(setup), died, SimpleQueue()  # free: not waiting for a result
        self.processes = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ | environment)
            for command, environment in starts
        ]
        self.fresh = set(self.processes)
        for process in self.processes:
            self.free.put(process)

    def map(self, chunks: Iterable[object]) -> Iterator[dict[str, Any]]:
        """What `hbt_fast.data.tokenise.send` sent for each chunk, in order; two chunks per process are under way.

        Raises:
            RowError: the first that was sent.
            DataError: a process died.
        """
        count = len(self.processes)
        under_way: deque[Future] = deque()
        threads = ThreadPoolExecutor(count)
        try:
            for chunk in chunks:
                under_way.append(threads.submit(self._answer, chunk))
                if len(under_way) == 2 * count:
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
        finally:
            for process in self.processes:
                process.kill()  # unblocks the threads, if an error ended this early
            threads.shutdown(cancel_futures=True)
            for process in self.processes:
                with suppress(OSError), process:  # closes its pipes
                    pass

    def _answer(self, chunk: object) -> dict[str, Any]:
        """Send a chunk to a free process and wait for what it makes of it."""
        process = self.free.get()
        try:
            if process in self.fresh:
                self.fresh.remove(process)
                process.stdin.write(self.setup)
            process.stdin.write(line_of(chunk))
            process.stdin.flush()
            return receive(process.stdout)
        except (OSError, EOFError):
            raise DataError(self.died.format(status=process.wait())) from None
        finally:
            self.free.put(process)
