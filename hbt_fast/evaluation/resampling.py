"""The resampling behind `compare`: a cluster bootstrap, a randomisation test, Holm's correction.

Questions are the clusters. Means over queries are ratios of sums over questions, so that a resample is a row of weights
times the (C, L) sums: 10,000 of them over XQuAD-R's 1,190 questions and 11 languages are one matrix product. Questions
that exist in the same languages make a block: of Tatoeba's 88,877 each has two of 224 directions, and the rest would be
zeros. Shapes as in `compare`; K means are over languages, and G is "K means, then each language".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

CHUNK = 4_000_000  # weights that are held at a time
ROUNDING = 1e-12  # differences that are equal but for the order of their sums are ties


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


@dataclass(frozen=True, eq=False)
class Block:
    """Questions that exist in the same languages.

    Attributes:
        asked: (C,) which questions.
        there: (L,) which languages, ascending.
        sums_MRCL: float64, sums of each measure over a question's queries, by run and language.
        counts_MCL: float64, numbers of those queries.
    """

    asked: np.ndarray
    there: np.ndarray
    sums_MRCL: np.ndarray
    counts_MCL: np.ndarray


def blocks_of(
    question_N: np.ndarray, language_N: np.ndarray, values_MRN: np.ndarray, there_MN: np.ndarray
) -> list[Block]:
    """The queries as blocks.

    Args:
        question_N: numbers from 0 of the questions that queries ask.
        language_N: numbers from 0 of their languages.
        values_MRN: of the queries.
        there_MN: bool, where they have one.
    """
    languages = int(language_N.max()) + 1
    question, language = np.divmod(np.unique(question_N * languages + language_N), languages)
    patterns: dict[bytes, list[int]] = {}
    for number, codes in enumerate(np.split(language, np.flatnonzero(np.diff(question)) + 1)):
        patterns.setdefault(codes.tobytes(), []).append(number)
    pattern_C, place_C = np.empty((2, question[-1] + 1), np.int64)
    for number, asked in enumerate(patterns.values()):
        pattern_C[asked], place_C[asked] = number, np.arange(len(asked))
    order = np.argsort(pattern_C[question_N], kind="stable")
    ends = np.cumsum(np.bincount(pattern_C[question_N], minlength=len(patterns)))[:-1]
    blocks = []
    for (raw, asked), mine in zip(patterns.items(), np.split(order, ends), strict=True):
        there = np.frombuffer(raw, np.int64)
        cell = place_C[question_N[mine]] * len(there) + np.searchsorted(there, language_N[mine])
        shape = len(asked), len(there)
        counts = [_sums(cell[has], None, shape) for has in there_MN[:, mine]]
        sums = [
            [_sums(cell[has], values[has], shape) for values in values_RN]
            for has, values_RN in zip(there_MN[:, mine], values_MRN[..., mine], strict=True)
        ]
        blocks.append(Block(np.array(asked), there, np.array(sums), np.array(counts)))
    return blocks


def _sums(cells: np.ndarray, weights: np.ndarray | None, shape: tuple[int, int]) -> np.ndarray:
    return np.bincount(cells, weights=weights, minlength=shape[0] * shape[1]).reshape(shape).astype(np.float64)


def totals(blocks: Sequence[Block], languages: int) -> tuple[np.ndarray, np.ndarray]:
    """(M, R, L) sums and (M, L) numbers of queries, over all questions.

    Args:
        blocks: of all questions.
        languages: L.
    """
    sums_MRL = np.zeros((*blocks[0].sums_MRCL.shape[:2], languages))
    counts_ML = np.zeros((len(sums_MRL), languages))
    for block in blocks:
        sums_MRL[..., block.there] += block.sums_MRCL.sum(axis=2)
        counts_ML[..., block.there] += block.counts_MCL.sum(axis=1)
    return sums_MRL, counts_ML


def bootstrap(blocks: Sequence[Block], averaged_KL: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Means of every measure and run under questions drawn anew, the same draws for all of them.

    A language of which a resample has no query is left out of that resample's means over languages.

    Args:
        blocks: of all questions.
        averaged_KL: bool, the languages that each mean over languages is of.
        resamples: B.
        rng: draws the questions.

    Returns:
        (B, M, R, G) float64.
    """
    measures, runs = blocks[0].sums_MRCL.shape[:2]
    questions, languages = sum(len(block.asked) for block in blocks), averaged_KL.shape[1]
    columns = [
        (block, *(np.moveaxis(x, -2, 0).reshape(len(block.asked), -1) for x in (block.sums_MRCL, block.counts_MCL)))
        for block in blocks
    ]
    drawn = []
    for n in _chunks(resamples, questions):
        picks = rng.integers(0, questions, (n, questions))
        picks += np.arange(n)[:, None] * questions
        weights = np.bincount(picks.ravel(), minlength=n * questions).reshape(n, questions).astype(np.float64)
        sums_BMRL, counts_BML = np.zeros((n, measures, runs, languages)), np.zeros((n, measures, languages))
        for block, sums, counts in columns:
            sums_BMRL[..., block.there] += (weights[:, block.asked] @ sums).reshape(n, measures, runs, -1)
            counts_BML[..., block.there] += (weights[:, block.asked] @ counts).reshape(n, measures, -1)
        drawn.append(means_of(sums_BMRL, counts_BML[:, :, None], averaged_KL))
    return np.concatenate(drawn)


