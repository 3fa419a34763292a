"""The token store: the texts of a training set, tokenised once, as memory-mapped arrays; one folder per source.

    tokens             int32   the token ids of every text, one after the other
    token_offsets      int64   text t is tokens[token_offsets[t]:token_offsets[t + 1]]
    token_hashes       uint64  xxh3 of a text's token ids: equal inputs of the encoder are found by it
    characters         uint8   the texts themselves in UTF-8, without prompts
    character_offsets  int64   text t is characters[character_offsets[t]:character_offsets[t + 1]]
    row_contents       int64   content id of the row's passage; empty: row r is content r
    field_offsets      span    row r has the fields span(field_offsets, r), one per language
    field_languages    int32   a field's language, as a number of this source; periodic
    field_queries      int64   the field's query, as a text number, or -1
    field_passages     int64   the field's positive passage, as a text number, or -1
    field_mono         bool    query and passage are there and differ: it serves monolingual batches; periodic
    negative_offsets   span    row r has the hard negatives span(negative_offsets, r)
    negative_languages, negative_texts, negative_contents
    row_scores         float32 a teacher's of each row's query and passage, NaN where there is none; periodic
    negative_scores    float32 of the row's query and each hard negative; periodic
    row_answers        int64   where the list of the contents that answer the row's query begins in answers; where all
                               rows that ask the same have one content -1, or -2 if that answers another query, too,
                               which has several; empty: all are -1
    answers            int64   of each list its length, then the content ids, ascending

What every row has alike is not written a billion times. A *span* array (int64) has rows + 1 offsets, or one number:
the count that all rows have. A *periodic* array that is shorter than its domain repeats.

Texts are stored as the model reads them: with the prompt of their role and the tokenizer's special tokens, cut to the
length limit. Rows whose passages have equal text (after Unicode and case folding), or to which the source gives one
content id, share a content id, transitively. Rows of which a query has equal text, in any language, are one question.
A batch has one source, so content ids are those of a source.

Every source is a folder of its own, named after the hash of all that went into it: an unchanged one is found again,
and adding one to a training set leaves the others alone. `hbt_fast.data.build` writes them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numba import njit

from hbt_fast.data.rows import DataError
from hbt_fast.data.tokenise import folded  # noqa: F401 - how passage texts are compared is part of the format

FORMAT = 4
ARRAYS = {
    "tokens": np.int32,
    "token_offsets": np.int64,
    "token_hashes": np.uint64,
    "characters": np.uint8,
    "character_offsets": np.int64,
    "row_contents": np.int64,
    "field_offsets": np.int64,
    "field_languages": np.int32,
    "field_queries": np.int64,
    "field_passages": np.int64,
    "field_mono": np.bool_,
    "negative_offsets": np.int64,
    "negative_languages": np.int32,
    "negative_texts": np.int64,
    "negative_contents": np.int64,
    "row_scores": np.float32,
    "negative_scores": np.float32,
    "row_answers": np.int64,
    "answers": np.int64,
}
BLOCK = 1 << 24  # bytes read at a time when checksums are verified


@njit(cache=True, inline="always", nogil=True)
def span(offsets: np.ndarray, i: int) -> tuple[int, int]:
    """Begin and end of row i in a span array; see the module's docstring."""
    if len(offsets) == 1:
        return i * offsets[0], (i + 1) * offsets[0]
    return offsets[i], offsets[i + 1]


@njit(cache=True, inline="always", nogil=True)
def at(values: np.ndarray, i: int) -> int:
    """Element i of a periodic array."""
    return values[i] if i < len(values) else values[i % len(values)]


def checksum(meta: dict[str, Any]) -> str:
    """Of what source.json says."""
    return xxhash.xxh3_64_hexdigest(json.dumps(meta, sort_keys=True).encode())


@dataclass(frozen=True)
class Role:
    """How texts of one role are written: the prompt before them and their length limit in tokens, specials included."""

    prompt: str
    max_length: int


