"""Every measure of every query: what tests of significance between runs need, in one .npz file without pickle."""

from __future__ import annotations

import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

LOWER_IS_BETTER = frozenset({"rank_distance"})
_NAMES = ("task", "ids", "languages")


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
        """
        path = Path(path)
        if path.suffix != ".npz":
            raise ValueError(f"{path}: the name must end in .npz")
        # dtype=str: without it an empty list would become floats, and anything else than text an object
        fixed = {"task": np.array(self.task, str), "ids": np.array(self.ids, str)}
        np.savez_compressed(path, **fixed, languages=np.array(self.languages, str), **self.measures)
        return path

    @classmethod
    def read(cls, path: str | Path) -> PerQuery:
        """What `write` wrote.

        Args:
            path: of the file.

        Raises:
            ValueError: it is something else; the message names it and says why.
            OSError: it is not there, or cannot be read.
        """
        no = f"{path}: not a .queries.npz file of hbt_fast.evaluate"
        with open(path, "rb") as file:
            if not zipfile.is_zipfile(file):
                raise ValueError(f"{no} (it is no .npz file)")
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
        except (ValueError, zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise ValueError(f"{no} ({error})") from error
        missing = [name for name in _NAMES if name not in arrays or arrays[name].dtype.kind != "U"]
        if missing:
            raise ValueError(f"{no} (it has no text array {missing[0]!r})")
        task, ids, languages = (arrays.pop(name).tolist() for name in _NAMES)
        try:
            return cls(task, ids, languages, arrays)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: {error}") from error