def randomisation(
    parts: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]], rows: int, exchanges: int, rng: np.random.Generator
) -> np.ndarray:
    """Two-sided p-values of differences, were the names of the two runs exchanged at random in every question.

    The observed exchange counts as one of them, so that p is never 0 and the test exact (Phipson and Smyth 2010).

    Args:
        parts: what questions contribute to differences, by block: numbers of the questions (C,), numbers of the
            differences (K,), and the (C, K) parts, whose sums over all questions are the differences.
        rows: number of differences.
        exchanges: how many.
        rng: draws them.

    Returns:
        (rows,) float64, NaN where a part is.
    """
    questions = sum(len(asked) for asked, _, _ in parts)
    total, size = np.zeros(rows), np.zeros(rows)
    for _, row, part_CK in parts:
        total[row] += part_CK.sum(axis=0)
        size[row] += np.abs(part_CK).sum(axis=0)
    seen = np.abs(total) - ROUNDING * size
    as_far = np.zeros(rows)
    for n in _chunks(exchanges, questions):
        signs = rng.integers(0, 2, (n, questions), dtype=np.int8) * 2.0 - 1.0
        exchanged = np.zeros((n, rows))
        for asked, row, part_CK in parts:
            exchanged[:, row] += signs[:, asked] @ part_CK
        as_far += (np.abs(exchanged) >= seen).sum(axis=0)
    return np.where(np.isnan(total), np.nan, (1 + as_far) / (1 + exchanges))


def means_of(sums: np.ndarray, counts: np.ndarray, averaged_KL: np.ndarray) -> np.ndarray:
    """Means over queries: over languages, then of each.

    Args:
        sums: (..., L).
        counts: (..., L); where it is 0, the mean is NaN.
        averaged_KL: bool, the languages that each mean over languages is of.

    Returns:
        (..., K + L) float64.
    """
    means = np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0)
    there, averaged_LK = ~np.isnan(means), averaged_KL.T.astype(np.float64)
    total, n = np.where(there, means, 0) @ averaged_LK, there @ averaged_LK
    return np.concatenate([np.divide(total, n, out=np.full(total.shape, np.nan), where=n > 0), means], axis=-1)


def _chunks(number: int, questions: int) -> Iterator[int]:
    size = max(CHUNK // questions, 1)
    for done in range(0, number, size):
        yield min(size, number - done)
