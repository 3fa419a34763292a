"""The batch plan: a pure function of (seed, step) that says which rows, in which languages, make up a global batch.

A *stratum* is a kind of batch with everything it may be drawn from: a monolingual batch of one language from one
source, or a cross-lingual (or mixed-monolingual) batch from one source. A batch has one stratum: its negatives are of
one kind, so that neither language nor source gives the answer away. `KroneckerSchedule` gives each step its stratum
and the number n of earlier batches of it; the batch is then the n-th slice of the stratum's epoch, a keyed permutation
of its *contents* (not rows: two rows of one content would be each other's false negatives). Each content contributes
one of its rows, rotating from epoch to epoch, and the row its languages, drawn uniformly from the pairs it has.

From this follow, for every step and without any state:
- no two rows of a global batch share a content id;
- within an epoch of a stratum no content, and so no row, comes twice (its last, incomplete batch is left out; a new
  epoch permutes anew, so that each time others are left out);
- any rank at any world size computes the same global batch, in time proportional to the batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numba import njit

from hbt_fast.data.draws import KroneckerSchedule, below, key_of, permute
from hbt_fast.data.rows import DataError
from hbt_fast.data.store import Store

Kind = Literal["mono", "mixed-mono", "cross"]
Strategy = Literal["mono", "mixed-mono", "cross", "hybrid"]
KINDS: tuple[Kind, ...] = ("mono", "mixed-mono", "cross")
MONO, MIXED, CROSS = range(3)


@dataclass(frozen=True)
class BatchPlan:
    """One global batch of N pairs, and H extra passages (hard negatives).

    Attributes:
        step: the step it belongs to.
        kind: "mono", "mixed-mono" or "cross".
        source: the name of the source.
        rows: (N,) int64 row numbers of the store.
        query_languages, passage_languages: (N,) int32 language numbers.
        queries: (N,) int64 text numbers.
        passages: (N,) int64 text numbers of the positives.
        contents: (N,) int64 content ids, all different.
        negatives: (H,) int64 text numbers of hard negatives.
        negative_contents: (H,) int64 their content ids.
        negative_rows: (H,) int64 position in the batch of the query each was drawn for.
    """

    step: int
    kind: Kind
    source: str
    rows: np.ndarray
    query_languages: np.ndarray
    passage_languages: np.ndarray
    queries: np.ndarray
    passages: np.ndarray
    contents: np.ndarray
    negatives: np.ndarray
    negative_contents: np.ndarray
    negative_rows: np.ndarray

    def shard(self, rank: int, world: int) -> tuple[slice, np.ndarray]:
        """The rows of one rank (contiguous, sizes differ by at most one) and the hard negatives that go with them."""
        size = len(self.rows)
        mine = slice(size * rank // world, size * (rank + 1) // world)
        return mine, np.flatnonzero((self.negative_rows >= mine.start) & (self.negative_rows < mine.stop))


@dataclass(frozen=True)
class Stratum:
    """What the batches of one kind, source and (for mono) language are drawn from.

    Attributes:
        kind: index into KINDS.
        source, language: numbers of the store; language is -1 unless the kind is mono.
        rows: (R,) int64 eligible rows, those of one content next to each other.
        content_offsets: (C + 1,) int64 the rows of the stratum's c-th content.
        weight: its share of the steps (not normalised).
    """

    kind: int
    source: int
    language: int
    rows: np.ndarray
    content_offsets: np.ndarray
    weight: float

    @property
    def contents(self) -> int:
        """Number of different contents: how many pairs an epoch of this stratum has."""
        return len(self.content_offsets) - 1


class BatchPlanner:
    """Plans the global batches of a training run.

    Args:
        store: the token store.
        batch_size: pairs per global batch (all ranks together).
        strategy: "mono" (X-X-mono of LAReQA, arXiv 2004.05484: the whole batch in one language), "mixed-mono" (X-X:
            query and passage in one language, which differs from row to row), "cross" (X-Y: query and passage in
            different languages) or "hybrid" (arXiv 2408.10536: mono with share alpha, else cross).
        alpha: share of monolingual batches of the hybrid strategy.
        language_gamma: languages of monolingual batches are drawn with weight size ** gamma (0: equally).
        source_gamma: the same for sources that have no weight of their own.
        hard_negatives: how many of its own hard negatives each row brings along at most.
        seed: everything is a function of it and the step.

    Raises:
        DataError: the data cannot serve the strategy, or a stratum has fewer contents than a batch.
    """

    def __init__(
        self,
        store: Store,
        batch_size: int,
        *,
        strategy: Strategy = "hybrid",
        alpha: float = 0.5,
        language_gamma: float = 0.0,
        source_gamma: float = 0.5,
        hard_negatives: int = 0,
        seed: int = 0,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch.size must be at least 1, got {batch_size}")
        if not 0 <= alpha <= 1:
            raise ValueError(f"batch.alpha is a share between 0 and 1, got {alpha}")
        self.store, self.batch_size, self.seed, self.hard_negatives = store, batch_size, seed, hard_negatives
        self.identity = {
            "store": store.folder.name,
            "batch_size": batch_size,
            "strategy": strategy,
            "alpha": alpha,
            "language_gamma": language_gamma,
            "source_gamma": source_gamma,
            "hard_negatives": hard_negatives,
            "seed": seed,
        }  # two planners with equal identity plan equal batches
        shares = {"mono": {MONO: 1.0}, "mixed-mono": {MIXED: 1.0}, "cross": {CROSS: 1.0}}
        shares["hybrid"] = {MONO: alpha, CROSS: 1.0 - alpha}
        self.strata: list[Stratum] = []
        for kind, share in shares[strategy].items():
            if share:
                self.strata += _weighted(_strata(store, kind), share, store.weights, language_gamma, source_gamma)
        self._check()
        self.schedule = KroneckerSchedule([s.weight for s in self.strata], seed)

    def plan(self, step: int) -> BatchPlan:
        """The global batch of a step (steps count from 0)."""
        store, number = self.store, self.schedule.stratum(step)
        stratum = self.strata[number]
        epoch, position = divmod(self.schedule.visits(number, step), stratum.contents // self.batch_size)
        drawn = _draw(
            stratum.kind,
            stratum.language,
            stratum.rows,
            stratum.content_offsets,
            store.field_offsets,
            store.field_languages,
            store.field_queries,
            store.field_passages,
            store.field_mono,
            position * self.batch_size,
            self.batch_size,
            epoch,
            key_of(self.seed, 1, number),
        )
        rows, query_languages, passage_languages, queries, passages = drawn
        contents = np.asarray(store.row_contents[rows])
        negatives, negative_rows = self._negatives(step, rows, passage_languages)
        return BatchPlan(
            step=step,
            kind=KINDS[stratum.kind],
            source=store.sources[stratum.source],
            rows=rows,
            query_languages=query_languages,
            passage_languages=passage_languages,
            queries=queries,
            passages=passages,
            contents=contents,
            negatives=negatives,
            negative_contents=np.asarray(store.text_contents[negatives]),
            negative_rows=negative_rows,
        )

    def _negatives(self, step: int, rows: np.ndarray, languages: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if not self.hard_negatives:
            return np.empty(0, np.int64), np.empty(0, np.int64)
        store = self.store
        return _draw_negatives(
            rows,
            languages,
            store.negative_offsets,
            store.negative_languages,
            store.negative_texts,
            self.hard_negatives,
            key_of(self.seed, 2, step),
        )

    def _check(self) -> None:
        small = [s for s in self.strata if s.contents < self.batch_size]
        if small:
            names = "; ".join(f"{self.name(s)}: {s.contents:,}" for s in small)
            raise DataError(
                f"batch.size is {self.batch_size:,}, but these have fewer different contents than that: {names}. "
                "Lower batch.size, drop the source or language, or give it more data (a batch has one source, and no "
                "two of its rows share a content)"
            )

    def name(self, stratum: Stratum) -> str:
        """A stratum in words, as "mono de squad"."""
        language = [self.store.languages[stratum.language]] if stratum.kind == MONO else []
        return " ".join([KINDS[stratum.kind], *language, self.store.sources[stratum.source]])


def _strata(store: Store, kind: int) -> list[Stratum]:
    """The strata of one kind, each with all its eligible rows sorted by content."""
    fields = np.diff(store.field_offsets)
    row_of_field = np.repeat(np.arange(store.rows), fields)
    if kind == CROSS:
        # the row has a query and a passage in different languages: not only one language that has both
        has_query, has_passage = store.field_queries >= 0, store.field_passages >= 0
        queries = np.bincount(row_of_field[has_query], minlength=store.rows)
        passages = np.bincount(row_of_field[has_passage], minlength=store.rows)
        both = np.bincount(row_of_field[has_query & has_passage], minlength=store.rows)
        eligible = queries * passages > both
        candidates = [(-1, np.flatnonzero(eligible))]
    elif kind == MIXED:
        candidates = [(-1, np.unique(row_of_field[store.field_mono]))]
    else:
        mono, language = store.field_mono, store.field_languages
        candidates = [(n, row_of_field[mono & (language == n)]) for n in range(len(store.languages))]
    strata = []
    for language, rows in candidates:
        for source in np.unique(store.row_sources[rows]):
            chosen = rows[store.row_sources[rows] == source]
            contents = store.row_contents[chosen]
            order = np.argsort(contents, kind="stable")
            starts = np.flatnonzero(np.diff(contents[order], prepend=-1))
            offsets = np.append(starts, len(chosen)).astype(np.int64)
            strata.append(Stratum(kind, int(source), language, chosen[order], offsets, 0.0))
    if not strata:
        raise DataError(
            {
                MONO: "no row has query and passage in one language, which monolingual batches need",
                MIXED: "no row has query and passage in one language, which mixed-mono batches need",
                CROSS: "no row has query and passage in different languages, which cross-lingual batches need",
            }[kind]
            + "; choose another batch.strategy or add a source that has such pairs"
        )
    return strata


def _weighted(
    strata: list[Stratum], share: float, weights: tuple[float | None, ...], language_gamma: float, source_gamma: float
) -> list[Stratum]:
    """Share out a kind's steps: first among languages, then within each among its sources."""
    languages: dict[int, list[Stratum]] = {}
    for stratum in strata:
        languages.setdefault(stratum.language, []).append(stratum)
    language_weights = {n: sum(s.contents for s in group) ** language_gamma for n, group in languages.items()}
    total = sum(language_weights.values())
    result = []
    for language, group in languages.items():
        own = [weights[s.source] for s in group]
        within = [s.contents**source_gamma if w is None else w for s, w in zip(group, own, strict=True)]
        if not sum(within):  # every source of this language is switched off by weight 0
            continue
        part = share * language_weights[language] / total
        for stratum, weight in zip(group, within, strict=True):
            if weight:
                fields = stratum.kind, stratum.source, stratum.language, stratum.rows, stratum.content_offsets
                result.append(Stratum(*fields, part * weight / sum(within)))
    return result


