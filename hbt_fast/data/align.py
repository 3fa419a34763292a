"""A lexicon out of bitext: IBM Model 1 (Brown et al., Computational Linguistics 1993) in both directions, intersected.

Model 1 takes every target word for a translation of one source word of its sentence, or of none (NULL), all places
alike; expectation maximisation finds p(target | source). Each direction then links every word of a sentence to its best
partner, and a link that both directions make is kept. Words that are often linked are the lexicon.

Memory is 12 bytes for each pair of words that ever share a sentence, and a few bytes per token. Both are bounded by the
caps on sentence pairs, on vocabulary and on sentence length. No table has both vocabularies as its sides.
"""

from __future__ import annotations

import unicodedata
from array import array
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numba import njit

from hbt_fast.base.files import write_whole, writing
from hbt_fast.data.lexicon import has_letter, split, unspaced_share
from hbt_fast.data.rows import DataError


class Entry(NamedTuple):
    """A source word and a translation of it.

    Args:
        source: folded word.
        target: folded word.
        probability: share of the source word's uses that are linked to this target.
        count: links between the two that both directions make.
    """

    source: str
    target: str
    probability: float
    count: int


class _Side(NamedTuple):
    """The texts of one language: word numbers, where each sentence begins, and the words by number."""

    tokens: np.ndarray  # int32 (T,)
    offsets: np.ndarray  # int64 (S + 1,)
    words: list[str]


def induce(
    pairs: Iterable[tuple[str, str]],
    *,
    iterations: int = 5,
    min_count: int = 2,
    min_probability: float = 0.1,
    max_pairs: int = 1_000_000,
    max_vocabulary: int = 100_000,
    max_words: int = 100,
) -> list[Entry]:
    """Word translations out of sentence translations; the same pairs give the same entries.

    Args:
        pairs: (source text, target text), translations of each other. The more literal and short, the better.
        iterations: of expectation maximisation.
        min_count: keep entries linked at least so often (words rarer than that are not looked at).
        min_probability: keep entries for at least this share of their source word's uses; 0.3: fewer and better.
        max_pairs: only so many pairs are read.
        max_vocabulary: only so many most frequent words of each language are looked at.
        max_words: longer texts are left out: a paragraph says little about which word goes with which.

    Returns:
        entries by source word, the likeliest translation first.

    Raises:
        DataError: no usable pair, or a language whose script puts no spaces between words.
    """
    counts = {"iterations": iterations, "min_count": min_count, "max_pairs": max_pairs}
    for name, value in {**counts, "max_vocabulary": max_vocabulary, "max_words": max_words}.items():
        if value < 1:
            raise DataError(f"{name} is {value}; write a number above 0")
    if not 0 <= min_probability <= 1:
        raise DataError(f"min_probability is {min_probability}; write a number from 0 to 1")
    source, target = _read(iter(pairs), min_count, max_pairs, max_vocabulary, max_words)
    forward, backward = _best(source, target, iterations), _best(target, source, iterations)
    linked = _links(source.tokens, source.offsets, target.tokens, target.offsets, forward, backward, len(target.words))
    codes, counts = np.unique(linked, return_counts=True)
    left, right = np.divmod(codes, len(target.words))
    uses = np.bincount(source.tokens, minlength=len(source.words)).tolist()
    entries = [
        Entry(source.words[i], target.words[j], count / uses[i], count)
        for i, j, count in zip(left.tolist(), right.tolist(), counts.tolist(), strict=True)
        if count >= min_count and count >= min_probability * uses[i]
    ]
    return sorted(entries, key=lambda entry: (entry.source, -entry.count, entry.target))


def write(entries: Iterable[Entry], path: str | Path) -> None:
    """Write a dictionary that `Lexicon.read` takes: a source word and its translations on each line, tabs between.

    Raises:
        FileError: it cannot be written.
    """
    table: dict[str, list[str]] = {}
    for entry in entries:
        table.setdefault(entry.source, []).append(entry.target)
    path = Path(path)
    text = "".join("\t".join([source, *targets]) + "\n" for source, targets in table.items())
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text)


