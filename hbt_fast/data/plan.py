"""The batch plan: a pure function of (seed, step) that says which rows, in which languages, make up a global batch.

A batch is drawn from one *stratum* (`hbt_fast.data.strata`): one kind, one source and, for monolingual batches, one
language. Its negatives are of one sort, so that neither language nor source gives the answer away. Two
`KroneckerSchedule`s decide: the first which kind a step has, the second which stratum of that kind; both also count the
earlier visits. The n-th batch of a stratum is the n-th slice of its epoch, a keyed permutation of its *contents* (not
rows: two rows of one content would be each other's false negatives). Each content contributes one of its rows, rotating
from epoch to epoch, and the row its languages, drawn from the pairs it has.

From this follow, for every step and without any state:
- no two rows of a global batch share a content id, so none has another's positive, nor a translation of it;
- a passage of the batch that answers another row's query too, be it in a row that is not in the batch, has the passage
  id of that row's own: the loss takes neither for a negative of the other's query;
- within an epoch of a stratum no content, and so no row, comes twice (its last, incomplete batch is left out; a new
  epoch permutes anew, so that each time others are left out);
- any rank at any world size computes the same global batch, in time proportional to the batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numba import njit

from hbt_fast.data.answers import Answers, among, new, unite_answers
from hbt_fast.data.draws import ODD, KroneckerSchedule, below, draw, key_of, permute, scale
from hbt_fast.data.rows import DataError
from hbt_fast.data.shares import (
    BatchConfig,
    check_settings,
    kind_schedule,
    kinds_of,
    language_weights,
    nothing_for,
    shares_of,
)
from hbt_fast.data.store import Store, span
from hbt_fast.data.strata import (
    ANY,
    CROSS,
    KINDS,
    Fields,
    Kind,
    Stratum,
    Wanted,
    fields_of,
    of_field,
    strata_of,
    unmap,
)

RESIDENT = 1 << 28  # where the arrays of a plan have more bytes, their pages are unmapped ...
MAPPED = 1 << 15  # ... after so many pairs


@dataclass(frozen=True)
class BatchPlan:
    """One global batch of N pairs, and H extra passages (hard negatives), all of one source.

    Attributes:
        step: the step it belongs to.
        kind: "mono", "mixed-mono" or "cross".
        source: number of the store's source, whose rows and texts the numbers below are.
        rows: (N,) int64 row numbers.
        query_languages, passage_languages: (N,) int32 the store's language numbers.
        queries: (N,) int64 text numbers.
        passages: (N,) int64 text numbers of the positives.
        contents: (N,) int64 content ids, all different.
        negatives: (H,) int64 text numbers of hard negatives.
        negative_contents: (H,) int64 their content ids, all different, none among `contents`.
        negative_rows: (H,) int64 position in the batch of the row each was drawn for, rising; its language is that of
            the row's passage.
        excluded: how many hard negatives were passed over because the batch had their content already, or because they
            answer their row's query elsewhere.
        passage_ids: (N + H,) int64 of the passages, then the hard negatives, for the loss: their content ids, but one
            id where a passage answers the other's query too.
    """

    step: int
    kind: Kind
    source: int
    rows: np.ndarray
    query_languages: np.ndarray
    passage_languages: np.ndarray
    queries: np.ndarray
    passages: np.ndarray
    contents: np.ndarray
    negatives: np.ndarray
    negative_contents: np.ndarray
    negative_rows: np.ndarray
    excluded: int
    passage_ids: np.ndarray


class BatchPlanner:
    """Plans the global batches of a training run.

    Args:
        store: the token store.
        batch: the settings.
        seed: everything is a function of it and the step.
        steps: of the run; needed where alpha changes.

    Attributes:
        strata: what batches are drawn from.
        shares: per stratum, its share of the steps of its kind.
        hard_negatives: per source, how many a pair has at most.

    Raises:
        DataError: the data cannot serve the strategy, a stratum has fewer contents than a batch, or a setting is out
            of range.
    """

    def __init__(self, store: Store, batch: BatchConfig, *, seed: int = 0, steps: int | None = None) -> None:
        check_settings(batch, steps)
        self.store, self.batch, self.seed, self.steps = store, batch, seed, steps
        weights = language_weights(batch, store)
        self.strata: list[Stratum] = []
        self.shares: list[float] = []
        self.firsts, kinds = [], kinds_of(batch)  # the number of each kind's first stratum
        self.within: list[KroneckerSchedule] = []
        for kind in kinds:
            found = strata_of(store, kind, weights, pairs_apart=batch.cross_pairs == "one")
            if not found:
                raise DataError(nothing_for(kind))
            shares = shares_of(found, batch, store)
            found = [s for s, share in zip(found, shares, strict=True) if share]
            shares = [share for share in shares if share]
            self.firsts.append(len(self.strata))
            self.strata += found
            self.shares += shares
            self.within.append(KroneckerSchedule(shares, int(key_of(seed, kind) >> np.uint64(1))))
        self._check_sizes()
        self.kinds = kind_schedule(kinds, batch, seed, steps)
        uniform = len(set(weights.tolist())) == 1
        scaled = weights / weights.max()
        self.weights = [np.empty(0) if uniform else scaled[numbers] for numbers in store.language_numbers]
        self.planned = 0
        self.fields = [fields_of(source) for source in store.sources]
        own = store.hard_negatives or (None,) * len(store.sources)
        self.hard_negatives = [batch.hard_negatives if number is None else number for number in own]
        self.answers = [Answers(source.row_answers, source.answers) for source in store.sources]

    def stratum(self, step: int) -> tuple[int, int]:
        """The number of a step's stratum, and how many earlier steps had it."""
        kind = self.kinds.part(step)
        n = self.kinds.visits(kind, step)
        part = self.within[kind].part(n)
        return self.firsts[kind] + part, self.within[kind].visits(part, n)

    def visits(self, stratum: int, step: int) -> int:
        """How many of the steps before `step` have the stratum."""
        kind = max(k for k, first in enumerate(self.firsts) if first <= stratum)
        return self.within[kind].visits(stratum - self.firsts[kind], self.kinds.visits(kind, step))

    def plan(self, step: int) -> BatchPlan:
        """The global batch of a step (steps count from 0)."""
        number, visits = self.stratum(step)
        stratum, size = self.strata[number], self.batch.size
        source, fields = self.store.sources[stratum.source], self.fields[stratum.source]
        answers = self.answers[stratum.source]
        epoch, position = divmod(visits, stratum.contents // size)
        rows, contents, a, b, queries, passages = _draw(
            fields,
            stratum.wanted,
            stratum.rows,
            stratum.content_offsets,
            stratum.contents,
            stratum.contents == source.contents,
            self.weights[stratum.source],
            position * size,
            size,
            epoch,
            key_of(self.seed, 1, number),
        )
        negatives = _draw_negatives(
            rows,
            contents,
            b,
            source.negative_offsets,
            source.negative_languages,
            source.negative_texts,
            source.negative_contents,
            answers,
            self.hard_negatives[stratum.source],
            key_of(self.seed, 2, step),
        )
        passage_ids = np.concatenate([contents, negatives[1]])
        if len(answers.rows):
            unite_answers(rows, passage_ids, answers)
        self.planned += size
        if self.planned >= MAPPED:  # a pair touches several pages, which would all stay resident
            self.planned = 0
            arrays = (*fields, stratum.rows, stratum.content_offsets, source.negative_texts, source.negative_contents,
                      *answers)  # fmt: skip
            if sum(array.nbytes for array in arrays) > RESIDENT:
                unmap(arrays)
        numbers = self.store.language_numbers[stratum.source]
        kind = KINDS[stratum.wanted.kind]
        pairs = (rows, numbers[a], numbers[b], queries, passages, contents)
        return BatchPlan(step, kind, stratum.source, *pairs, *negatives, passage_ids)

    def _check_sizes(self) -> None:
        small = [(n, s.contents) for n, s in enumerate(self.strata) if s.contents < self.batch.size]
        if small:
            names = "; ".join(f"{self.name(n)}: {contents:,}" for n, contents in small[:8])
            more = f" and {len(small) - 8} more" if len(small) > 8 else ""
            one = ", set batch.cross_pairs to mixed" if self.batch.cross_pairs == "one" else ""
            raise DataError(
                f"batch.size is {self.batch.size:,}, but these have fewer different contents than that: {names}{more}. "
                f"Lower batch.size{one}, drop the source or language (batch.language_weights, data.languages), give it "
                "more data, or give several sources one name: a batch has one source, and no two of its rows share a "
                "content"
            )

    def name(self, number: int) -> str:
        """A stratum in words, as "mono de squad" or "cross de-en ntrex"."""
        stratum = self.strata[number]
        source, (kind, a, b, _) = self.store.sources[stratum.source], stratum.wanted
        codes = (
            [] if a == ANY else [source.languages[a]] if a == b else [f"{source.languages[a]}-{source.languages[b]}"]
        )
        return " ".join([KINDS[kind], *codes, source.name])


@njit(cache=True, nogil=True)
def _draw(
    fields: Fields,
    wanted: Wanted,
    rows: np.ndarray,
    content_offsets: np.ndarray,
    contents: int,
    whole: bool,
    weights: np.ndarray,
    position: int,
    size: int,
    epoch: int,
    key: np.uint64,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Rows, contents, languages (of the source) and texts of one batch; see the module's docstring."""
    out_rows, out_contents = np.empty(size, np.int64), np.empty(size, np.int64)
    query_languages, passage_languages = np.empty(size, np.int32), np.empty(size, np.int32)
    queries, passages = np.empty(size, np.int64), np.empty(size, np.int64)
    begins, ends = np.empty(size, np.int64), np.empty(size, np.int64)
    epoch_key = key ^ np.uint64(epoch) * ODD
    # several short loops: the cache misses of one do not wait for each other
    for i in range(size):
        out_contents[i] = permute(position + i, contents, epoch_key)
    for i in range(size):
        begins[i], ends[i] = span(content_offsets, out_contents[i])
    for i in range(size):
        count = ends[i] - begins[i]
        out_rows[i] = begins[i] + ((below(key, out_contents[i], count) + epoch) % count if count > 1 else 0)
    if len(rows):
        for i in range(size):
            out_rows[i] = rows[out_rows[i]]
    for i in range(size):
        begins[i], ends[i] = span(fields.offsets, out_rows[i])
    if not whole:  # else the stratum counts contents as the source does
        for i in range(size):
            out_contents[i] = fields.contents[out_rows[i]] if len(fields.contents) else out_rows[i]
    # arrays of the tuples under names of their own: Numba counts references at every use of a tuple's
    languages, mono, query_texts, passage_texts = fields.languages, fields.mono, fields.queries, fields.passages
    kind, language, other, _ = wanted
    q_field, p_field = np.empty(size, np.int64), np.empty(size, np.int64)
    alike = len(fields.offsets) == 1 and len(languages) <= fields.offsets[0]  # what is a language's place in one row
    places = _places(languages, begins[0], ends[0] if alike else begins[0], language, other)  # is it in every row
    pending, left, counter = np.arange(size), size, 0
    while left:
        for k in range(left):
            i = pending[k]
            q_field[i], p_field[i] = begins[i] + places[0], begins[i] + places[1]
            if language == ANY:
                q_field[i], p_field[i] = _propose(begins[i], ends[i], kind == CROSS, epoch_key, counter)
            elif not alike:
                q, p = _places(languages, begins[i], ends[i], language, other)
                q_field[i], p_field[i] = begins[i] + q, begins[i] + p
        for k in range(left):
            i = pending[k]
            q, p = q_field[i], p_field[i]
            queries[i], passages[i] = query_texts[q], passage_texts[p]
            query_languages[i] = of_field(languages, q, begins[i])
            passage_languages[i] = of_field(languages, p, begins[i])
        if language != ANY:
            break
        rejected = 0
        for k in range(left):
            i = pending[k]
            x, y = query_languages[i], passage_languages[i]
            good = queries[i] >= 0 and passages[i] >= 0 if kind == CROSS else of_field(mono, q_field[i], begins[i])
            if good and len(weights):
                weight = weights[x] if x == y else weights[x] * weights[y]
                good = (draw(epoch_key, begins[i] * 4096 + counter + 1) >> np.uint64(11)) * 2.0**-53 < weight
            if not good:
                pending[rejected] = i
                rejected += 1
        left, counter = rejected, counter + 2
    return out_rows, out_contents, query_languages, passage_languages, queries, passages


@njit(cache=True, nogil=True, forceinline=True)
def _propose(begin: int, end: int, cross: bool, key: np.uint64, counter: int) -> tuple[int, int]:
    """Two fields, for the query and the passage, of the row with fields begin:end."""
    word = draw(key, begin * 4096 + counter)
    q = p = begin + scale(word >> np.uint64(32), end - begin)
    if cross:  # one of the other fields
        p = begin + scale(word & np.uint64(0xFFFFFFFF), end - begin - 1)
        p += p >= q
    return q, p


@njit(cache=True, nogil=True)
def _places(languages: np.ndarray, begin: int, end: int, language: int, other: int) -> tuple[int, int]:
    """The places of two languages among the fields of a row, which has them."""
    q = p = 0
    for field in range(begin, end):
        found = of_field(languages, field, begin)
        q = field - begin if found == language else q
        p = field - begin if found == other else p
    return q, p


@njit(cache=True, nogil=True)
def _draw_negatives(
    rows: np.ndarray,
    contents: np.ndarray,
    languages: np.ndarray,
    offsets: np.ndarray,
    negative_languages: np.ndarray,
    texts: np.ndarray,
    negative_contents: np.ndarray,
    answers: Answers,
    most: int,
    key: np.uint64,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Up to `most` hard negatives per row, in the language of its passage, of contents the batch does not have yet and
    that do not answer its query.
    """
    chosen, owner, excluded = np.empty(len(rows) * most, np.int64), np.empty(len(rows) * most, np.int64), 0
    total = 0
    if not most or (len(offsets) == 1 and offsets[0] == 0):
        return chosen[:0], chosen[:0], owner[:0], excluded
    mask = 1
    while mask < 2 * len(rows) * (1 + most):
        mask *= 2
    seen = np.full(mask, -1)  # the contents of the batch, hashed
    mask -= 1
    for content in contents:
        new(seen, mask, content)
    row_answers, lists = answers.rows, answers.lists
    matching = np.empty(64, np.int64)
    for i in range(len(rows)):
        right = row_answers[rows[i]] if len(row_answers) else -1
        begin, end = span(offsets, rows[i])
        if end - begin > len(matching):
            matching = np.empty(2 * (end - begin), np.int64)
        count = 0
        for n in range(begin, end):
            if negative_languages[n] == languages[i]:
                matching[count] = n
                count += 1
        taken = 0
        for k in range(count):  # a Fisher-Yates shuffle, as far as needed
            if taken == most:
                break
            j = k + below(key, i * 4096 + k, count - k)
            matching[k], matching[j] = matching[j], matching[k]
            content = negative_contents[matching[k]]
            wrong = right < 0 or not among(lists, right + 1, lists[right], content)
            if wrong and new(seen, mask, content):
                chosen[total], owner[total] = matching[k], i
                total += 1
                taken += 1
            else:
                excluded += 1
    found = chosen[:total]
    return texts[found], negative_contents[found], owner[:total], excluded