@dataclass(frozen=True)
class SourceStore:
    """One source on disk, opened read-only; the arrays are described in the module's docstring.

    Attributes:
        folder: where it lies.
        name: of the source.
        roles: how its queries and its passages are written.
        languages: the language codes, in the order of this source's language numbers.
        rows: number of rows.
        contents: number of different contents of rows; their ids are 0 .. contents - 1.
        counts: in how many rows something is there, so that the planner need not read every row to know that all have
            it: "queries", "passages" and "mono" give a number per language of this source (a row has a language once
            at most), "cross" is [rows with a query and a passage in different languages], "any_mono" is [rows with a
            field that serves monolingual batches].
        read: rows that the sources gave, these and those that were left out.
        left_out: reason -> rows of which nothing was kept; see `hbt_fast.data.problems`.
        read_by_language: language -> "read": rows that had a text in it; and reason -> those of which no text in it
            was kept.
        layouts: how the records of each source were read: its name, fields that are read and those that are not.
        refused: numbers, among the rows that the reader gave, of those that could not be tokenised.
    """

    folder: Path
    name: str
    languages: tuple[str, ...]
    rows: int
    contents: int
    counts: dict[str, list[int]]
    tokens: np.ndarray
    token_offsets: np.ndarray
    token_hashes: np.ndarray
    characters: np.ndarray
    character_offsets: np.ndarray
    row_contents: np.ndarray
    field_offsets: np.ndarray
    field_languages: np.ndarray
    field_queries: np.ndarray
    field_passages: np.ndarray
    field_mono: np.ndarray
    negative_offsets: np.ndarray
    negative_languages: np.ndarray
    negative_texts: np.ndarray
    negative_contents: np.ndarray
    row_scores: np.ndarray
    negative_scores: np.ndarray
    row_answers: np.ndarray
    answers: np.ndarray
    roles: tuple[Role, Role] = (Role("", 512), Role("", 512))
    read: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    read_by_language: dict[str, dict[str, int]] = field(default_factory=dict)
    layouts: tuple[dict[str, Any], ...] = ()
    refused: tuple[int, ...] = ()

    @classmethod
    def open(cls, folder: str | Path, *, verify: bool = True) -> SourceStore:
        """Open what `hbt_fast.data.build.build_source` wrote.

        Args:
            folder: of the source.
            verify: read every array once and compare its checksum.

        Raises:
            DataError: no store there, a store of another version of this program, or an array that is cut short or
                changed.
        """
        folder = Path(folder)
        try:
            meta = json.loads((folder / "source.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError, ValueError) as error:
            raise DataError(
                f"{folder}: no whole token store there (source.json: {error}); build one with python -m "
                "hbt_fast.prepare, which goes on where an interrupted one stopped"
            ) from None
        found = meta.get("format") if isinstance(meta, dict) else None
        if found != FORMAT:
            raise DataError(f"{folder}: a store of format {found}, this program reads {FORMAT}; delete the folder")
        if meta.pop("xxh3_64", None) != checksum(meta):
            raise DataError(
                f"{folder / 'source.json'}: its checksum is not that of what was written (a damaged disk?); delete "
                f"{folder} and prepare the data again"
            )
        arrays = {name: _open_array(folder, name, meta["arrays"][name], verify) for name in ARRAYS}
        facts = {key: meta[key] for key in ("name", "rows", "contents", "counts")}
        tally = meta["tally"]
        return cls(
            folder=folder, languages=tuple(meta["languages"]), roles=tuple(Role(*role) for role in meta["roles"]),
            **facts, **arrays,
            read=tally.get("read", meta["rows"]), left_out=tally.get("left_out", {}),
            read_by_language=tally.get("languages", {}), layouts=tuple(tally.get("layouts", ())),
            refused=tuple(meta["refused"]),
        )  # fmt: skip

    @property
    def texts(self) -> int:
        """Number of texts."""
        return len(self.token_offsets) - 1

    def text(self, number: int) -> str:
        """A text as it was read, without prompt."""
        raw = self.characters[self.character_offsets[number] : self.character_offsets[number + 1]]
        return raw.tobytes().decode()

    def text_tokens(self, number: int) -> np.ndarray:
        """The token ids of one text: (length,) int32."""
        return self.tokens[self.token_offsets[number] : self.token_offsets[number + 1]]


def _open_array(folder: Path, name: str, written: dict, verify: bool) -> np.ndarray:
    """One array of a source, compared with what its source.json says was written."""
    path, again = folder / f"{name}.npy", f"delete {folder} and prepare the data again"
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (FileNotFoundError, EOFError, ValueError) as error:
        raise DataError(f"{path}: missing or damaged ({error}); {again}") from None
    except OSError as error:  # no permission, no memory to map it: nothing that deleting would mend
        raise DataError(f"{path}: cannot be opened ({error.strerror or error})") from None
    if array.dtype != ARRAYS[name] or array.shape != (written["length"],):
        raise DataError(f"{path}: not the array that was written; {again}")
    if verify:
        state, step = xxhash.xxh3_64(), BLOCK // array.itemsize
        for i in range(0, len(array), step):
            state.update(array[i : i + step].view(np.uint8))
        if state.hexdigest() != written["xxh3_64"]:
            raise DataError(f"{path}: its checksum is not that of what was written (a damaged disk?); {again}")
    return array


@dataclass(frozen=True)
class Store:
    """The token store of a training run: its sources, with their sampling weights.

    Attributes:
        sources: in the order of the configuration; their number is what a batch plan calls source.
        weights: per source, the sampling weight its configuration gave, or None.
        hard_negatives: per source, how many its configuration gave, or None; empty: none gave any.
        made_of: per source, what its rows and texts depend on, by name (JSON).
    """

    sources: tuple[SourceStore, ...]
    weights: tuple[float | None, ...]
    made_of: tuple[dict, ...] = ()
    hard_negatives: tuple[int | None, ...] = ()

    @cached_property
    def languages(self) -> tuple[str, ...]:
        """The codes of all languages, sorted; a language's number in a batch plan is its place here."""
        return tuple(sorted({code for source in self.sources for code in source.languages}))

    @cached_property
    def language_numbers(self) -> tuple[np.ndarray, ...]:
        """Per source, (its languages,) int32: the number here of each of its languages."""
        number = {code: n for n, code in enumerate(self.languages)}
        return tuple(np.array([number[code] for code in s.languages], np.int32) for s in self.sources)

    @property
    def identity(self) -> dict:
        """What it is made of, by name (JSON): stores of one identity give equal batches."""
        described = self.made_of or [{"store": source.folder.name} for source in self.sources]
        data = {
            source.name: {"rows": source.rows, "weight": weight, **parts}
            for source, weight, parts in zip(self.sources, self.weights, described, strict=True)
        }
        for source, number in zip(self.sources, self.hard_negatives, strict=False):
            if number is not None:
                data[source.name]["hard negatives"] = number
        return {"sources": [source.name for source in self.sources], "data": data}

    @property
    def rows(self) -> int:
        """Number of rows of all sources."""
        return sum(source.rows for source in self.sources)