@njit(cache=True)
def _draw(
    kind: int,
    language: int,
    rows: np.ndarray,
    content_offsets: np.ndarray,
    field_offsets: np.ndarray,
    field_languages: np.ndarray,
    field_queries: np.ndarray,
    field_passages: np.ndarray,
    field_mono: np.ndarray,
    position: int,
    size: int,
    epoch: int,
    key: np.uint64,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Rows, languages and texts of one batch; see the module's docstring."""
    contents = len(content_offsets) - 1
    out_rows = np.empty(size, np.int64)
    query_languages, passage_languages = np.empty(size, np.int32), np.empty(size, np.int32)
    queries, passages = np.empty(size, np.int64), np.empty(size, np.int64)
    epoch_key = key ^ np.uint64(epoch) * np.uint64(0x9E3779B97F4A7C15)
    for i in range(size):
        content = permute(position + i, contents, epoch_key)
        first, last = content_offsets[content], content_offsets[content + 1]
        row = rows[first + (below(key, content, last - first) + epoch) % (last - first)]
        begin, end = field_offsets[row], field_offsets[row + 1]
        counter = content * 4096
        while True:  # draw fields uniformly until they fit the kind; an eligible row has a fitting pair
            counter += 1
            q = begin + below(epoch_key, 2 * counter, end - begin)
            p = begin + below(epoch_key, 2 * counter + 1, end - begin) if kind == 2 else q
            if kind == 2:
                fits = field_queries[q] >= 0 and field_passages[p] >= 0 and field_languages[q] != field_languages[p]
            else:
                fits = field_mono[q] and (kind == 1 or field_languages[q] == language)
            if fits:
                break
        out_rows[i] = row
        query_languages[i], passage_languages[i] = field_languages[q], field_languages[p]
        queries[i], passages[i] = field_queries[q], field_passages[p]
    return out_rows, query_languages, passage_languages, queries, passages


@njit(cache=True)
def _draw_negatives(
    rows: np.ndarray,
    languages: np.ndarray,
    offsets: np.ndarray,
    negative_languages: np.ndarray,
    texts: np.ndarray,
    most: int,
    key: np.uint64,
) -> tuple[np.ndarray, np.ndarray]:
    """Up to `most` different hard negatives per row, in the language of its passage where there are such."""
    chosen, owner = [np.int64(0) for _ in range(0)], [np.int64(0) for _ in range(0)]
    for i in range(len(rows)):
        begin, end = offsets[rows[i]], offsets[rows[i] + 1]
        matching = [n for n in range(begin, end) if negative_languages[n] == languages[i]]
        for k in range(min(most, len(matching))):  # the first steps of a Fisher-Yates shuffle
            j = k + below(key, i * 4096 + k, len(matching) - k)
            matching[k], matching[j] = matching[j], matching[k]
            chosen.append(texts[matching[k]])
            owner.append(i)
    return np.array(chosen, dtype=np.int64), np.array(owner, dtype=np.int64)
