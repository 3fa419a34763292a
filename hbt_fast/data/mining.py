"""Hard negatives: for every query, passages that a model ranks high although they do not answer it.

The candidates are the passages of the store itself, each distinct text once (compared like contents: after Unicode and
case folding). FAISS finds the nearest ones of a block of queries; their scores are computed again in float64, in one
order, and ranked by (score, order in which the passages were read). FAISS is asked for more until nothing that it left
out could be among them: what comes out is what sorting all candidates gives, whatever the block, threads or device.

Shape legend: Q questions, P passages, M candidates of a pool, k nearest ones, n negatives asked for, d dimensions.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import xxhash
from numba import njit

from hbt_fast.data.contents import label_contents
from hbt_fast.data.draws import key_of, mix
from hbt_fast.data.rows import DataError
from hbt_fast.data.store import SourceStore, Store, at, folded, span

Vectors = Callable[[np.ndarray], np.ndarray]  # text numbers (n,) -> their unit vectors (n, d) float32
CELLS = 1 << 20  # (query, candidate) pairs looked at at a time
BLOCK = 1 << 14  # queries looked at at a time
SPARE = 16  # candidates asked of FAISS beyond range_max: room for the query's own content and for ties
ROUNDING = 1e-5  # more than float32 inner products of unit vectors are off by
KEY = ("key", np.uint64)  # equal for texts that are the same passage, or the same query
TEXT = np.dtype([("source", np.int64), ("number", np.int64)])  # number of a store's source, text number there
QUESTION = np.dtype([(name, np.int64) for name in ("source", "row", "text", "group", "language", "positive")] + [KEY])
PASSAGE = np.dtype([(name, np.int64) for name in ("text", "language", "content")] + [KEY])
ENOUGH, TOO_CLOSE, OWN_CONTENT, SMALL_POOL, NO_POSITIVE = range(5)


@dataclass(frozen=True)
class MiningConfig:
    """Which candidates become hard negatives; the names are those of sentence-transformers' mine_hard_negatives.

    Args:
        num_negatives: so many for each query.
        range_min: skip so many of the nearest candidates, which are the likeliest to be unmarked answers; the query's
            own content is not counted.
        range_max: look at so many of the nearest candidates.
        absolute_margin: drop candidates that score above the positive's score minus this; null is off.
        relative_margin: drop candidates that score above the positive's score minus this share of it; null is off.
        max_score: drop candidates that score above this; null is off.
        min_score: drop candidates that score below this; null is off.
        sampling_strategy: top takes the nearest of what is left; random draws, a function of the seed and the texts.
        pool: language takes candidates in the language of the query's positive, which is the query's own wherever the
            row has a passage in it; all takes candidates of every language.
        seed: of random.
    """

    num_negatives: int = 8
    range_min: int = 10
    range_max: int = 100
    absolute_margin: float | None = 0.05
    relative_margin: float | None = None
    max_score: float | None = None
    min_score: float | None = None
    sampling_strategy: Literal["random", "top"] = "random"
    pool: Literal["language", "all"] = "language"
    seed: int = 0

    def check(self) -> None:
        """Raise DataError where the settings cannot be met."""
        for name, least in (("num_negatives", 1), ("range_min", 0), ("absolute_margin", 0), ("relative_margin", 0)):
            if (value := getattr(self, name)) is not None and not least <= value < np.inf:
                raise DataError(f"{name} is {value}; write a number of {least} or more")
        if self.max_score is not None and not -np.inf < self.max_score < np.inf:
            raise DataError(f"max_score is {self.max_score}; write a number, or null for no bound")
        room = self.range_max - self.range_min
        if room < self.num_negatives:
            raise DataError(
                f"range_min {self.range_min} and range_max {self.range_max} leave {max(room, 0)} candidates, of which "
                f"num_negatives {self.num_negatives} cannot be taken; write a greater range_max"
            )

    def ceiling(self, positive: np.ndarray) -> np.ndarray:
        """The highest score that a negative may have, (Q,) float64, from those of the positives, (Q,)."""
        ceiling = np.full(len(positive), np.inf if self.max_score is None else self.max_score)
        if self.absolute_margin is not None:
            ceiling = np.minimum(ceiling, positive - self.absolute_margin)
        if self.relative_margin is not None:
            ceiling = np.minimum(ceiling, positive - np.abs(positive) * self.relative_margin)
        return ceiling


@dataclass(frozen=True)
class Task:
    """What there is to mine, in the order of sources, rows and languages.

    Attributes:
        questions: (Q,) QUESTION, the queries of all rows: number of the store's source, row there, number of the
            distinct query, group of equal keys, the store's language number, and which of the passages is the positive:
            the row's in the query's language; where the row has none, or only the query's own text (bitext), the
            row's next one in another language; -1: there is none.
        passages: (P,) PASSAGE, the passages of all rows; a text may come many times: number of the distinct passage,
            language number, content id across sources (passages of equal key share theirs).
        query_texts: (distinct queries,) TEXT, one source after the other: where each text is in the store.
        passage_texts: (distinct passages,) TEXT.
        own: sorted codes group * contents + content: which contents answer queries of one text.
        contents: number of contents.
    """

    questions: np.ndarray
    passages: np.ndarray
    query_texts: np.ndarray
    passage_texts: np.ndarray
    own: np.ndarray
    contents: int

    def is_own(self, questions: np.ndarray, contents: np.ndarray) -> np.ndarray:
        """Whether contents, (Q, k), answer their questions, (Q,) numbers: here or in any row that asks the same."""
        codes = self.questions["group"][questions][:, None] * self.contents + contents
        return self.own[np.minimum(np.searchsorted(self.own, codes), len(self.own) - 1)] == codes


@dataclass(frozen=True)
class Mined:
    """The negatives of the Q questions, nearest first.

    Attributes:
        passages: (Q, n) int64 which of the task's passages they are; -1 where there are fewer.
        ranks: (Q, n) int64, from 1, among the candidates that are not the query's own content.
        scores: (Q, n) float64 inner products with the query; positives: (Q,) that of the positive. NaN: there is none.
        why: (Q,) int8: ENOUGH, or why there are fewer: TOO_CLOSE (margins, max_score or min_score), OWN_CONTENT,
            SMALL_POOL (fewer candidates than range_min + num_negatives) or NO_POSITIVE.
    """

    passages: np.ndarray
    ranks: np.ndarray
    scores: np.ndarray
    positives: np.ndarray
    why: np.ndarray


def gather(store: Store) -> Task:
    """Find the questions and passages of a store, and which belong together, across its sources."""
    questions, passages, texts = [], [], ([], [])
    contents, asked_contents = 0, []
    for number, source in enumerate(store.sources):
        count = len(source.field_queries)
        asked, given = np.zeros(count, QUESTION), np.zeros(count, PASSAGE)
        widths = source.field_offsets[0] if len(source.field_offsets) == 1 else np.diff(source.field_offsets)
        row = np.repeat(np.arange(source.rows), widths)
        own = contents + (source.row_contents[row] if len(source.row_contents) else row)
        language = source.field_languages[np.arange(count) % len(source.field_languages)]
        asked["source"], asked["row"], given["content"] = number, row, own
        sides = (asked, source.field_queries, texts[0]), (given, source.field_passages, texts[1])
        for fields, numbers, role in sides:
            fields["language"] = store.language_numbers[number][language]
            distinct, keys, index = _distinct(source, numbers)
            fields["text"], fields["key"] = sum(map(len, role)) + index, keys[index]
            role.append(np.zeros(len(distinct), TEXT))
            role[-1]["source"], role[-1]["number"] = number, distinct
        has_query, has_passage = source.field_queries >= 0, source.field_passages >= 0
        place = np.append(sum(map(len, passages)) + np.cumsum(has_passage) - 1, -1)  # of each field; the last: none
        mono = source.field_mono, (has_query, has_passage), (asked["key"], given["key"])
        asked["positive"] = place[_positives(source.rows, source.field_offsets, *mono)]
        questions.append(asked[has_query])
        passages.append(given[has_passage])
        asked_contents.append(own[has_query])
        contents += source.contents
    asked, given = np.concatenate(questions), np.concatenate(passages)
    labels = _united(given["key"], given["content"], contents)
    given["content"] = labels[given["content"]]
    asked["group"] = np.unique(asked["key"], return_inverse=True)[1]
    own = np.unique(asked["group"] * contents + labels[np.concatenate(asked_contents)])
    return Task(asked, given, np.concatenate(texts[0]), np.concatenate(texts[1]), own, contents)


def _distinct(source: SourceStore, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The distinct texts among text numbers, (fields,) or -1: the store may have one text under several numbers.

    Returns:
        a text number of each distinct text, (n,), in the order of first occurrence; their keys, (n,) uint64; which of
        them each field has, (fields,), meaningless where it has none.
    """
    used, inverse = np.unique(numbers[numbers >= 0], return_inverse=True)
    raw = (xxhash.xxh3_64_intdigest(source.text(t).encode()) for t in used)
    _, first, same = np.unique(np.fromiter(raw, np.uint64, len(used)), return_index=True, return_inverse=True)
    order = np.argsort(first)
    distinct = used[first[order]]
    keys = (xxhash.xxh3_64_intdigest(folded(source.text(t)).encode()) for t in distinct)
    index = np.zeros(len(numbers), np.int64)
    index[numbers >= 0] = np.argsort(order)[same][inverse]
    return distinct, np.fromiter(keys, np.uint64, len(distinct)), index