def _read(
    pairs: Iterator[tuple[str, str]], min_count: int, max_pairs: int, max_vocabulary: int, max_words: int
) -> tuple[_Side, _Side]:
    """Both sides of the bitext as numbers, a pair at a time."""
    first = [*islice(pairs, min(max_pairs, 1000))]
    for number, name in enumerate(("first", "second")):
        some = [pair[number] for pair in first]
        if unspaced_share(some) > 0.5:
            raise DataError(
                f"the {name} language is written without spaces between words ({some[0][:20]!r}), so there are no "
                "words to align: put spaces between them with a segmenter of that language first, or give a dictionary"
            )
    numbers: tuple[dict[str, int], dict[str, int]] = {}, {}
    tokens, offsets = (array("i"), array("i")), (array("q", [0]), array("q", [0]))
    read = 0
    for pair in chain(first, islice(pairs, max_pairs - len(first))):
        read += 1
        sides = [[word for word in split(unicodedata.normalize("NFC", text))[0] if has_letter(word)] for text in pair]
        if all(0 < len(words) <= max_words for words in sides):
            for words, number, ids, ends in zip(sides, numbers, tokens, offsets, strict=True):
                ids.extend([number.setdefault(word, len(number)) for word in words])
                ends.append(len(ids))
    if not tokens[0]:
        raise DataError(
            f"of {read:,} sentence pairs none has 1 to {max_words} words on both sides; nothing to learn from"
        )
    made = [_side(*one, min_count, max_vocabulary) for one in zip(numbers, tokens, offsets, strict=True)]
    if not all(len(side.tokens) for side in made):
        raise DataError(
            f"no word occurs {min_count} times in {len(offsets[0]) - 1:,} sentence pairs; give more, or a smaller "
            "min_count"
        )
    return made[0], made[1]


def _side(number: dict[str, int], ids: array, ends: array, min_count: int, max_vocabulary: int) -> _Side:
    """The words that are looked at, numbered from the most frequent on, and the texts in these numbers."""
    tokens = np.frombuffer(ids, np.int32)
    words, counts = [*number], np.bincount(tokens).tolist()
    order = sorted(range(len(words)), key=lambda i: (-counts[i], words[i]))
    order = [i for i in order if counts[i] >= min_count][:max_vocabulary]
    renumbered = np.full(len(words), -1, np.int32)
    renumbered[order] = np.arange(len(order), dtype=np.int32)
    tokens = renumbered[tokens]
    before = np.concatenate([[0], np.cumsum(tokens >= 0)])  # kept tokens before each place
    return _Side(tokens[tokens >= 0], before[np.frombuffer(ends, np.int64)], [words[i] for i in order])


class _Model(NamedTuple):
    """Where words stand and p(target | source) of each pair that shares a sentence; see the legend below."""

    places: np.ndarray  # int64 (T + S,)
    starts: np.ndarray  # int64 (words + 2,)
    targets: np.ndarray  # int32 (pairs,)
    rows: np.ndarray  # int64 (words + 2,)
    p: np.ndarray  # float64 (pairs,)


def _train(source: _Side, target: _Side, iterations: int) -> _Model:
    """Model 1 after so many iterations, from a uniform start. NULL is word number len(source.words)."""
    sentences = len(source.offsets) - 1
    of = np.repeat(np.arange(sentences), np.diff(source.offsets))  # sentence of each token
    by_word = np.argsort(source.tokens, kind="stable")
    places = np.concatenate([of[by_word], np.arange(sentences)])  # NULL is in every sentence
    uses = np.append(np.bincount(source.tokens, minlength=len(source.words)), sentences)
    starts = np.concatenate([[0], np.cumsum(uses)])
    targets, rows = _together(places, starts, target.tokens, target.offsets, len(target.words))
    model = _Model(places, starts, targets, rows, np.ones(len(targets)))
    for _ in range(iterations):
        _iterate(*model, target.tokens, target.offsets, len(target.words))
    return model


