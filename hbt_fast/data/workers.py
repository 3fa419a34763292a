"""Processes that tokenise: chunks go out to them and come back in order."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from hbt_fast.data import tokenise
from hbt_fast.data.rows import DataError
from hbt_fast.data.tokenise import PlainRow

ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


class Workers:
    """Worker processes, each fed by a thread of this one; see `hbt_fast.data.tokenise` for what they are.

    They hold no files of the store and end with this process, however it ends: their input is closed.

    Args:
        count: number of processes.
        setup: the arguments of ChunkEncoder.
    """

    def __init__(self, count: int, setup: tuple) -> None:
        command = [sys.executable, "-P", str(Path(tokenise.__file__))]  # -P: its folder stays off sys.path
        environment = {**os.environ, **ONE_THREAD, "TOKENIZERS_PARALLELISM": "false"}
        self.setup, self.free = tokenise.line_of(setup), SimpleQueue()  # free: not waiting for a result
        self.processes = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
            for _ in range(count)
        ]
        self.fresh = set(self.processes)
        for process in self.processes:
            self.free.put(process)

    def map(self, chunks: Iterable[list[PlainRow]]) -> Iterator[dict[str, Any]]:
        """The arrays of the chunks, in order; at most two chunks per process are under way.

        Raises:
            RowError: of the first chunk that has one.
            DataError: a process died.
        """
        count = len(self.processes)
        under_way: deque[Future] = deque()
        threads = ThreadPoolExecutor(count)
        try:
            for chunk in chunks:
                under_way.append(threads.submit(self._encode, chunk))
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

    def _encode(self, chunk: list[PlainRow]) -> dict[str, Any]:
        """Send a chunk to a free process and wait for what it makes of it."""
        process = self.free.get()
        try:
            if process in self.fresh:
                self.fresh.remove(process)
                process.stdin.write(self.setup)
            process.stdin.write(tokenise.line_of(chunk))
            process.stdin.flush()
            return tokenise.receive(process.stdout)
        except (OSError, EOFError):
            raise DataError(
                f"a tokenising process ended with status {process.wait()} (-9: killed, perhaps for memory); "
                "prepare the data again, it goes on where it stopped"
            ) from None
        finally:
            self.free.put(process)