@njit(cache=True)
def _positives(rows: int, offsets: np.ndarray, mono: np.ndarray, there: tuple, keys: tuple) -> np.ndarray:
    """The field whose passage is the positive of each field's query, or -1; see Task."""
    (has_query, has_passage), (query_key, passage_key) = there, keys
    found = np.full(len(has_query), -1)
    for row in range(rows):
        begin, end = span(offsets, row)
        for f in range(begin, end):
            if has_query[f] and at(mono, f):
                found[f] = f
            elif has_query[f]:
                for step in range(1, end - begin):
                    g = begin + (f - begin + step) % (end - begin)
                    if has_passage[g] and passage_key[g] != query_key[f]:
                        found[f] = g
                        break
    return found


def _united(keys: np.ndarray, contents: np.ndarray, count: int) -> np.ndarray:
    """One label for contents, of all sources, that have a passage in common, transitively: (count,) int64."""
    labels: list[np.ndarray] = []
    with tempfile.TemporaryDirectory() as work:
        write = (lambda some: labels.append(some.copy())), (lambda _: None)
        label_contents(keys, contents, count, 0, Path(work) / "contents", *write)
    return np.concatenate(labels) if labels else np.arange(count)


def mine(task: Task, queries: Vectors, passages: Vectors, settings: MiningConfig, *, progress: bool = False) -> Mined:
    """Find the hard negatives of all questions.

    Args:
        task: of the store.
        queries: gives the vectors of distinct queries.
        passages: gives those of distinct passages. The candidates' are held in memory, twice, a pool at a time.
        settings: which candidates are taken.
        progress: show a progress bar on stderr.

    Raises:
        DataError: settings that cannot be met.
    """
    from tqdm import tqdm

    settings.check()
    count, wanted, asked = len(task.questions), settings.num_negatives, task.questions
    each = (np.full((count, wanted), nothing) for nothing in (-1, 0, np.nan))
    found = Mined(*each, np.full(count, np.nan), np.full(count, NO_POSITIVE, np.int8))
    with tqdm(total=count, desc="searching", unit=" queries", unit_scale=True, disable=not progress) as bar:
        for members, candidates in _pools(task, settings.pool):
            vectors_Md = passages(task.passages["text"][candidates])
            for start in range(0, len(members), BLOCK):
                some = members[start : start + BLOCK]
                vectors_Qd = queries(asked["text"][some])
                positives_Qd = passages(task.passages["text"][asked["positive"][some]])
                found.positives[some] = _dots(vectors_Qd, positives_Qd, np.arange(len(some))[:, None])[:, 0]
                for part, *nearest in _nearest(task, some, vectors_Qd, candidates, vectors_Md, settings.range_max):
                    _choose(task, part, nearest, len(candidates), settings, found)
                bar.update(len(some))
    return found


