"""Building a token store: rows stream in, arrays grow on disk, and what a killed run has written is gone on from.

A source is built in `FOLDER.partial`, which is renamed when whole. Every few seconds all its files are synced and one
line of journal.jsonl says how far they are; a new start cuts the files back to the journal's last line and passes over
the rows that it counts. The result is a function of the rows, the tokenizer and `chunk_rows`: neither interruptions nor
the number of processes change a byte of it.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from hbt_fast.data.contents import label_contents
from hbt_fast.data.growing import GrowingArray, GrowingPeriodic, GrowingSpans
from hbt_fast.data.rows import DataError, Row
from hbt_fast.data.store import ARRAYS, FORMAT, Role, SourceStore
from hbt_fast.data.tokenise import ChunkEncoder, PlainRow, RowError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

JOURNAL_SECONDS = 10.0  # between lines of the journal: the most work that a kill can lose


def build_source(
    folder: str | Path,
    name: str,
    rows: Iterable[Row],
    tokenizer: PreTrainedTokenizerFast,
    query: Role,
    passage: Role,
    *,
    workers: int | None = None,
    progress: bool = True,
    chunk_rows: int = 4096,
    skipped: list[str] | None = None,
) -> SourceStore:
    """Tokenise the rows of one source and write its store; one that is there is opened instead.

    Args:
        folder: where the store goes. Its name must be that of everything that goes in: an interrupted build goes on.
        name: of the source.
        rows: the same ones in the same order each time. They are read once, and held a chunk at a time.
        tokenizer: a fast Hugging Face tokenizer; its special tokens are added.
        query: prompt and length limit of queries.
        passage: of passages.
        workers: processes that tokenise; None takes one per core, 0 works in this process and its threads.
        progress: show a progress bar on stderr.
        chunk_rows: rows tokenised at a time.
        skipped: what the reader of the rows left out, once it is through; written to skipped.txt beside the arrays.

    Raises:
        DataError: no rows, a row without query or passage, a text without any token.
    """
    folder = Path(folder)
    with _alone(folder) as work:
        if work is not None:
            roles = (query.prompt, query.max_length), (passage.prompt, passage.max_length)
            encode = _encoder(tokenizer, roles)
            parts = _Parts(work)
            stream = iter(rows)
            while chunk := [_plain(row) for row in islice(stream, chunk_rows)]:
                try:
                    parts.add(encode(chunk))
                except RowError as error:
                    raise DataError(str(error)) from None
            if not parts.rows:
                raise DataError(f"source {name!r} gave no rows; check its path and data.languages, or remove it")
            if skipped:
                (work / "skipped.txt").write_text("\n".join(skipped) + "\n", encoding="utf-8")
            parts.finish(name)
            work.rename(folder)
    return SourceStore.open(folder)


@contextmanager
def _alone(folder: Path) -> Iterator[Path | None]:
    work = folder.with_name(folder.name + ".partial")
    if (folder / "source.json").is_file():
        yield None
        return
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    yield work


def _plain(row: Row) -> PlainRow:
    return row.queries, row.passages, row.negatives, row.content, row.where


def _encoder(tokenizer: PreTrainedTokenizerFast, roles: tuple[tuple[str, int], ...]) -> ChunkEncoder:
    options = {"split_special_tokens": tokenizer.split_special_tokens, "truncation_side": tokenizer.truncation_side}
    return ChunkEncoder(tokenizer.backend_tokenizer.to_str(), options, roles)


class _Parts:
    """The arrays of a source that is being built."""

    def __init__(self, work: Path) -> None:
        self.work, self.rows, self.languages = work, 0, {}
        self.arrays: dict[str, Any] = {}
        spans = ("token_offsets", "character_offsets", "field_offsets", "negative_offsets")
        for name, dtype in ARRAYS.items():
            path = work / f"{name}.npy"
            if name in ("field_offsets", "negative_offsets"):
                self.arrays[name] = GrowingSpans(path)
            elif name in ("field_languages", "field_mono"):
                self.arrays[name] = GrowingPeriodic(path, dtype)
            else:
                self.arrays[name] = GrowingArray(path, dtype)
        for name in ("token_offsets", "character_offsets"):
            self.arrays[name].append(np.zeros(1, np.int64))
        self.counts: dict[str, np.ndarray] = {}
        self.keys = GrowingArray(work / "keys.npy", np.uint64)
        self.key_nodes = GrowingArray(work / "key_nodes.npy", np.int64)

    def add(self, chunk: dict[str, Any]) -> None:
        arrays = self.arrays
        number = [self.languages.setdefault(code, len(self.languages)) for code in chunk["languages"]]
        numbers = np.array(number, np.int32)
        texts, negatives = arrays["token_hashes"].length, arrays["negative_texts"].length
        first = int(chunk["field_counts"][0])
        for name in ("token", "character"):
            arrays[f"{name}_offsets"].append(arrays[f"{name}s"].length + chunk[f"{name}_counts"].cumsum())
            arrays[f"{name}s"].append(chunk[f"{name}s"])
        arrays["token_hashes"].append(chunk["token_hashes"])
        arrays["field_offsets"].append(chunk["field_counts"])
        arrays["negative_offsets"].append(chunk["negative_counts"])
        arrays["field_languages"].append(numbers[chunk["field_languages"]], first)
        arrays["field_mono"].append(chunk["field_mono"], first)
        arrays["negative_languages"].append(numbers[chunk["negative_languages"]])
        for name in ("field_queries", "field_passages", "negative_texts"):
            arrays[name].append(np.where(chunk[name] < 0, -1, chunk[name] + texts))
        for what, found in _counts(chunk, numbers, len(self.languages)).items():
            found[: len(self.counts.get(what, ()))] += self.counts.get(what, 0)
            self.counts[what] = found
        self.keys.append(chunk["keys"])
        self.key_nodes.append(chunk["key_rows"] + self.rows)
        self.keys.append(chunk["negative_keys"])
        self.key_nodes.append(-1 - negatives - np.arange(len(chunk["negative_keys"])))
        self.rows += len(chunk["field_counts"])

    def finish(self, name: str) -> None:
        arrays = self.arrays
        self.keys.finish()
        self.key_nodes.finish()
        keys, nodes = (np.load(self.work / f"{n}.npy", mmap_mode="r") for n in ("keys", "key_nodes"))
        contents = label_contents(
            keys,
            nodes,
            self.rows,
            arrays["negative_texts"].length,
            self.work / "contents",
            arrays["row_contents"].append,
            arrays["negative_contents"].append,
        )
        meta = {
            "format": FORMAT,
            "name": name,
            "languages": list(self.languages),
            "rows": self.rows,
            "contents": contents,
            "counts": {what: found.tolist() for what, found in self.counts.items()},
            "arrays": {name: array.finish() for name, array in arrays.items()},
        }
        (self.work / "keys.npy").unlink()
        (self.work / "key_nodes.npy").unlink()
        (self.work / "source.json").write_text(json.dumps(meta, ensure_ascii=False, indent=1), encoding="utf-8")


def _counts(chunk: dict[str, Any], numbers: np.ndarray, languages: int) -> dict[str, np.ndarray]:
    """In how many rows of a chunk something is there; see SourceStore.counts."""
    languages_of_fields, mono = numbers[chunk["field_languages"]], chunk["field_mono"]
    there = {"queries": chunk["field_queries"] >= 0, "passages": chunk["field_passages"] >= 0, "mono": mono}
    starts = chunk["field_counts"].cumsum() - chunk["field_counts"]
    return {what: np.bincount(languages_of_fields[mask], minlength=languages) for what, mask in there.items()} | {
        "cross": np.array([(chunk["field_counts"] > 1).sum()]),
        "any_mono": np.array([np.logical_or.reduceat(mono, starts).sum()]),
    }
