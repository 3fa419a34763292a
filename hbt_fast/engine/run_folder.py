"""The folder of a run: one process at a time writes to it, and a folder that holds something else is left alone."""

from __future__ import annotations

import fcntl
import json
import os
import re
import socket
from itertools import count
from pathlib import Path

from hbt_fast.base.files import writing
from hbt_fast.engine.backends import SettingError

MARKS = re.compile(r"metrics\.jsonl|evaluation-before\.json|checkpoint-\d+")  # what no folder but a run's holds
ELSEWHERE = "write another train.run_dir"


class RunFolder:
    """Holds a run folder for this process, until `release`.

    The lock is a file beside the folder, .NAME.lock: a folder that is moved or removed while its run goes on would take
    a lock inside along, and that run would write into the folder of the next one.

    Args:
        path: train.run_dir.
        resume: whether the run that is in it goes on.

    Raises:
        SettingError: another process trains in it, or it holds something that is no run. Nothing was touched.
        FileError: it cannot be written to.
    """

    def __init__(self, path: Path, resume: bool) -> None:
        self.path, self.resume = path, resume
        self._check()
        with writing(path, ELSEWHERE):
            path.absolute().parent.mkdir(parents=True, exist_ok=True)
            self.lock_path = path.absolute().parent / f".{path.absolute().name}.lock"
            self._lock = self._locked()

    def _check(self) -> None:
        path = self.path
        if not path.exists():
            return
        if not path.is_dir():
            raise SettingError(f"train.run_dir is {path}, which is a file; {ELSEWHERE}")
        here = Path.cwd()
        if path.resolve() in (here, *here.parents):
            raise SettingError(f"train.run_dir is {path}, which this program runs in; name a folder below it")
        names = sorted(found.name for found in path.iterdir())
        if names and not any(MARKS.fullmatch(name) for name in names):
            shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            raise SettingError(
                f"train.run_dir is {path}, which holds {shown} and is no folder of a run; {ELSEWHERE}, or empty it"
            )

    def _locked(self) -> int:
        while True:
            handle = os.open(self.lock_path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.stat(self.lock_path), os.fstat(handle)):
                    break
            except FileNotFoundError:  # who had it has just removed it
                pass
            except BlockingIOError:
                who = _described(os.read(handle, 1000))
                os.close(handle)
                raise SettingError(
                    f"train.run_dir is {self.path}, in which {who} trains now; wait for it, or {ELSEWHERE}"
                ) from None
            os.close(handle)
        os.ftruncate(handle, 0)
        os.write(handle, json.dumps({"process": os.getpid(), "machine": socket.gethostname()}).encode())
        return handle

    def take(self) -> Path | None:
        """Make the folder; an earlier run in it is moved aside unless it goes on.

        Returns:
            where the earlier run is now; None: there was none, or it goes on.

        Raises:
            FileError: the folder cannot be written to.
        """
        aside = None
        with writing(self.path, ELSEWHERE):
            if not self.resume and self.path.is_dir() and any(self.path.iterdir()):
                places = (self.path.with_name(f"{self.path.name}-{n}") for n in count(1))
                aside = next(place for place in places if not place.exists())
                self.path.rename(aside)
            self.path.mkdir(parents=True, exist_ok=True)
        return aside

    def release(self) -> None:
        """Let other processes have the folder."""
        self.lock_path.unlink(missing_ok=True)
        os.close(self._lock)


def _described(content: bytes) -> str:
    try:
        found = json.loads(content)
        return f"process {found['process']} on {found['machine']}"
    except (ValueError, KeyError, TypeError):  # it is just being written
        return "another process"