def _best(source: _Side, target: _Side, iterations: int) -> np.ndarray:
    """For each target token the number of the source word that it most likely translates; len(source.words) is NULL."""
    return _likeliest(*_train(source, target, iterations), target.tokens, target.offsets, len(target.words))


# Legend of the functions below: word s of the source stands in the sentences places[starts[s] : starts[s + 1]], once
# for every time that it is used; its row of p, p[rows[s] : rows[s + 1]], is over the targets that it ever shares a
# sentence with, targets[rows[s] : rows[s + 1]]. A row is spread over an array of the target vocabulary while it is
# worked on, so that all look-ups are direct.


@njit(cache=True, nogil=True)
def _together(places, starts, tokens, offsets, vocabulary):  # noqa: ANN001
    """(targets, rows): who shares a sentence with whom."""
    seen = np.full(vocabulary, -1, np.int32)
    rows = np.zeros(len(starts), np.int64)
    targets = np.empty(0, np.int32)
    for fill in range(2):  # count, then write
        seen[:] = -1
        n = 0
        for s in range(len(starts) - 1):
            for k in range(starts[s], starts[s + 1]):
                for j in range(offsets[places[k]], offsets[places[k] + 1]):
                    if seen[tokens[j]] != s:
                        seen[tokens[j]] = s
                        if fill:
                            targets[n] = tokens[j]
                        n += 1
            rows[s + 1] = n
        if not fill:
            targets = np.empty(n, np.int32)
    return targets, rows


@njit(cache=True, nogil=True)
def _iterate(places, starts, targets, rows, p, tokens, offsets, vocabulary):  # noqa: ANN001
    """One step of expectation maximisation, on p in place."""
    total = np.zeros(len(tokens))  # of each target token: sum of p over its sentence's source words
    spread, counts = np.zeros(vocabulary), np.zeros(vocabulary)
    for s in range(len(starts) - 1):
        for e in range(rows[s], rows[s + 1]):
            spread[targets[e]] = p[e]
        for k in range(starts[s], starts[s + 1]):
            for j in range(offsets[places[k]], offsets[places[k] + 1]):
                total[j] += spread[tokens[j]]
    for s in range(len(starts) - 1):
        for e in range(rows[s], rows[s + 1]):
            spread[targets[e]] = p[e]
            counts[targets[e]] = 0.0
        for k in range(starts[s], starts[s + 1]):
            for j in range(offsets[places[k]], offsets[places[k] + 1]):
                counts[tokens[j]] += spread[tokens[j]] / total[j]
        row = 0.0
        for e in range(rows[s], rows[s + 1]):
            row += counts[targets[e]]
        for e in range(rows[s], rows[s + 1]):
            p[e] = counts[targets[e]] / row


@njit(cache=True, nogil=True)
def _likeliest(places, starts, targets, rows, p, tokens, offsets, vocabulary):  # noqa: ANN001
    """The likeliest source word of each target token; of equals the most frequent word, NULL last."""
    best, value = np.zeros(len(tokens), np.int32), np.full(len(tokens), -1.0)
    spread = np.zeros(vocabulary)
    for s in range(len(starts) - 1):
        for e in range(rows[s], rows[s + 1]):
            spread[targets[e]] = p[e]
        for k in range(starts[s], starts[s + 1]):
            for j in range(offsets[places[k]], offsets[places[k] + 1]):
                if spread[tokens[j]] > value[j]:
                    best[j], value[j] = s, spread[tokens[j]]
    return best


@njit(cache=True, nogil=True)
def _links(source, source_offsets, target, target_offsets, forward, backward, vocabulary):  # noqa: ANN001
    """source word * vocabulary + target word of each link that both directions make."""
    linked = np.empty(len(source), np.int64)
    n = 0
    for k in range(len(source_offsets) - 1):
        for i in range(source_offsets[k], source_offsets[k + 1]):
            for j in range(target_offsets[k], target_offsets[k + 1]):
                if target[j] == backward[i] and forward[j] == source[i]:
                    linked[n] = np.int64(source[i]) * vocabulary + target[j]
                    n += 1
                    break
    return linked[:n]
