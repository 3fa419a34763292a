"""Strata: what batches of one kind are drawn from - their contents, and of each content the rows that qualify.

Nothing here is in proportion to the data where the data is alike: if every row of a source qualifies and has a content
of its own, its stratum is two empty arrays. Otherwise the rows are listed by content, in memory or, when they are
many, in an unlinked file that the system may page out.
"""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numba import njit

from hbt_fast.data.store import SourceStore, Store, span

Kind = Literal["mono", "mixed-mono", "cross"]
KINDS: tuple[Kind, ...] = ("mono", "mixed-mono", "cross")
MONO, MIXED, CROSS = range(3)
ANY = -1  # instead of a language: the row's own
IN_MEMORY = 1 << 23  # numbers; longer lists go to a file


class Fields(NamedTuple):
    """The arrays of a source that say what its rows have, under the names that Numba's functions use."""

    contents: np.ndarray
    offsets: np.ndarray
    languages: np.ndarray
    queries: np.ndarray
    passages: np.ndarray
    mono: np.ndarray


class Wanted(NamedTuple):
    """What a pair must be: of a kind (an index into KINDS), in languages of the source or ANY, among those used."""

    kind: int
    query_language: int
    passage_language: int
    used: np.ndarray


@dataclass(frozen=True)
class Stratum:
    """What the batches of one kind, source and, for some kinds, languages are drawn from.

    Attributes:
        source: number of the store's source.
        wanted: what its pairs are.
        contents: number of different contents: how many pairs an epoch of this stratum has.
        content_offsets: span array (see `hbt_fast.data.store`) of the rows of the stratum's c-th content.
        rows: (R,) int64 the rows that qualify, those of one content next to each other; empty: row i is the i-th.
    """

    source: int
    wanted: Wanted
    contents: int
    content_offsets: np.ndarray
    rows: np.ndarray


def strata_of(store: Store, kind: int, weights: np.ndarray, *, pairs_apart: bool = False) -> list[Stratum]:
    """The strata of one kind that are not empty.

    Args:
        store: the token store.
        kind: MONO: one per source and language; MIXED: one per source; CROSS: one per source, or per source and pair.
        weights: (languages of the store,) float64; a language of weight 0 is never drawn.
        pairs_apart: CROSS: a stratum per (query language, passage language) instead of one with all pairs.
    """
    found = []
    for number, source in enumerate(store.sources):
        used = weights[store.language_numbers[number]] > 0
        languages = np.flatnonzero(used)
        if kind == MONO:
            choices = [(a, a) for a in languages]
        elif kind == CROSS and pairs_apart:
            choices = [(a, b) for a in languages for b in languages if a != b]
        else:
            choices = [(ANY, ANY)]
        for a, b in choices:
            if stratum := _stratum(source, number, Wanted(kind, int(a), int(b), used)):
                found.append(stratum)
    return found


def fields_of(source: SourceStore) -> Fields:
    """The arrays of a source that say what its rows have."""
    arrays = (source.row_contents, source.field_offsets, source.field_languages)
    return Fields(*arrays, source.field_queries, source.field_passages, source.field_mono)


def _stratum(source: SourceStore, number: int, wanted: Wanted) -> Stratum | None:
    at_most = _at_most(source, wanted)
    if not at_most:
        return None
    everything = at_most == source.rows
    if everything and not len(source.row_contents):
        return Stratum(number, wanted, source.rows, _fixed(np.array([1])), _fixed(np.empty(0, np.int64)))
    fields = fields_of(source)
    counts = _zeros(source.contents)
    total = _count(source.rows, counts, fields, wanted, everything)
    contents = int(np.count_nonzero(counts))
    if not contents:
        return None
    offsets, rows = _zeros(contents + 1), _zeros(total)
    _place(source.rows, counts, offsets, rows, fields, wanted, everything)
    if contents == total:  # each content has one row
        offsets = np.array([1])
    return Stratum(number, wanted, contents, _fixed(offsets), _fixed(rows))


