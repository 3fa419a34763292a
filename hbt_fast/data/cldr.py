"""The embedded demo: questions and passages in 16 languages and 10 scripts, made of CLDR alone, nothing to download.

The Unicode Common Locale Data Repository holds names and patterns that people wrote and checked in each language. Babel
carries it (CLDR: copyright Unicode, Inc., licence Unicode-3.0, https://www.unicode.org/license.txt; no text of it is
kept here). Every word in these rows is CLDR's own; only digits and the signs ? = : are added. CLDR's names for what is
not known ("Unknown Currency") serve as question words, and a question mark stands in a pattern for the number that is
asked for ("? meters = 3.5 kilometers").

    relation      question                                 passage
    weekday       Sunday or Thursday? 3/5/2020             Thursday, March 5, 2020
    moment        3/5/2020, 16:30 = ?                      Thursday, March 5, 2020, 4:30 in the afternoon
    days          3/5/2020 - 5/9/2020 = ? days             March 5, 2020 - May 9, 2020 = 65 days
    conversion    ? m = 3.5 km                             3.5 kilometers = 3,500 meters
    sum           ? min = 2 hr and 35 min                  2 hours and 35 minutes = 155 minutes
    amount        Unknown Currency: €12.50                 12.50 euros
    compact       1,230,000 = ?                            1.23 million = 1,230,000
    currency      Unknown Currency: Japan                  Japan: Japanese Yen (¥)
    language      Unknown language: Switzerland            Switzerland: German, French, and Italian
    city          Unknown City: Japan                      Japan: Tokyo

A concept is a date, a quantity (3.5 km is 3,500 m), an amount of a currency, a number or a territory. A hash of the
concept says whether it is held out, and a held-out concept is in no training row of any relation. What is held out is
made of parts that training has (months, units, currencies, digits), territories apart: whether two names of a
territory never seen are the same can only be told from their letters, and from what is said about it.

No two contents share a question or a passage in any language, or the right answer would count as a wrong one. Whatever
a CLDR writes alike (a territory whose language and whose city have one name), the first content has it and the others
are left out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Literal

import xxhash

from hbt_fast.data.rows import DataError, Row
from hbt_fast.data.tokenise import folded

LANGUAGES = ("ar", "bn", "de", "el", "en", "es", "fr", "he", "hi", "ja", "ko", "ru", "th", "tr", "vi", "zh")
HELD_OUT_PERCENT = 6


def cldr_rows(split: Literal["train", "test"], languages: tuple[str, ...] | None = None) -> Iterator[Row]:
    """The rows of the embedded demo; each has its question and its passage in every language.

    Training has every question of a passage (rows with equal content), the test one question of each passage.

    Args:
        split: "train", or "test" for the held-out concepts.
        languages: of `LANGUAGES`; None is all of them.

    Raises:
        DataError: a language that the demo does not have.
    """
    from hbt_fast.data.cldr_facts import facts
    from hbt_fast.data.cldr_words import words

    missing = [code for code in languages or () if code not in LANGUAGES]
    if missing:
        raise DataError(f"the embedded demo (cldr) has no {missing[0]!r}; its languages are {', '.join(LANGUAGES)}")
    chosen = languages or LANGUAGES
    every = {code: words(code) for code in LANGUAGES}  # a clash in one language leaves a content out of all
    texts = _Texts()
    for fact in facts(held_out):
        if any(map(held_out, fact.concepts)) != (split == "test"):
            continue
        asked = fact.questions
        if split == "test":
            asked = (asked[_hash(fact.content) // 100 % len(asked)],)
        passages = {code: fact.passage(w) for code, w in every.items()}
        questions = [{code: question(w) for code, w in every.items()} for question in asked]
        if not texts.take(questions, passages):
            continue
        for queries in questions:
            yield Row(
                {code: queries[code] for code in chosen},
                {code: passages[code] for code in chosen},
                {},
                fact.content,
                f"cldr: {fact.content}",
            )


class _Texts:
    """The texts of the contents so far, as hashes: a few bytes each, where the texts would take 40 MB."""

    def __init__(self) -> None:
        self._queries: set[int] = set()
        self._passages: set[int] = set()

    def take(self, questions: list[dict[str, str]], passages: dict[str, str]) -> bool:
        """Adds a content's texts, unless an earlier content has one of them or a question is its own passage."""
        asked = {_text(code, text) for queries in questions for code, text in queries.items()}
        told = {_text(code, text) for code, text in passages.items()}
        if asked & told or asked & self._queries or told & self._passages:
            return False
        self._queries |= asked
        self._passages |= told
        return True


def _text(language: str, text: str) -> int:
    return xxhash.xxh3_64_intdigest(f"{language} {folded(text)}".encode())


def held_out(concept: str) -> bool:
    """Whether a concept is for evaluation; fixed for ever by its name."""
    return _hash(concept) % 100 < HELD_OUT_PERCENT


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
