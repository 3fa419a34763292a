"""Questions: rows that ask the same, and the contents that answer them.

Rows of which a query text is equal, in any language, are one question. Almost all questions have one content, and
nothing needs to be known of them. Of the others the contents are listed: none of them is a negative of such a question,
whichever row it comes from.

Questions are not united with contents: where many questions have several answers and many passages answer several
questions, as in natural language inference, all would become one content.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numba import njit

from hbt_fast.data.answers import ONE_ANSWER, UNINVOLVED
from hbt_fast.data.contents import BLOCK, label_contents

NO_CONTENT, SEVERAL = -1, -2  # of a question's first content: none yet, others too


def list_answers(
    keys: np.ndarray,
    key_rows: np.ndarray,
    contents: np.ndarray,
    rows: int,
    work: Path,
    write_rows: Callable[[np.ndarray], None],
    write_lists: Callable[[np.ndarray], None],
) -> int:
    """List the contents of the questions that have several. Writes nothing if there are none.

    Args:
        keys: (pairs,) uint64: equal for equal queries.
        key_rows: (pairs,) int64: the row that has the key.
        contents: (rows,) int64 of the rows; empty: row r has content r.
        rows: number of rows.
        work: a folder for temporary files; what is in it is deleted.
        write_rows: gets row_answers of `hbt_fast.data.store`, (some,) int64 at a time.
        write_lists: gets answers, the same.

    Returns:
        the number of these questions.
    """
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    try:
        questions = _array(work / "questions.npy", rows)
        written = 0

        def keep(some: np.ndarray) -> None:
            nonlocal written
            questions[written : written + len(some)] = some
            written += len(some)

        count = label_contents(keys, key_rows, rows, 0, work / "keys", keep, lambda _: None)
        if count == rows:  # no question has two rows
            return 0
        numbers = _array(work / "numbers.npy", count)
        _look(questions, contents, numbers)
        found = _number(numbers)
        if not found:
            return 0
        begins = _array(work / "begins.npy", found)
        lists = _array(work / "lists.npy", _count(questions, numbers, begins))
        _list(questions, contents, begins, lists)
        total = _distinct(begins, lists)
        involved = np.lib.format.open_memmap(work / "involved.npy", "w+", np.bool_, (rows,))
        _point(questions, contents, begins, lists, involved)
        for write, values, length in ((write_rows, questions, rows), (write_lists, lists, total)):
            for start in range(0, length, BLOCK):
                write(values[start : min(start + BLOCK, length)])
        return found
    finally:
        shutil.rmtree(work)


def _array(path: Path, length: int) -> np.ndarray:
    return np.lib.format.open_memmap(path, "w+", np.int64, (length,))


@njit(cache=True)
def _look(questions: np.ndarray, contents: np.ndarray, firsts: np.ndarray) -> None:
    """Find each question's only content, or that it has SEVERAL."""
    firsts[:] = NO_CONTENT
    for row in range(len(questions)):
        content = contents[row] if len(contents) else row
        first = firsts[questions[row]]
        if first == NO_CONTENT:
            firsts[questions[row]] = content
        elif first != content:
            firsts[questions[row]] = SEVERAL


@njit(cache=True)
def _number(firsts: np.ndarray) -> int:
    """Replace what `_look` found by a number of those that have several, UNINVOLVED of the others."""
    found = 0
    for question in range(len(firsts)):
        if firsts[question] == SEVERAL:
            firsts[question] = found
            found += 1
        else:
            firsts[question] = UNINVOLVED
    return found


@njit(cache=True)
def _count(questions: np.ndarray, numbers: np.ndarray, begins: np.ndarray) -> int:
    """Renumber the rows' questions, and find where the list of each begins: its length, and an entry per row."""
    begins[:] = 1
    for row in range(len(questions)):
        number = numbers[questions[row]]
        questions[row] = number
        if number >= 0:
            begins[number] += 1
    total = 0
    for number in range(len(begins)):
        total, begins[number] = total + begins[number], total
    return total


@njit(cache=True)
def _list(questions: np.ndarray, contents: np.ndarray, begins: np.ndarray, lists: np.ndarray) -> None:
    """Write the rows' contents by question; what were begins are the last places afterwards."""
    for row in range(len(questions)):
        number = questions[row]
        if number >= 0:
            begins[number] += 1
            lists[begins[number]] = contents[row] if len(contents) else row


@njit(cache=True)
def _distinct(lasts: np.ndarray, lists: np.ndarray) -> int:
    """Sort each list, leave out what repeats and put its length before it; returns the length of all.

    What were last places are begins afterwards. What is written is never beyond what is read.
    """
    total = begin = 0
    for number in range(len(lasts)):
        own = lists[begin + 1 : lasts[number] + 1]
        own.sort()
        begin, lasts[number] = lasts[number] + 1, total
        total += 1
        for i in range(len(own)):
            if i == 0 or own[i] != lists[total - 1]:
                lists[total] = own[i]
                total += 1
        lists[lasts[number]] = total - lasts[number] - 1
    return total


@njit(cache=True)
def _point(
    questions: np.ndarray, contents: np.ndarray, begins: np.ndarray, lists: np.ndarray, involved: np.ndarray
) -> None:
    """Replace the rows' questions by where their lists begin, or say whether the row's content is in a list at all."""
    for number in range(len(begins)):
        begin = begins[number]
        for place in range(begin + 1, begin + 1 + lists[begin]):
            involved[lists[place]] = True
    for row in range(len(questions)):
        if questions[row] >= 0:
            questions[row] = begins[questions[row]]
        elif involved[contents[row] if len(contents) else row]:
            questions[row] = ONE_ANSWER
