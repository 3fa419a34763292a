"""One training example as the readers give it: a question and its passage, in one or many languages."""

from __future__ import annotations

from dataclasses import dataclass, field

from hbt_fast.base.errors import UserError


class DataError(UserError):
    """Bad input data. The message names the file and line (or the setting) and what to write instead."""


@dataclass(frozen=True, slots=True)
class Row:
    """A question, its positive passage and hard negatives, each in the languages in which the source has them.

    A plain pair has one query and one passage: ``Row({"en": "Who ...?"}, {"en": "It was ..."})``. Parallel data has
    more: every language of `queries` may be matched with every language of `passages`. Bitext has the same texts on
    both sides; a text is never its own positive, so such a row serves cross-lingual batches only.

    Args:
        queries: language code -> query text.
        passages: language code -> text of the positive passage (translations of one passage).
        negatives: language code -> texts of hard negatives.
        content: content id in the source's own terms: rows with equal content never meet in one batch. None: the
            store takes the passage texts alone (equal passage texts always share a content id).
        where: "file:line" (or the like) for error messages.
        score: a teacher's of query and passage; None: there is none.
        prompt: before its queries, instead of that of all; None: it has none of its own.
        negative_scores: language code -> of query and each hard negative; a language that has none is not there.
    """

    queries: dict[str, str]
    passages: dict[str, str]
    negatives: dict[str, tuple[str, ...]] = field(default_factory=dict)
    content: str | None = None
    where: str = ""
    score: float | None = None
    negative_scores: dict[str, tuple[float, ...]] = field(default_factory=dict)
    prompt: str | None = None
