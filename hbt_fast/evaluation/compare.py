"""Are two runs different, or is it chance? Paired intervals and tests over the questions that both were asked.

Translations of one question are not independent: a question that is hard is hard in every language. Questions are
what is drawn, each with its queries in all its languages: a cluster bootstrap for the intervals (Efron 1979; in
evaluation, Koehn 2004) and a randomisation test for differences (Fisher 1935; the one that Smucker, Allan and
Carterette 2007 recommend for retrieval). Every resample is averaged as the headline figures are: the mean over
languages of the mean over queries. Several comparisons within a measure are corrected after Holm (1979).

Shapes: M measures, R runs, N queries, C questions (clusters), L languages, B resamples. Axis G is "all languages, then
each group of languages, then each language"; its means over languages, all and groups, are K.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from hbt_fast.base.errors import UserError
from hbt_fast.evaluation.queries import PerQuery
from hbt_fast.evaluation.resampling import Block, blocks_of, bootstrap, holm, means_of, randomisation, totals

FINE = 1000  # exchanges for every p-value that is corrected together, so that even after Holm 0.001 can be reached,
MOST = 200_000_000  # while exchanges times questions are no more
CONSTANT = ("pool share",)  # of the task, not of a run


class CompareError(UserError):
    """Runs that cannot be compared. The message says which, and what differs."""


@dataclass(frozen=True, eq=False)
class Measured:
    """One measure of every run. Differences are to the first run.

    Attributes:
        values: (R, G) float64; NaN where a language has no such query.
        intervals: (R, G, 2) lower and upper ends.
        differences: (R - 1, G).
        difference_intervals: (R - 1, G, 2).
        p: (R - 1, G) two-sided.
        p_holm: the same, corrected over the runs (first column), over runs and groups, and over runs and languages.
    """

    values: np.ndarray
    intervals: np.ndarray
    differences: np.ndarray
    difference_intervals: np.ndarray
    p: np.ndarray
    p_holm: np.ndarray


@dataclass(frozen=True, eq=False)
class Comparison:
    """What was compared, and what came of it.

    Attributes:
        task: name of the task.
        names: R, of the runs.
        languages: L codes of queries, sorted.
        queries: N.
        questions: C, that are resampled.
        resamples: B, of the bootstrap.
        exchanges: of the randomisation test; no p is below 1 / (exchanges + 1).
        level: of the intervals.
        seed: of the resamples.
        measures: by name, those that every run has.
        groups: languages by the name of their group.
    """

    task: str
    names: list[str]
    languages: list[str]
    queries: int
    questions: int
    resamples: int
    exchanges: int
    level: float
    seed: int
    measures: dict[str, Measured]
    groups: dict[str, list[str]] = field(default_factory=dict)

    @property
    def group_columns(self) -> dict[str, int]:
        """Where each group is on the axis G."""
        return {name: 1 + i for i, name in enumerate(self.groups)}

    @property
    def language_columns(self) -> dict[str, int]:
        """Where each language is on the axis G."""
        return {code: 1 + len(self.groups) + i for i, code in enumerate(self.languages)}


def compare_runs(
    names: Sequence[str],
    runs: Sequence[PerQuery],
    *,
    resamples: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
    groups: Mapping[str, Sequence[str]] | None = None,
) -> Comparison:
    """Intervals of every run, and differences to the first with their intervals and p-values.

    Args:
        names: R names, for messages too.
        runs: R >= 2, of one task.
        resamples: of the bootstrap; the least of the randomisation test, which takes more where it corrects many p.
        level: of the intervals, in (0, 1).
        seed: equal seeds give equal results, bit for bit.
        groups: languages by the name of their group: means over them are compared too.

    Raises:
        CompareError: the runs answered different queries, share no measure, or there are too few of them; a group has a
            language that no query has.
    """
    if len(runs) < 2:
        raise CompareError(f"{len(runs)} run to compare; two or more are needed")
    if resamples < 1 or not 0 < level < 1:
        raise CompareError(f"resamples ({resamples}) must be at least 1 and the level ({level}) between 0 and 1")
    orders = _pair(names, runs)
    first = runs[0]
    languages = sorted(set(first.languages))
    codes = {language: i for i, language in enumerate(languages)}
    language_N = np.array([codes[language] for language in first.languages])
    asked = list(map(question, first.ids, first.languages))
    question_N = np.unique(asked, return_inverse=True)[1]
    questions = int(question_N.max()) + 1
    if questions < 2:
        raise CompareError(f"only one question, {asked[0]!r}; tests need several")
    shared = [name for name in first.measures if name not in CONSTANT and all(name in run.measures for run in runs)]
    if not shared:
        measured = "; ".join(f"{name} has {', '.join(run.measures)}" for name, run in zip(names, runs, strict=True))
        raise CompareError(f"the runs have no measure in common: {measured}")
    kept, values_MRN, there_MN = [], [], []
    for measure in shared:
        values_RN = np.stack([run.measures[measure][order] for run, order in zip(runs, orders, strict=True)])
        there_N = _there(names, first, measure, values_RN)
        if there_N.any():  # not so of Cr in one language
            kept.append(measure)
            values_MRN.append(values_RN)
            there_MN.append(there_N)
    if not kept:
        raise CompareError(f"no query has a value of {', '.join(shared)}")
    blocks = blocks_of(question_N, language_N, np.stack(values_MRN), np.stack(there_MN))
    groups = {name: list(members) for name, members in (groups or {}).items()}
    averaged_KL = np.stack([_averaged(languages), *(_members(name, groups[name], languages) for name in groups)])
    exchanges = max(resamples, min(FINE * len(languages) * (len(runs) - 1), MOST // questions))
    measured = _measured(blocks, averaged_KL, (resamples, exchanges), level, seed)
    measures = dict(zip(kept, measured, strict=True))
    return Comparison(
        first.task, list(names), languages, len(first.ids), questions, resamples, exchanges, level, seed, measures,
        groups,
    )  # fmt: skip


def question(query: str, language: str) -> str:
    """The question that a query asks: its id, less the "|language" with which ids of bitext end.

    Args:
        query: id of the query.
        language: its language; of bitext, "source>target".
    """
    return query.removesuffix(f"|{language}")


def _measured(
    blocks: Sequence[Block], averaged_KL: np.ndarray, numbers: tuple[int, int], level: float, seed: int
) -> Iterator[Measured]:
    draw, exchange = map(np.random.default_rng, np.random.SeedSequence(seed).spawn(2))
    k, languages = averaged_KL.shape
    sums_MRL, counts_ML = totals(blocks, languages)
    values_MRG = means_of(sums_MRL, counts_ML[:, None], averaged_KL)
    drawn_BMRG = bootstrap(blocks, averaged_KL, numbers[0], draw)
    shape = values_MRG[:, 1:].shape
    rows_MRG = np.arange(np.prod(shape)).reshape(shape)
    parts = [
        (block.asked, rows_MRG[..., [*range(k), *(k + block.there)]].ravel(), _parts(block, counts_ML, averaged_KL))
        for block in blocks
    ]
    p_MRG = randomisation(parts, rows_MRG.size, numbers[1], exchange).reshape(shape)
    p_MRG[np.isnan(values_MRG[:, 1:])] = np.nan
    for values_RG, drawn_BRG, p_RG in zip(values_MRG, np.moveaxis(drawn_BMRG, 1, 0), p_MRG, strict=True):
        yield Measured(
            values=values_RG,
            intervals=_interval(drawn_BRG, level),
            differences=values_RG[1:] - values_RG[:1],
            difference_intervals=_interval(drawn_BRG[:, 1:] - drawn_BRG[:, :1], level),
            p=p_RG,
            p_holm=np.column_stack([holm(p_RG[:, 0]), holm(p_RG[:, 1:k]), holm(p_RG[:, k:])]),
        )


def _parts(block: Block, counts_ML: np.ndarray, averaged_KL: np.ndarray) -> np.ndarray:
    """(C, M * (R - 1) * (K + L)): what its questions add to differences to the first run, in means and by language."""
    gained_MRCL = block.sums_MRCL[:, 1:] - block.sums_MRCL[:, :1]
    gained_MRCL /= np.maximum(counts_ML[:, block.there], 1)[:, None, None]
    averaged_LK = averaged_KL.T.astype(np.float64)
    languages_MK = (counts_ML > 0) @ averaged_LK
    means_MRCK = gained_MRCL @ averaged_LK[block.there] / np.maximum(languages_MK, 1)[:, None, None]
    parts_MRCG = np.concatenate([means_MRCK, gained_MRCL], axis=-1)
    return np.moveaxis(parts_MRCG, -2, 0).reshape(len(block.asked), -1)


def _averaged(languages: Sequence[str]) -> np.ndarray:
    """(L,) bool: as in the figures of bitext, directions between varieties of a language (en>en-GB) are in no mean."""
    pairs = [language.split(">") for language in languages]
    averaged = np.array([len({code.partition("-")[0] for code in pair}) == len(pair) for pair in pairs])
    return averaged if averaged.any() else ~averaged


def _members(name: str, members: Sequence[str], languages: Sequence[str]) -> np.ndarray:
    """(L,) bool: the languages of a group."""
    unknown = sorted(set(members) - set(languages))
    if unknown or not members:
        raise CompareError(
            f"group {name!r}: no query is in {', '.join(unknown) or 'no language'}; "
            f"the languages of the queries are {', '.join(languages)}"
        )
    return np.isin(languages, members)


def _interval(drawn: np.ndarray, level: float) -> np.ndarray:
    """(B, ...) draws to (..., 2) percentiles."""
    ends = [(1 - level) / 2, (1 + level) / 2]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All-NaN slice", RuntimeWarning)  # a language without such queries
        quantiles = np.nanquantile(drawn, ends, axis=0) if np.isnan(drawn).any() else np.quantile(drawn, ends, axis=0)
    return np.moveaxis(quantiles, 0, -1)


def _pair(names: Sequence[str], runs: Sequence[PerQuery]) -> list[np.ndarray]:
    """For every run, where the queries of the first run are in it."""
    first, orders = None, []
    for name, run in zip(names, runs, strict=True):
        places = {key: i for i, key in enumerate(zip(run.ids, run.languages, strict=True))}
        if len(places) < len(run.ids):
            seen: set[tuple[str, str]] = set()
            twice = next(k for k in zip(run.ids, run.languages, strict=True) if k in seen or seen.add(k))
            raise CompareError(f"{name}: query {twice[0]!r} in {twice[1]} occurs twice")
        if not places:
            raise CompareError(f"{name}: no queries")
        if first is None:
            first, task = places, run.task
        if run.task != task:
            raise CompareError(f"different tasks: {names[0]} was evaluated on {task!r}, {name} on {run.task!r}")
        if first.keys() != places.keys():
            raise CompareError(_difference(names[0], first.keys() - places.keys(), name, places.keys() - first.keys()))
        orders.append(np.fromiter((places[key] for key in first), np.int64, len(first)))
    return orders


def _difference(first: str, only_first: set, second: str, only_second: set) -> str:
    said = []
    for name, extra in ((first, only_first), (second, only_second)):
        if extra:
            query, language = min(extra, key=lambda key: key[::-1])
            where = ", ".join(sorted({key[1] for key in extra})[:8])
            said.append(f"{len(extra):,} only in {name} ({where}), such as {query!r} in {language}")
    return f"{first} and {second} were not asked the same queries: {'; '.join(said)}. Tests need pairs: evaluate anew"


def _there(names: Sequence[str], first: PerQuery, measure: str, values_RN: np.ndarray) -> np.ndarray:
    """(N,) bool: queries that have the measure, in every run alike."""
    nan_RN = np.isnan(values_RN)
    for name, nan in zip(names, nan_RN, strict=True):
        differs = np.flatnonzero(nan != nan_RN[0])
        if len(differs):
            query = f"query {first.ids[differs[0]]!r} in {first.languages[differs[0]]}"
            has, lacks = (names[0], name) if nan[differs[0]] else (name, names[0])
            raise CompareError(
                f"{query} has {measure} in {has} and not in {lacks}: the pools or the relevant candidates differ"
            )
    return ~nan_RN[0]