def _pools(task: Task, pool: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(questions, the passages that are their candidates: the first of each key) of every pool."""
    given, positive = task.passages, task.questions["positive"]
    language = np.where(positive < 0, -1, given["language"][positive])
    for code in [None] if pool == "all" else np.unique(language[language >= 0]):
        members = np.flatnonzero(language >= 0 if code is None else language == code)
        there = np.flatnonzero(given["language"] >= 0 if code is None else given["language"] == code)
        yield members, there[np.sort(np.unique(given["key"][there], return_index=True)[1])]


def _nearest(
    task: Task,
    questions: np.ndarray,
    vectors_Qd: np.ndarray,
    candidates: np.ndarray,
    vectors_Md: np.ndarray,
    needed: int,
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """Groups of the questions, each with the scores, passages and ranks (0: own content) of its nearest candidates,
    all (Q, k) in the order of ranks, which are right up to rank `needed`.
    """
    from hbt_fast.evaluation.search import search

    pending, k = np.arange(len(questions)), min(len(candidates), needed + SPARE)
    while len(pending):
        later, size = [], max(1, CELLS // k)
        for start in range(0, len(pending), size):
            some = pending[start : start + size]
            rough_Qk, places_Qk = search(vectors_Qd[some], vectors_Md, k)
            scores_Qk = _dots(vectors_Qd[some], vectors_Md, places_Qk)
            order = np.lexsort((places_Qk, -scores_Qk), axis=1)
            scores_Qk, places_Qk = (np.take_along_axis(a, order, 1) for a in (scores_Qk, places_Qk))
            own_Qk = task.is_own(questions[some], task.passages["content"][candidates[places_Qk]])
            ranks_Qk = np.where(own_Qk, 0, np.cumsum(~own_Qk, axis=1))
            # whole: all candidates are here, or the last one that is needed is clearly nearer than what was left out
            last = scores_Qk[np.arange(len(some)), np.argmax(ranks_Qk == needed, axis=1)]
            whole = (ranks_Qk.max(1) >= needed) & (last > rough_Qk[:, -1] + ROUNDING) | (k == len(candidates))
            if whole.any():
                yield questions[some[whole]], scores_Qk[whole], candidates[places_Qk[whole]], ranks_Qk[whole]
            later.append(some[~whole])
        pending, k = np.concatenate(later), min(len(candidates), 2 * k)


def _choose(
    task: Task, questions: np.ndarray, nearest: list[np.ndarray], pool: int, settings: MiningConfig, found: Mined
) -> None:
    """Take the negatives of questions from their nearest candidates (see _nearest), of a pool of so many."""
    scores_Qk, passages_Qk, ranks_Qk = nearest
    asked, given, wanted = task.questions[questions], task.passages, settings.num_negatives
    ranked = (ranks_Qk > settings.range_min) & (ranks_Qk <= settings.range_max)
    fits = ranked & (scores_Qk <= settings.ceiling(found.positives[questions])[:, None])
    if settings.min_score is not None:
        fits &= scores_Qk >= settings.min_score
    lots = ranks_Qk.astype(np.uint64)
    if settings.sampling_strategy == "random":
        positive = given["key"][asked["positive"]]
        lots = _lots(key_of(settings.seed), asked["key"], positive, given["key"][passages_Qk])
    lots[~fits] = np.iinfo(np.uint64).max
    taken = np.argsort(lots, axis=1, kind="stable")[:, :wanted]
    taken = np.sort(np.where(np.take_along_axis(fits, taken, 1), taken, len(lots[0])), axis=1)  # nearest first
    of, nth = np.nonzero(taken < len(lots[0]))
    for array, values in ((found.passages, passages_Qk), (found.ranks, ranks_Qk), (found.scores, scores_Qk)):
        array[questions[of], nth] = values[of, taken[of, nth]]
    short = SMALL_POOL if pool < settings.range_min + wanted else OWN_CONTENT
    why = np.where(ranked.sum(1) >= wanted, TOO_CLOSE, short)
    found.why[questions] = np.where(fits.sum(1) >= wanted, ENOUGH, why)


@njit(cache=True, nogil=True)
def _dots(queries_Qd: np.ndarray, vectors_Md: np.ndarray, places_Qk: np.ndarray) -> np.ndarray:
    """Inner products of queries with the vectors at their places, (Q, k), summed in float64 in one fixed order."""
    out = np.empty(places_Qk.shape)
    for i in range(places_Qk.shape[0]):
        for j in range(places_Qk.shape[1]):
            vector, total = vectors_Md[places_Qk[i, j]], 0.0
            for c in range(len(vector)):
                total += np.float64(queries_Qd[i, c]) * np.float64(vector[c])
            out[i, j] = total
    return out


@njit(cache=True, nogil=True)
def _lots(seed: np.uint64, queries: np.ndarray, positives: np.ndarray, candidates_Qk: np.ndarray) -> np.ndarray:
    """A random number for each candidate of each query, (Q, k) uint64: a function of the seed and the texts' keys, so
    that neither the order of the data nor what else is in it matters.
    """
    out = np.empty(candidates_Qk.shape, np.uint64)
    for i in range(len(queries)):
        key = mix(mix(seed ^ queries[i]) ^ positives[i])
        for j in range(candidates_Qk.shape[1]):
            out[i, j] = mix(key ^ candidates_Qk[i, j])
    return out
