"""Are two runs different, or is it chance? Paired intervals and tests over the questions that both were asked.

Translations of one question are not independent: a question that is hard is hard in every language. Questions are
what is drawn, each with its queries in all its languages: a cluster bootstrap for the intervals (Efron 1979; in
evaluation, Koehn 2004) and a randomisation test for differences (Fisher 1935; the one that Smucker, Allan and
Carterette 2007 recommend for retrieval). Every resample is averaged as the headline figures are: the mean over
languages of the mean over queries. Several comparisons within a measure are corrected after Holm (1979).

Shapes: M measures, R runs, N queries, C questions (clusters), L languages, B resamples. Axis G is "all languages, then
each": 1 + L long. Means over queries are ratios of sums over questions, so that a resample is a row of weights times
the (C, L) sums: 10,000 of them over XQuAD-R's 1,190 questions and 11 languages are one matrix product.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from hbt_fast.evaluation.queries import PerQuery

CHUNK = 4_000_000  # weights that are held at a time
CONSTANT = ("pool share",)  # of the task, not of a run
ROUNDING = 1e-12  # differences that are equal but for the order of their sums are ties


class CompareError(ValueError):
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
        p_holm: the same, corrected over the runs (first column), and over runs and languages (the others).
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
        resamples: B, of the bootstrap and of the randomisation test alike.
        level: of the intervals.
        seed: of the resamples.
        measures: by name, those that every run has.
    """

    task: str
    names: list[str]
    languages: list[str]
    queries: int
    questions: int
    resamples: int
    level: float
    seed: int
    measures: dict[str, Measured]


def compare_runs(
    names: Sequence[str], runs: Sequence[PerQuery], *, resamples: int = 10_000, level: float = 0.95, seed: int = 0
) -> Comparison:
    """Intervals of every run, and differences to the first with their intervals and p-values.

    Args:
        names: R names, for messages too.
        runs: R >= 2, of one task.
        resamples: of the bootstrap, and of the randomisation test.
        level: of the intervals, in (0, 1).
        seed: equal seeds give equal results, bit for bit.

    Raises:
        CompareError: the runs answered different queries, share no measure, or there are too few of them.
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
    cell_N, shape = question_N * len(languages) + language_N, (questions, len(languages))
    counts_MCL, sums_MRCL, kept = [], [], []
    for measure in shared:
        values_RN = np.stack([run.measures[measure][order] for run, order in zip(runs, orders, strict=True)])
        there_N = _there(names, first, measure, values_RN)
        if not there_N.any():  # as Cr in one language
            continue
        kept.append(measure)
        counts_MCL.append(_sums(cell_N[there_N], None, shape))
        sums_MRCL.append(np.stack([_sums(cell_N[there_N], values[there_N], shape) for values in values_RN]))
    if not kept:
        raise CompareError(f"no query has a value of {', '.join(shared)}")
    averaged_L = _averaged(languages)
    measured = _measured(np.stack(sums_MRCL), np.stack(counts_MCL), averaged_L, resamples, level, seed)
    measures = dict(zip(kept, measured, strict=True))
    return Comparison(first.task, list(names), languages, len(first.ids), questions, resamples, level, seed, measures)


def question(query: str, language: str) -> str:
    """The question that a query asks: its id, less the "|language" with which ids of bitext end.

    Args:
        query: id of the query.
        language: its language; of bitext, "source>target".
    """
    return query.removesuffix(f"|{language}")


def holm(p: np.ndarray) -> np.ndarray:
    """p-values corrected for their number (Holm 1979), in the shape and order given; NaN is no comparison.

    Args:
        p: of any shape.
    """
    adjusted = np.full(p.shape, np.nan)
    there = ~np.isnan(p)
    ordered = np.argsort(p[there], kind="stable")
    n = len(ordered)
    steps = np.minimum(np.maximum.accumulate(p[there][ordered] * np.arange(n, 0, -1)), 1.0)
    corrected = np.empty(n)
    corrected[ordered] = steps
    adjusted[there] = corrected
    return adjusted


def bootstrap(
    sums_MRCL: np.ndarray,
    counts_MCL: np.ndarray,
    averaged_L: np.ndarray,
    resamples: int,
    rng: np.random.Generator,
) -> np.ndarray:
    """Means of every measure and run under questions drawn anew, the same draws for all of them.

    A language of which a resample has no query is left out of that resample's mean over languages.

    Args:
        sums_MRCL: sums of each measure over a question's queries, by run and language.
        counts_MCL: numbers of those queries.
        averaged_L: bool, languages that the mean over languages is of.
        resamples: B.
        rng: draws the questions.

    Returns:
        (B, M, R, G) float64.
    """
    measures, runs, questions, languages = sums_MRCL.shape
    sums = np.moveaxis(sums_MRCL, 2, 0).reshape(questions, -1)
    counts = np.moveaxis(counts_MCL, 1, 0).reshape(questions, -1)
    drawn = []
    for n in _chunks(resamples, questions):
        picks = rng.integers(0, questions, (n, questions))
        picks += np.arange(n)[:, None] * questions
        weights = np.bincount(picks.ravel(), minlength=n * questions).reshape(n, questions).astype(np.float64)
        sums_BMRL = (weights @ sums).reshape(n, measures, runs, languages)
        drawn.append(_means(sums_BMRL, (weights @ counts).reshape(n, measures, 1, languages), averaged_L))
    return np.concatenate(drawn)


def randomisation(parts_KC: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Two-sided p-values of differences, were the names of the two runs exchanged at random in every question.

    The observed exchange counts as one of them, so that p is never 0 and the test exact (Phipson and Smyth 2010).

    Args:
        parts_KC: what each question contributes to the differences: row k sums to difference k.
        resamples: B.
        rng: draws the exchanges.

    Returns:
        (K,) float64, NaN where a row holds NaN.
    """
    parts = np.ascontiguousarray(np.nan_to_num(parts_KC).T)
    seen = np.abs(parts.sum(axis=0)) - ROUNDING * np.abs(parts).sum(axis=0)
    as_far = np.zeros(len(parts_KC))
    for n in _chunks(resamples, len(parts)):
        signs = rng.integers(0, 2, (n, len(parts)), dtype=np.int8) * 2.0 - 1.0
        as_far += (np.abs(signs @ parts) >= seen).sum(axis=0)
    return np.where(np.isnan(parts_KC).any(axis=1), np.nan, (1 + as_far) / (1 + resamples))


