"""Vectors in a .npy file that an interruption does not lose: an encoding that is started again goes on with them."""

from __future__ import annotations

import fcntl
import json
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from time import monotonic

import numpy as np
import xxhash

from hbt_fast.base.files import sync, write_whole, writing
from hbt_fast.data.growing import GrowingArray
from hbt_fast.encoder.model import EncoderError

SECONDS = 30  # of work that an interruption may cost
INSTEAD = "make room and start again, it goes on where it stopped; or name another place"


class VectorFile:
    """Vectors in a .npy file, which is there when all are. Until then they lie in a folder beside it.

    Args:
        path: of the file; an older one stays until the new one is whole.
        dimensions: of a vector.
        dtype: of the vectors.
        identity: what the vectors depend on.

    Attributes:
        done: texts whose vectors are there, from an interrupted encoding too.

    Raises:
        EncoderError: the folder is of another encoding, or another process works in it.
        DataError: the vectors in it are damaged.
        FileError: it cannot be written; of the methods too.
    """

    def __init__(self, path: Path, dimensions: int, dtype: str, identity: dict[str, str | int]) -> None:
        self.path, self.identity = path, identity
        self.folder = path.with_name(path.name + ".partial")
        self.state = self.folder / "state.json"
        with writing(path, INSTEAD):
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock = open(self.folder / "lock", "a")  # noqa: SIM115 - closed below
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.lock.close()
            raise EncoderError(f"another process is writing {path}") from None
        if not (self.folder / "vectors.npy").exists():  # killed after the vectors went to `path`: begin anew
            self.state.unlink(missing_ok=True)
        try:
            found = json.loads(self.state.read_text(encoding="utf-8")) if self.state.exists() else {}
            if found:
                found["identity"], found["texts"], found["before"], found["array"]
        except (ValueError, LookupError, TypeError):
            self.lock.close()
            raise EncoderError(f"{self.state}: damaged; delete {self.folder} to begin anew") from None
        if found and found["identity"] != identity:
            self.lock.close()
            other = ", ".join(k for k in identity if found["identity"].get(k) != identity[k])
            raise EncoderError(
                f"{self.folder} holds vectors of an interrupted encoding that differs in {other}; delete it, or write "
                "to another file"
            )
        self.done, self.before, self.noted = found.get("texts", 0), found.get("before", ""), monotonic()
        with writing(path, INSTEAD):
            self.array = GrowingArray(self.folder / "vectors.npy", dtype, dimensions)
            self.array.restore(found.get("array"))
        self.under_way: deque[str] = deque()

    def left(self, pieces: Iterator[list[str]]) -> Iterator[list[str]]:
        """The pieces that are not done; those that are must be the texts that they were."""
        passed, chain = 0, ""
        while passed < self.done:
            piece = next(pieces, [])
            passed, chain = passed + len(piece), _chained(chain, piece)
            if not piece or (passed >= self.done and (passed, chain) != (self.done, self.before)):
                raise EncoderError(
                    f"the texts are not those of the interrupted encoding in {self.folder}, of which {self.done:,} are "
                    "done; delete it to begin anew"
                )
        for piece in pieces:
            chain = _chained(chain, piece)
            self.under_way.append(chain)
            yield piece

    def append(self, vectors_nd: np.ndarray) -> None:
        """The vectors of the next piece."""
        with writing(self.path, INSTEAD):
            self.array.append(vectors_nd)
            self.done, self.before = self.done + len(vectors_nd), self.under_way.popleft()
            if monotonic() - self.noted > SECONDS:
                self._note()

    def finish(self) -> np.ndarray:
        """The file, mapped into memory."""
        with writing(self.path, INSTEAD):
            self.array.finish()
            self.array.path.rename(self.path)
            self._remove()
            sync(self.path.parent)
        return np.load(self.path, mmap_mode="r" if self.done else None)

    def close(self) -> None:
        """Let go of the file; what was begun can be gone on with."""
        if self.folder.exists() and self.done:
            with suppress(OSError):  # a full disk, for one: the last note holds
                self._note()
        elif self.folder.exists():
            self._remove()
        self.array.close()
        self.lock.close()

    def _note(self) -> None:
        """Write down what is done."""
        self.array.sync()
        note = {"identity": self.identity, "texts": self.done, "before": self.before, "array": self.array.state()}
        write_whole(self.state, json.dumps(note))
        self.noted = monotonic()

    def _remove(self) -> None:
        for path in self.folder.iterdir():  # also what a kill left of a note half written
            path.unlink(missing_ok=True)
        self.folder.rmdir()


def _chained(before: str, piece: list[str]) -> str:
    """A hash of these texts and all before."""
    state = xxhash.xxh3_128(before.encode())
    for text in piece:
        raw = text.encode("utf-8", "surrogatepass")
        state.update(len(raw).to_bytes(8, "little"))
        state.update(raw)
    return state.hexdigest()
