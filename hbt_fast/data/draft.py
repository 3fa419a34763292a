"""A source that is being built: its arrays as they grow, and the journal that says how far they are on disk."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from hbt_fast.base.files import sync, write_whole, writing
from hbt_fast.data.contents import label_contents
from hbt_fast.data.growing import HEADER, GrowingArray, GrowingPeriodic, GrowingSpans
from hbt_fast.data.questions import list_answers
from hbt_fast.data.store import ARRAYS, FORMAT, Role, checksum

SPANS = ("field_offsets", "negative_offsets")
PERIODIC = ("field_languages", "field_mono", "row_scores", "negative_scores")
KEYS = {  # what label_contents and list_answers take; no part of the store
    "keys": np.uint64, "key_nodes": np.int64, "question_keys": np.uint64, "question_rows": np.int64,
}  # fmt: skip
HELPERS = {**KEYS, "refused": np.uint8}  # and a line of JSON for each row that was left out: number, languages, why
INSTEAD = "make room and start again, it goes on where it stopped; or set data.store_dir to another place"


class Draft:
    """The growing arrays in a folder; what an interrupted run left there is taken up.

    Args:
        folder: where they are.
        identity: names what goes in; a draft of another identity is begun anew.

    Attributes:
        rows: how many are in.
        taken: how many were taken from the source: these, and those that were left out.
        tail: the mark of the last that was taken.
        complete: whether they are all.
        tally: of a complete one: what its reader counted, as JSON.

    Raises:
        FileError: the folder cannot be written; of the methods too.
    """

    def __init__(self, folder: Path, identity: str) -> None:
        self.folder, self.identity = folder, identity
        self.arrays: dict[str, GrowingArray | GrowingSpans | GrowingPeriodic] = {}
        with writing(folder, INSTEAD):
            self._open()

    def _open(self) -> None:
        for name, dtype in {**ARRAYS, **HELPERS}.items():
            kind = GrowingSpans if name in SPANS else GrowingPeriodic if name in PERIODIC else GrowingArray
            self.arrays[name] = kind(self.folder / f"{name}.npy", dtype)
        self.journal = open(self.folder / "journal.jsonl", "a+b")  # noqa: SIM115 - closed by close
        last = self._last_line()
        self.rows, self.taken, self.tail = last.get("rows", 0), last.get("taken", 0), last.get("tail", "")
        self.complete, self.tally = last.get("complete", False), last.get("tally", {})
        self.languages: dict[str, int] = {code: n for n, code in enumerate(last.get("languages", ()))}
        self.counts = {what: np.array(found, np.int64) for what, found in last.get("counts", {}).items()}
        for name, array in self.arrays.items():
            array.restore(last.get("arrays", {}).get(name))
        if not last:
            for name in ("token_offsets", "character_offsets"):
                self.arrays[name].append(np.zeros(1, np.int64))

    def _last_line(self) -> dict[str, Any]:
        """The journal's last whole line, if it is of this identity; what follows it is cut off."""
        self.journal.seek(0)
        last, end = {}, 0
        for line in self.journal:
            try:
                found = json.loads(line) if line.endswith(b"\n") else {}
            except ValueError:  # torn, and so is all that follows
                break
            if not isinstance(found, dict) or found.get("identity") != self.identity:
                break
            last, end = found, end + len(line)
        self.journal.truncate(end)
        return last

    def add(self, chunk: dict[str, Any]) -> None:
        """Append the arrays that ChunkEncoder made of a chunk of rows."""
        with writing(self.folder, INSTEAD):
            for number, languages, why in chunk["refused"]:
                line = json.dumps([self.taken + number, languages, why]).encode() + b"\n"
                self.arrays["refused"].append(np.frombuffer(line, np.uint8))
            if "tokens" in chunk:
                self._append(chunk)
        self.taken, self.tail = self.taken + chunk["taken"], chunk["tail"]

    def _append(self, chunk: dict[str, Any]) -> None:
        arrays = self.arrays
        numbers = np.array([self.languages.setdefault(c, len(self.languages)) for c in chunk["languages"]], np.int32)
        texts, negatives = arrays["token_hashes"].length, arrays["negative_texts"].length
        of_first = int(chunk["field_counts"][0])
        for kind in ("token", "character"):
            before = arrays[f"{kind}s"].length
            arrays[f"{kind}_offsets"].append(before + chunk[f"{kind}_counts"].cumsum())
            arrays[f"{kind}s"].append(chunk[f"{kind}s"])
        arrays["token_hashes"].append(chunk["token_hashes"])
        arrays["field_offsets"].append(chunk["field_counts"])
        arrays["field_languages"].append(numbers[chunk["field_languages"]], of_first)
        arrays["field_mono"].append(chunk["field_mono"], of_first)
        arrays["negative_offsets"].append(chunk["negative_counts"])
        arrays["negative_languages"].append(numbers[chunk["negative_languages"]])
        for name in ("field_queries", "field_passages", "negative_texts"):
            arrays[name].append(np.where(chunk[name] < 0, -1, texts + chunk[name]))
        arrays["row_scores"].append(chunk["row_scores"], 1)
        arrays["negative_scores"].append(chunk["negative_scores"], 1)
        arrays["question_keys"].append(chunk["question_keys"])
        arrays["question_rows"].append(self.rows + chunk["question_key_rows"])
        arrays["keys"].append(chunk["keys"])
        arrays["key_nodes"].append(self.rows + chunk["key_rows"])
        arrays["keys"].append(chunk["negative_keys"])
        arrays["key_nodes"].append(-1 - negatives - np.arange(len(chunk["negative_keys"])))
        for what, found in _counts(chunk, numbers, len(self.languages)).items():
            before = self.counts.get(what, np.zeros(0, np.int64))
            found[: len(before)] += before
            self.counts[what] = found
        self.rows += len(chunk["field_counts"])

    def refused(self) -> list[tuple[int, list[str], str]]:
        """Of the rows that were left out: number among those taken, languages, "where: why"."""
        array = self.arrays["refused"]
        with writing(self.folder, INSTEAD):
            array.sync()
        raw = array.path.read_bytes()[HEADER : HEADER + array.length]
        return [tuple(json.loads(line)) for line in raw.splitlines()]

    def note(self, complete: bool = False, tally: dict[str, Any] | None = None) -> None:
        """Sync everything and write a line of the journal: from here on a kill loses nothing of what is in.

        Args:
            complete: there are no more rows.
            tally: what the reader of all rows counted, as JSON.
        """
        self.complete, self.tally = complete, tally or {}
        with writing(self.folder, INSTEAD):
            for array in self.arrays.values():
                array.sync()
            sync(self.folder)
            self._note()

    def _note(self) -> None:
        line = {
            "identity": self.identity,
            "rows": self.rows,
            "taken": self.taken,
            "tail": self.tail,
            "complete": self.complete,
            "tally": self.tally,
            "languages": list(self.languages),
            "counts": {what: found.tolist() for what, found in self.counts.items()},
            "arrays": {name: array.state() for name, array in self.arrays.items()},
        }
        self.journal.write(json.dumps(line).encode() + b"\n")
        self.journal.flush()
        os.fsync(self.journal.fileno())

    def finish(self, name: str, roles: tuple[Role, Role]) -> None:
        """Number the contents, write the .npy headers and source.json: after it the store is whole."""
        with writing(self.folder, INSTEAD):
            self._finish(name, roles)

    def _finish(self, name: str, roles: tuple[Role, Role]) -> None:
        for key in KEYS:
            self.arrays[key].finish()
        keys, nodes, question_keys, question_rows = (self._read(key) for key in KEYS)
        contents = label_contents(
            keys,
            nodes,
            self.rows,
            self.arrays["negative_texts"].length,
            self.folder / "contents",
            self.arrays["row_contents"].append,
            self.arrays["negative_contents"].append,
        )
        if contents < self.rows:
            self.arrays["row_contents"].finish()
            row_contents = self._read("row_contents")
        else:
            row_contents = np.empty(0, np.int64)
        list_answers(
            question_keys,
            question_rows,
            row_contents,
            self.rows,
            self.folder / "questions",
            *(self.arrays[name].append for name in ("row_answers", "answers")),
        )
        meta = {
            "format": FORMAT,
            "name": name,
            "roles": [[role.prompt, role.max_length] for role in roles],
            "languages": list(self.languages),
            "rows": self.rows,
            "contents": contents,
            "counts": {what: found.tolist() for what, found in self.counts.items()},
            "refused": [number for number, _, _ in self.refused()],
            "tally": self.tally,
            "arrays": {array: self.arrays[array].finish() for array in ARRAYS},
        }
        write_whole(self.folder / "source.json", json.dumps({**meta, "xxh3_64": checksum(meta)}, indent=1))

    def _read(self, name: str) -> np.ndarray:
        return np.load(self.folder / f"{name}.npy", mmap_mode="r")

    def close(self) -> None:
        """Let go of the files."""
        for array in self.arrays.values():
            array.close()
        with suppress(OSError):  # of a full disk
            self.journal.close()


def _counts(chunk: dict[str, Any], numbers: np.ndarray, languages: int) -> dict[str, np.ndarray]:
    """In how many rows of a chunk something is there; see SourceStore.counts."""
    field_languages, mono = numbers[chunk["field_languages"]], chunk["field_mono"]
    there = {"queries": chunk["field_queries"] >= 0, "passages": chunk["field_passages"] >= 0, "mono": mono}
    starts = chunk["field_counts"].cumsum() - chunk["field_counts"]
    return {what: np.bincount(field_languages[mask], minlength=languages) for what, mask in there.items()} | {
        "cross": np.array([(chunk["field_counts"] > 1).sum()]),
        "any_mono": np.array([np.logical_or.reduceat(mono, starts).sum()]),
    }