def _measured(
    sums_MRCL: np.ndarray, counts_MCL: np.ndarray, averaged_L: np.ndarray, resamples: int, level: float, seed: int
) -> Iterator[Measured]:
    draw, exchange = map(np.random.default_rng, np.random.SeedSequence(seed).spawn(2))
    values_MRG = _means(sums_MRCL.sum(axis=2), counts_MCL.sum(axis=1)[:, None], averaged_L)
    drawn_BMRG = bootstrap(sums_MRCL, counts_MCL, averaged_L, resamples, draw)
    parts_MRGC = _parts(sums_MRCL, counts_MCL, averaged_L)
    p_MRG = randomisation(parts_MRGC.reshape(-1, parts_MRGC.shape[-1]), resamples, exchange)
    p_MRG = p_MRG.reshape(parts_MRGC.shape[:-1])
    for values_RG, drawn_BRG, p_RG in zip(values_MRG, np.moveaxis(drawn_BMRG, 1, 0), p_MRG, strict=True):
        yield Measured(
            values=values_RG,
            intervals=_interval(drawn_BRG, level),
            differences=values_RG[1:] - values_RG[:1],
            difference_intervals=_interval(drawn_BRG[:, 1:] - drawn_BRG[:, :1], level),
            p=p_RG,
            p_holm=np.column_stack([holm(p_RG[:, 0]), holm(p_RG[:, 1:])]),
        )


def _parts(sums_MRCL: np.ndarray, counts_MCL: np.ndarray, averaged_L: np.ndarray) -> np.ndarray:
    """(M, R - 1, G, C): what every question adds to the differences to the first run; NaN for empty languages."""
    queries_ML = counts_MCL.sum(axis=1)
    gained = sums_MRCL[:, 1:] - sums_MRCL[:, :1]
    gained = gained / np.where(queries_ML > 0, queries_ML, np.nan)[:, None, None]
    languages_M = ((queries_ML > 0) & averaged_L).sum(axis=-1)
    overall = np.nansum(gained[..., averaged_L], axis=-1) / np.maximum(languages_M, 1)[:, None, None]
    return np.concatenate([overall[..., None, :], np.moveaxis(gained, -1, -2)], axis=-2)


def _averaged(languages: Sequence[str]) -> np.ndarray:
    """(L,) bool: as in the figures of bitext, directions between varieties of a language (en>en-GB) are in no mean."""
    pairs = [language.split(">") for language in languages]
    averaged = np.array([len({code.partition("-")[0] for code in pair}) == len(pair) for pair in pairs])
    return averaged if averaged.any() else ~averaged


def _means(sums: np.ndarray, counts: np.ndarray, averaged_L: np.ndarray) -> np.ndarray:
    """(..., L) sums and counts to (..., G) means: over the averaged languages, then of each."""
    means = np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0)
    there = ~np.isnan(means) & averaged_L
    total, n = np.where(there, means, 0).sum(axis=-1, keepdims=True), there.sum(axis=-1, keepdims=True)
    overall = np.divide(total, n, out=np.full(total.shape, np.nan), where=n > 0)
    return np.concatenate([overall, means], axis=-1)


def _interval(drawn: np.ndarray, level: float) -> np.ndarray:
    """(B, ...) draws to (..., 2) percentiles."""
    ends = [(1 - level) / 2, (1 + level) / 2]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All-NaN slice", RuntimeWarning)  # a language without such queries
        quantiles = np.nanquantile(drawn, ends, axis=0) if np.isnan(drawn).any() else np.quantile(drawn, ends, axis=0)
    return np.moveaxis(quantiles, 0, -1)


def _chunks(resamples: int, questions: int) -> Iterator[int]:
    size = max(CHUNK // questions, 1)
    for done in range(0, resamples, size):
        yield min(size, resamples - done)


def _sums(cells: np.ndarray, weights: np.ndarray | None, shape: tuple[int, int]) -> np.ndarray:
    return np.bincount(cells, weights=weights, minlength=shape[0] * shape[1]).reshape(shape).astype(np.float64)


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
