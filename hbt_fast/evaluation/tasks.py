"""Retrieval tasks: questions, one pool of candidates in all languages, and which candidates answer which question.

Their sources: `lareqa`, `beir` (also MIRACL, Mr. TyDi), `reranking`, `jsonl`, and here any iterable of `Row`.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from hbt_fast.data.rows import DataError, Row
from hbt_fast.data.tokenise import folded


@dataclass(frozen=True, eq=False)
class RetrievalTask:
    """Questions and candidates of all languages, with the relevant candidates of each question.

    Translations of one question have equal `query_ids` and the same relevant candidates: its answers in every language.

    Args:
        name: shown in reports.
        queries: N question texts.
        query_languages: N language codes.
        query_ids: N ids; parallel questions share one.
        candidates: M passage texts; their order decides ties (see `ranks`).
        candidate_languages: M language codes.
        offsets: (N + 1,) int64. The relevant candidates of query i are ``relevant[offsets[i]:offsets[i + 1]]``.
        relevant: (R,) int64 candidate indices, ascending and without repeats within a query.
        gains: (R,) float32 above 0, how relevant each is (graded relevance); None: all 1.
        candidate_ids: M ids; None: they have none.
        groups: name of a group of languages -> its query languages, over which macro averages are made too.
        pools: of a re-ranking task: offsets (N + 1,) int64 and candidates (P,) int64. Query i re-ranks
            ``pools[1][pools[0][i]:pools[0][i + 1]]``, which need not hold its relevant candidates.
        left_out: number of queries that the data have, but no relevant candidate for; those of other splits count.
        missing: number of judgements that the data have, but no candidate for.
        ignored: (N,) int64 the candidate that is left out of each query's ranking, as its own text; -1: none. None:
            nothing is, for any query.

    Raises:
        DataError: lengths that do not match, a query without a relevant candidate, an index outside the candidates, a
            gain that is not above 0, a group with a language that no query has.
    """

    name: str
    queries: list[str]
    query_languages: list[str]
    query_ids: list[str]
    candidates: list[str]
    candidate_languages: list[str]
    offsets: np.ndarray
    relevant: np.ndarray
    gains: np.ndarray | None = None
    candidate_ids: list[str] | None = None
    groups: dict[str, list[str]] = field(default_factory=dict)
    pools: tuple[np.ndarray, np.ndarray] | None = None
    left_out: int = 0
    missing: int = 0
    ignored: np.ndarray | None = None

    def __post_init__(self) -> None:
        n, m = len(self.queries), len(self.candidates)
        if n == 0 or m == 0:
            raise DataError(f"{self.name}: {n} queries and {m} candidates; at least one of each is needed")
        if len(self.query_languages) != n or len(self.query_ids) != n or len(self.candidate_languages) != m:
            raise DataError(
                f"{self.name}: {n} queries with {len(self.query_languages)} languages and {len(self.query_ids)} ids, "
                f"{m} candidates with {len(self.candidate_languages)} languages; one of each per text is needed"
            )
        offsets, relevant = self.offsets, self.relevant
        if offsets.shape != (n + 1,) or offsets[0] != 0 or offsets[-1] != len(relevant):
            raise DataError(f"{self.name}: offsets must run from 0 to len(relevant) = {len(relevant)} in {n + 1} steps")
        empty = np.flatnonzero(np.diff(offsets) < 1)
        if len(empty):
            raise DataError(f"{self.name}: query {self.query_ids[empty[0]]!r} has no relevant candidate")
        if relevant.min() < 0 or relevant.max() >= m:
            raise DataError(f"{self.name}: relevant candidates must lie in 0 .. {m - 1}")
        starts_query = np.zeros(len(relevant), dtype=bool)
        starts_query[offsets[:-1]] = True
        out_of_order = np.flatnonzero((np.diff(relevant) <= 0) & ~starts_query[1:])
        if len(out_of_order):
            query = int(np.searchsorted(offsets, out_of_order[0], side="right")) - 1
            raise DataError(
                f"{self.name}: the relevant candidates of query {self.query_ids[query]!r} repeat or do not ascend"
            )
        self._check_more()

    def _check_more(self) -> None:
        """What not every task has."""
        n, m = len(self.queries), len(self.candidates)
        if self.gains is not None and (self.gains.shape != self.relevant.shape or not (self.gains > 0).all()):
            raise DataError(f"{self.name}: gains must be above 0, one for each of the {len(self.relevant)} relevant")
        if self.candidate_ids is not None and len(self.candidate_ids) != m:
            raise DataError(f"{self.name}: {m} candidates but {len(self.candidate_ids)} candidate ids")
        if self.ignored is not None:
            self._check_ignored()
        for group, members in self.groups.items():
            unknown = sorted(set(members) - set(self.query_languages))
            if unknown or not members:
                have = ", ".join(sorted(set(self.query_languages)))
                raise DataError(
                    f"{self.name}: group {group!r}: no query is in {', '.join(unknown) or 'no language'}; "
                    f"the languages of the queries are {have}"
                )
        if self.pools is not None:
            offsets, members = self.pools
            if (
                offsets.shape != (n + 1,)
                or offsets[0] != 0
                or offsets[-1] != len(members)
                or (np.diff(offsets) < 0).any()
            ):
                raise DataError(f"{self.name}: the pools' offsets must run from 0 to {len(members)} in {n + 1} steps")
            if len(members) and (members.min() < 0 or members.max() >= m):
                raise DataError(f"{self.name}: the candidates of pools must lie in 0 .. {m - 1}")

    def _check_ignored(self) -> None:
        n, m = len(self.queries), len(self.candidates)
        if self.ignored.shape != (n,):
            raise DataError(f"{self.name}: {n} queries but ignored of shape {self.ignored.shape}")
        if self.ignored.min() < -1 or self.ignored.max() >= m:
            raise DataError(f"{self.name}: ignored candidates must lie in 0 .. {m - 1}, or be -1")
        query = np.repeat(np.arange(n), np.diff(self.offsets))
        both = query[self.relevant == self.ignored[query]]
        if len(both):
            key = self.query_ids[both[0]]
            raise DataError(f"{self.name}: query {key!r} is to ignore a candidate that is relevant to it")

    def subset(self, queries: int, seed: int, candidates: int | None = None) -> RetrievalTask:
        """A smaller task of the same kind, for an evaluation that must be quick; equal arguments give equal tasks.

        Args:
            queries: query ids to keep, drawn at random; parallel questions share one, so each stays in all languages.
            seed: of the draw.
            candidates: to keep about so many: all that are relevant to the queries, or in their pools, and others drawn
                at random. With fewer candidates every measure rises. None: all. With pools, those in them alone: no
                other is ever ranked.

        Raises:
            DataError: less than one query.
        """
        if queries < 1:
            raise DataError(f"{self.name}: a subset of {queries} queries; at least 1 is needed")
        rng = np.random.default_rng(seed)
        ids = sorted(set(self.query_ids))
        drawn = {ids[i] for i in rng.permutation(len(ids))[:queries]}
        rows = np.array([i for i, key in enumerate(self.query_ids) if key in drawn])
        offsets, places = _kept(self.offsets, rows)
        needed = np.zeros(len(self.candidates), bool)
        needed[self.relevant[places]] = True
        pools = None
        if self.pools is not None:
            pool_offsets, pool_places = _kept(self.pools[0], rows)
            pools = pool_offsets, self.pools[1][pool_places]
            needed[pools[1]] = True
        elif candidates is None:
            needed[:] = True
        else:
            others = rng.permutation(np.flatnonzero(~needed))
            needed[others[: max(0, candidates - int(needed.sum()))]] = True
        kept = np.flatnonzero(needed)
        place = np.cumsum(needed) - 1
        ignored = None if self.ignored is None else self.ignored[rows]
        languages = [self.query_languages[i] for i in rows]
        groups = {group: [code for code in members if code in set(languages)] for group, members in self.groups.items()}
        return RetrievalTask(
            f"{self.name}, {len(drawn):,} of {len(ids):,} questions",
            [self.queries[i] for i in rows],
            languages,
            [self.query_ids[i] for i in rows],
            [self.candidates[i] for i in kept],
            [self.candidate_languages[i] for i in kept],
            offsets,
            place[self.relevant[places]],
            gains=None if self.gains is None else self.gains[places],
            candidate_ids=None if self.candidate_ids is None else [self.candidate_ids[i] for i in kept],
            groups={group: members for group, members in groups.items() if members},
            pools=None if pools is None else (pools[0], place[pools[1]]),
            ignored=None if ignored is None else np.where((ignored >= 0) & needed[ignored], place[ignored], -1),
        )

    @property
    def languages(self) -> list[str]:
        """Languages of queries and candidates, sorted: the rows and columns of every table."""
        return sorted(set(self.query_languages) | set(self.candidate_languages))


def task_from_rows(name: str, rows: Iterable[Row]) -> RetrievalTask:
    """A task from n-way rows, for instance a held-out part of the training data.

    Every (row, language) with a query becomes a query. Candidates are the passages, one per (language, content, text)
    so that questions on one passage share a candidate; rows without a content id share candidates of equal text.
    Relevant are the passages of the query's own row, in every language that has one. Rows of which a query has equal
    text (as folded in training) in one language are one question: the passages of each are relevant to all their
    queries, and a query that is there twice is taken once. Hard negatives are not used.

    Raises:
        DataError: no rows, or a row without passages or with an empty text (named by its `where`).
    """
    queries, query_languages, query_ids, found, owns = [], [], [], [], []
    index: dict[tuple[str, str | None, str], int] = {}
    rows = list(rows)
    asked = [[(language, folded(text)) for language, text in row.queries.items()] for row in rows]
    groups, seen = united(asked), set()
    for number, row in enumerate(rows):
        where = row.where or f"row {number}"
        if not row.passages:
            raise DataError(f"{where}: no passage, so nothing can be relevant to its query")
        for language, text in (*row.queries.items(), *row.passages.items()):
            refuse_empty(text, language, where)
        owns.append({index.setdefault((lang, row.content, text), len(index)) for lang, text in row.passages.items()})
        for (language, text), key in zip(row.queries.items(), asked[number], strict=True):
            if key not in seen:
                seen.add(key)
                queries.append(text)
                query_languages.append(language)
                query_ids.append(str(number))
                found.append(groups[number])
    relevant: list[set[int]] = [set() for _ in rows]
    for group, own in zip(groups, owns, strict=True):
        relevant[group] |= own
    if not queries:
        raise DataError(f"{name}: no row has a query")
    return RetrievalTask(
        name,
        queries,
        query_languages,
        query_ids,
        [key[2] for key in index],
        [key[0] for key in index],
        *offsets_and_members([relevant[group] for group in found]),
    )


def united(keys: Sequence[Iterable[Hashable]]) -> list[int]:
    """The group of each item: items that share a key are one group, transitively, called by its first item.

    Args:
        keys: of each item.
    """
    groups, first = list(range(len(keys))), {}

    def root(item: int) -> int:
        while groups[item] != item:
            groups[item] = groups[groups[item]]
            item = groups[item]
        return item

    for item, own in enumerate(keys):
        for key in own:
            a, b = root(first.setdefault(key, item)), root(item)
            groups[max(a, b)] = min(a, b)
    return [root(item) for item in range(len(keys))]


def refuse_empty(text: str, language: str, where: str) -> None:
    """See that a text is one, as training does: an empty one would be found by its place among equal vectors.

    Args:
        text: of a query or a passage.
        language: of the text.
        where: "file:line".

    Raises:
        DataError: there is nothing in it.
    """
    if not text.strip():
        raise DataError(f"{where}: empty text ({language}); write it, or leave it out")


def _kept(offsets: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Offsets of some rows alone, and the places of their members."""
    sizes = np.diff(offsets)[rows]
    starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    return starts, np.repeat(offsets[rows] - starts[:-1], sizes) + np.arange(starts[-1])


def offsets_and_members(lists: Sequence[Collection[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Lists of numbers as two arrays, for `RetrievalTask`.

    Args:
        lists: n of them.

    Returns:
        (n + 1,) int64, where each begins and the last ends, and all their numbers, int64, sorted within each.
    """
    offsets = np.zeros(len(lists) + 1, dtype=np.int64)
    np.cumsum([len(part) for part in lists], out=offsets[1:])
    return offsets, np.fromiter((i for part in lists for i in sorted(part)), dtype=np.int64, count=offsets[-1])
