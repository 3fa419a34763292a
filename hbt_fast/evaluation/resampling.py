"""The resampling behind `compare`: a cluster bootstrap, a randomisation test, Holm's correction.

Questions are the clusters. Means over queries are ratios of sums over questions, so that a resample is a row of weights
times the (C, L) sums: 10,000 of them over XQuAD-R's 1,190 questions and 11 languages are one matrix product. Questions
that exist in the same languages make a block: of bitext a question has two of very many directions, and products over
the rest would be of zeros. Shapes as in `compare`; K means are over languages, and G is "K means, then each language".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

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


def bootstrap(
    sums_MRCL: np.ndarray,
    counts_MCL: np.ndarray,
    averaged_KL: np.ndarray,
    resamples: int,
    rng: np.random.Generator,
) -> np.ndarray:
    """Means of every measure and run under questions drawn anew, the same draws for all of them.

    A language of which a resample has no query is left out of that resample's means over languages.

    Args:
        sums_MRCL: sums of each measure over a question's queries, by run and language.
        counts_MCL: numbers of those queries.
        averaged_KL: bool, the languages that each mean over languages is of.
        resamples: B.
        rng: draws the questions.

    Returns:
        (B, M, R, G) float64.
    """
    measures, runs, questions, languages = sums_MRCL.shape
    blocks = []
    for asked, there in blocks_of(counts_MCL):
        sums = np.moveaxis(sums_MRCL[:, :, asked][..., there], 2, 0).reshape(len(asked), -1)
        counts = np.moveaxis(counts_MCL[:, asked][..., there], 1, 0).reshape(len(asked), -1)
        blocks.append((asked, there, sums, counts))
    drawn = []
    for n in _chunks(resamples, questions):
        picks = rng.integers(0, questions, (n, questions))
        picks += np.arange(n)[:, None] * questions
        weights = np.bincount(picks.ravel(), minlength=n * questions).reshape(n, questions).astype(np.float64)
        sums_BMRL, counts_BML = np.zeros((n, measures, runs, languages)), np.zeros((n, measures, languages))
        for asked, there, sums, counts in blocks:
            sums_BMRL[..., there] += (weights[:, asked] @ sums).reshape(n, measures, runs, -1)
            counts_BML[..., there] += (weights[:, asked] @ counts).reshape(n, measures, -1)
        drawn.append(means_of(sums_BMRL, counts_BML[:, :, None], averaged_KL))
    return np.concatenate(drawn)


def randomisation(
    parts_KC: np.ndarray, exchanges: int, rng: np.random.Generator, blocks: Sequence[tuple[np.ndarray, np.ndarray]] = ()
) -> np.ndarray:
    """Two-sided p-values of differences, were the names of the two runs exchanged at random in every question.

    The observed exchange counts as one of them, so that p is never 0 and the test exact (Phipson and Smyth 2010).

    Args:
        parts_KC: what each question contributes to the differences: row k sums to difference k.
        exchanges: how many.
        rng: draws them.
        blocks: (rows, questions) outside which all parts are 0 or NaN; empty: one block of all.

    Returns:
        (K,) float64, NaN where a row holds NaN.
    """
    rows, questions = parts_KC.shape
    parts = np.nan_to_num(parts_KC)
    blocks = blocks or [(np.arange(rows), np.arange(questions))]
    dense = [(row, asked, parts[np.ix_(row, asked)].T) for row, asked in blocks]
    seen = np.abs(parts.sum(axis=1)) - ROUNDING * np.abs(parts).sum(axis=1)
    as_far = np.zeros(rows)
    for n in _chunks(exchanges, questions):
        signs = rng.integers(0, 2, (n, questions), dtype=np.int8) * 2.0 - 1.0
        exchanged = np.zeros((n, rows))
        for row, asked, part in dense:
            exchanged[:, row] += signs[:, asked] @ part
        as_far += (np.abs(exchanged) >= seen).sum(axis=0)
    return np.where(np.isnan(parts_KC).any(axis=1), np.nan, (1 + as_far) / (1 + exchanges))


def blocks_of(counts_MCL: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """(questions, languages), indices of both, of the questions that exist in the same languages.

    Args:
        counts_MCL: numbers of queries.
    """
    patterns, pattern_C = np.unique((counts_MCL > 0).any(axis=0), axis=0, return_inverse=True)
    pattern_C = pattern_C.reshape(-1)
    return [(np.flatnonzero(pattern_C == i), np.flatnonzero(there)) for i, there in enumerate(patterns) if there.any()]


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
