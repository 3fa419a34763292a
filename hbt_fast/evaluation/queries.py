"""Every measure of every query: what tests of significance between runs need, in one .npz file without pickle."""

from __future__ import annotations

import math
import zipfile
from dataclasses import dataclass
from pathlib import Path
from tokenize import TokenError
from typing import BinaryIO

import numpy as np

from hbt_fast.base.files import replacing
from hbt_fast.data.reading import BROKEN
from hbt_fast.data.rows import DataError

LOWER_IS_BETTER = frozenset({"rank_distance"})
_NAMES = ("task", "ids", "languages")
# what its reader of .npy headers raises besides
OF_NUMPY = (SyntaxError, TokenError, TypeError, AttributeError, ArithmeticError, MemoryError)


@dataclass(frozen=True, eq=False)
class PerQuery:
    """One value per query and measure.

    Args:
        task: name of the task.
        ids: N ids; with the language, an id names a query. Parallel questions share one.
        languages: N codes of the queries; of bitext, "source>target".
        measures: by name, (N,) float64; NaN where a query does not have it.

    Raises:
        ValueError: lengths that differ, or a measure with the name of another field.
    """

    task: str
    ids: list[str]
    languages: list[str]
    measures: dict[str, np.ndarray]

    def __post_init__(self) -> None:
        shape = (len(self.ids),)
        if len(self.languages) != len(self.ids):
            raise ValueError(
                f"{len(self.ids)} ids but {len(self.languages)} languages; one of each per query is needed"
            )
        for name, values in self.measures.items():
            if name in _NAMES:
                raise ValueError(f"a measure cannot be called {name!r}: the file has a field of that name")
            if values.dtype != np.float64 or values.shape != shape:
                raise ValueError(
                    f"measure {name!r} is {values.dtype} {values.shape}; it must be float64 {shape}, one per query"
                )

    def write(self, path: str | Path) -> Path:
        """Write all as arrays of one .npz file; returns its path.

        Args:
            path: its name ends in .npz.

        Raises:
            ValueError: it does not.
            FileError: it cannot be written.
        """
        path = Path(path)
        if path.suffix != ".npz":
            raise ValueError(f"{path}: the name must end in .npz")
        # dtype=str: without it an empty list would become floats, and anything else than text an object
        fixed = {"task": np.array(self.task, str), "ids": np.array(self.ids, str)}
        with replacing(path) as begun, open(begun, "wb") as file:
            np.savez_compressed(file, **fixed, languages=np.array(self.languages, str), **self.measures)
        return path

    @classmethod
    def read(cls, path: str | Path) -> PerQuery:
        """What `write` wrote.

        Args:
            path: of the file.

        Raises:
            DataError: it is something else; the message names it and says why.
            OSError: it is not there, or cannot be read.
        """
        no = f"{path}: not a .queries.npz file of hbt_fast.evaluate"
        with open(path, "rb") as file:
            if not zipfile.is_zipfile(file):
                raise DataError(f"{no} (it is no .npz file)")
            file.seek(0)
            try:
                arrays = _arrays(file)
            except (*BROKEN, *OF_NUMPY) as error:
                raise DataError(f"{no} ({error})") from error
        for name, dimensions in (("task", 0), ("ids", 1), ("languages", 1)):
            found = arrays.get(name)
            if found is None or found.dtype.kind != "U" or found.ndim != dimensions:
                raise DataError(f"{no} (it has no text array {name!r})")
        task, ids, languages = (arrays.pop(name).tolist() for name in _NAMES)
        try:
            return cls(task, ids, languages, arrays)
        except (ValueError, TypeError) as error:
            raise DataError(f"{path}: {error}") from error


def _arrays(file: BinaryIO) -> dict[str, np.ndarray]:
    """The arrays of a .npz file; none may be larger than what the archive says that it holds."""
    with zipfile.ZipFile(file) as archive:
        for member in archive.infolist():
            with archive.open(member) as raw:
                version = np.lib.format.read_magic(raw)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, _, dtype = read(raw)
            if math.prod(shape) * dtype.itemsize > member.file_size:  # memory is taken before the file is read
                raise ValueError(f"{member.filename} is cut short")
    file.seek(0)
    with np.load(file, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}
