"""Which passages of a batch answer which of its queries, where questions have several answers."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from hbt_fast.data.draws import mix

UNINVOLVED, ONE_ANSWER = -1, -2  # in place of where a row's answers are; see `row_answers` of `hbt_fast.data.store`


class Answers(NamedTuple):
    """The arrays of a source that say which contents answer a row's query, where there are several."""

    rows: np.ndarray
    lists: np.ndarray


@njit(cache=True, nogil=True)
def unite_answers(rows: np.ndarray, ids: np.ndarray, answers: Answers) -> None:
    """Give one id to the passages of a batch that answer one query, and so on through those that answer several.

    That takes some true negatives out, too, where many passages answer many questions; a batch is a small sample of
    these, so that they are few.

    Args:
        rows: (N,) int64 of the batch.
        ids: (N + H,) int64 content ids of their passages, then of hard negatives, all different; changed in place.
        answers: of the source.
    """
    row_answers, lists = answers.rows, answers.lists
    # several short loops: the cache misses of one do not wait for each other
    where, involved = np.empty(len(rows), np.int64), np.empty(len(ids), np.int64)
    for i in range(len(rows)):
        where[i] = row_answers[rows[i]]
    count = several = 0
    for i in range(len(rows)):
        if where[i] != UNINVOLVED:
            involved[count] = i
            count += 1
    askers, lengths = np.empty(count, np.int64), np.empty(count, np.int64)
    for k in range(count):
        if where[involved[k]] >= 0:
            askers[several] = k
            several += 1
    for n in range(several):
        lengths[n] = lists[where[involved[askers[n]]]]
    for i in range(len(rows), len(ids)):
        involved[count] = i
        count += 1

    mask = 1
    while mask < 2 * count:
        mask *= 2
    table, places = np.full(mask, -1), np.empty(mask, np.int64)  # where each content is, hashed
    mask -= 1
    for k in range(count):
        slot = _slot(table, mask, ids[involved[k]])
        table[slot], places[slot] = ids[involved[k]], k
    parents, met, done = np.arange(count), False, np.empty(0, np.int64)
    for n in range(several):
        k = askers[n]
        begin = where[involved[k]] + 1
        if lengths[n] <= count:
            for place in range(begin, begin + lengths[n]):
                slot = _slot(table, mask, lists[place])
                if table[slot] != -1:  # at least once: its own
                    met |= places[slot] != k
                    _join(parents, k, places[slot])
            continue
        if not len(done):
            done = np.full(mask + 1, -1)
        if new(done, mask, begin):  # fewer look-ups the other way round, and once for all rows that ask the same
            for j in range(count):
                if among(lists, begin, lengths[n], ids[involved[j]]):
                    met |= j != k
                    _join(parents, k, j)
    for k in range(count if met else 0):
        parents[k] = parents[parents[k]]  # which is smaller, so its parent is the first of all
        ids[involved[k]] = ids[involved[parents[k]]]


@njit(cache=True, nogil=True)
def _join(parents: np.ndarray, i: int, j: int) -> None:
    """Unite two sets of a forest in which parents are smaller than children."""
    while parents[i] != i:
        i = parents[i]
    while parents[j] != j:
        j = parents[j]
    parents[max(i, j)] = min(i, j)


@njit(cache=True, nogil=True)
def among(values: np.ndarray, begin: int, count: int, value: int) -> bool:
    """Whether a value is among so many ascending ones from `begin` on."""
    end = last = begin + count
    while begin < end:
        middle = (begin + end) // 2
        if values[middle] < value:
            begin = middle + 1
        else:
            end = middle
    return begin < last and values[begin] == value


@njit(cache=True, nogil=True)
def _slot(table: np.ndarray, mask: int, content: int) -> int:
    """Where a content is in a hash table with open addressing, or would be."""
    slot = np.int64(mix(np.uint64(content))) & mask
    while table[slot] != -1 and table[slot] != content:
        slot = (slot + 1) & mask
    return slot


@njit(cache=True, nogil=True)
def new(table: np.ndarray, mask: int, content: int) -> bool:
    """Put a content into the hash table; False if it was there."""
    slot = _slot(table, mask, content)
    found = table[slot] == -1
    table[slot] = content
    return found