def _at_most(source: SourceStore, wanted: Wanted) -> int:
    """How many rows qualify by the source's counts: all of them and none are exact, what is between is a bound."""
    counts, rows, (kind, a, b, used) = source.counts, source.rows, wanted
    if kind == MONO:
        return counts["mono"][a]
    if kind == CROSS and a != ANY:
        return min(counts["queries"][a], counts["passages"][b])
    some = counts["cross" if kind == CROSS else "any_mono"][0]
    return some if used.all() else min(some, rows - 1)


def _zeros(length: int) -> np.ndarray:
    """(length,) int64 zeros, in memory or in a file without a name."""
    if length <= IN_MEMORY:
        return np.zeros(length, np.int64)
    with tempfile.TemporaryFile() as file:  # the mapping outlives the file's handle
        file.truncate(8 * length)
        return np.asarray(np.memmap(file, np.int64, "r+", shape=(length,)))


def unmap(arrays: Iterable[np.ndarray]) -> None:
    """Give back the resident pages of memory-mapped arrays. The system's cache keeps them, nothing is read again."""
    for array in arrays:
        owner = array
        while isinstance(owner, np.ndarray):
            owner = owner.base
        if isinstance(owner, mmap.mmap):
            owner.madvise(mmap.MADV_DONTNEED)


def _fixed(values: np.ndarray) -> np.ndarray:
    """Read-only like the store's arrays, so that Numba compiles for one type."""
    values.setflags(write=False)
    return values


@njit(cache=True, nogil=True, inline="always")
def of_field(values: np.ndarray, field: int, begin: int) -> int:
    """The value of a field, of a row whose fields begin at `begin`, in a periodic array: its period is one row's."""
    return values[field] if field < len(values) else values[min(field - begin, len(values) - 1)]


@njit(cache=True, nogil=True, forceinline=True)
def fits(fields: Fields, wanted: Wanted, q: int, p: int, begin: int) -> bool:
    """Whether the query of field q and the passage of field p, of a row whose fields begin at `begin`, are wanted."""
    kind, a, b, used = wanted
    x, y = of_field(fields.languages, q, begin), of_field(fields.languages, p, begin)
    if kind != CROSS:
        return q == p and of_field(fields.mono, q, begin) and used[x] and (a == ANY or x == a)
    there = fields.queries[q] >= 0 and fields.passages[p] >= 0
    return there and x != y and used[x] and used[y] and (a == ANY or (x == a and y == b))


@njit(cache=True, nogil=True)
def _qualifies(row: int, fields: Fields, wanted: Wanted) -> bool:
    begin, end = span(fields.offsets, row)
    for q in range(begin, end):
        for p in range(begin if wanted.kind == CROSS else q, end if wanted.kind == CROSS else q + 1):
            if fits(fields, wanted, q, p, begin):
                return True
    return False


@njit(cache=True, nogil=True)
def _count(number: int, counts: np.ndarray, fields: Fields, wanted: Wanted, everything: bool) -> int:
    """Count each content's qualifying rows; returns how many there are in all."""
    total = 0
    for row in range(number):
        if everything or _qualifies(row, fields, wanted):
            counts[fields.contents[row] if len(fields.contents) else row] += 1
            total += 1
    return total


@njit(cache=True, nogil=True)
def _place(
    number: int,
    counts: np.ndarray,
    ends: np.ndarray,
    rows: np.ndarray,
    fields: Fields,
    wanted: Wanted,
    everything: bool,
) -> None:
    """Write the rows by content and where each content's begin; overwrites the counts."""
    index = total = 0
    for content in range(len(counts)):
        count = counts[content]
        counts[content] = total
        if count:
            total += count
            index += 1
            ends[index] = total
    for row in range(number):
        if everything or _qualifies(row, fields, wanted):
            content = fields.contents[row] if len(fields.contents) else row
            rows[counts[content]] = row
            counts[content] += 1
