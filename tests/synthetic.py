"""A source of any number of rows without texts: only what the batch planner reads, in the store's own arrays."""

import mmap
import tempfile
from pathlib import Path

import numpy as np

from hbt_fast.data.store import SourceStore, Store


def fixed(values, dtype=np.int64):
    array = np.ascontiguousarray(values, dtype)
    array.setflags(write=False)
    return array


def nothing(length):
    """Zeros that take no memory and no disk until they are written."""
    with tempfile.TemporaryFile() as file:
        file.truncate(8 * length)
        array = np.memmap(file, np.int64, "r", shape=(length,))
    array._mmap.madvise(mmap.MADV_RANDOM)  # no read-ahead: it would fill 32 pages for each that is read
    return array


def source(
    rows,
    languages,
    *,
    name="made",
    has=None,
    contents=None,
    bitext=False,
    negatives=None,
    huge=False,
    questions=None,
    answers=None,
):
    """Every row in every language, or where `has` (rows, languages) says so; content r unless given.

    Text numbers: 2 * (row * L + language), and one more for the passage. `negatives`: per row, its
    (language number, text, content) entries. `questions`: of each row, or -1; `answers`: the contents of each question.
    """
    count = len(languages)
    if has is None:
        offsets, codes, fields = [count], range(count), rows * count
    else:
        each, codes, fields = has.sum(1), np.nonzero(has)[1], int(has.sum())
        offsets = each[:1] if (each == each[0]).all() else np.concatenate([[0], each.cumsum()])
    there = [rows] * count if has is None else has.sum(0).tolist()
    several = rows if count > 1 else 0
    if has is not None:
        several = int((has.sum(1) > 1).sum())
    if huge:
        queries = passages = nothing(fields)
    else:
        where = np.arange(fields) if has is None else np.flatnonzero(has)
        queries, passages = fixed(2 * where), fixed(2 * where + 1)
    entries = [entry for row in negatives or () for entry in row]
    ends = np.cumsum([0, *map(len, negatives)]) if negatives else [0]
    begins = np.cumsum([0, *(len(own) + 1 for own in answers or ())])
    return SourceStore(
        folder=Path(name),
        name=name,
        languages=tuple(languages),
        rows=rows,
        contents=rows if contents is None else int(contents.max()) + 1,
        counts={
            "queries": there,
            "passages": there,
            "mono": [0] * count if bitext else there,
            "cross": [several],
            "any_mono": [0 if bitext else int((has.sum(1) > 0).sum()) if has is not None else rows],
        },
        tokens=fixed([0], np.int32),
        token_offsets=fixed([0, 1]),
        token_hashes=fixed([0], np.uint64),
        characters=fixed([0], np.uint8),
        character_offsets=fixed([0, 1]),
        row_contents=fixed([] if contents is None else contents),
        field_offsets=fixed(offsets),
        field_languages=fixed(codes, np.int32),
        field_queries=queries,
        field_passages=passages,
        field_mono=fixed([not bitext], np.bool_),
        negative_offsets=fixed(ends),
        negative_languages=fixed([e[0] for e in entries], np.int32),
        negative_texts=fixed([e[1] for e in entries]),
        negative_contents=fixed([e[2] for e in entries]),
        row_scores=fixed([np.nan], np.float32),
        negative_scores=fixed([np.nan] if entries else [], np.float32),
        row_answers=fixed([] if answers is None else [begins[q] if q >= 0 else q for q in questions]),
        answers=fixed([number for own in answers or () for number in (len(own), *own)]),
    )


def store(*sources, weights=None):
    return Store(tuple(sources), tuple(weights or [None] * len(sources)))
