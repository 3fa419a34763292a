"""What becomes of rows that cannot be used: an error at the first, or left out, listed and counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hbt_fast.data.languages import is_language, normalise
from hbt_fast.data.rows import DataError

if TYPE_CHECKING:
    from hbt_fast.data.layouts import Layout

LONGEST_LINE, LONGEST_TEXT = 1 << 24, 1_000_000  # bytes, characters

MALFORMED = "malformed"
UNWANTED = "not in data.languages"
VARIANT = "beside another of their language, as zh-TW beside zh-CN"  # the first is taken
ALONE = "a text without its translation"
EMPTY = "an empty line"
NO_ANSWER = "a question without one answer to go by"
EXCLUDED = "in exclude_paragraphs_of"


@dataclass
class Tally:
    """What was read and what of it was left out.

    Attributes:
        read: rows that were read.
        left_out: reason -> rows of which nothing was kept.
        languages: language -> "read": rows that have a text in it; and reason -> those of which no text in it was kept.
        skipped: "file:line: reason" of what is malformed.
        layouts: how the records of each source were read.
    """

    read: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    languages: dict[str, Counter[str]] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    layouts: list[Layout] = field(default_factory=list)

    def row(self, languages: Iterable[str] = ()) -> None:
        """Count a row that was read, with texts in these languages."""
        self.read += 1
        for language in languages:
            self.languages.setdefault(language, Counter())["read"] += 1

    def lose(self, reason: str, languages: Iterable[str] = ()) -> None:
        """Count a row that is left out, with its texts in these languages."""
        self.left_out[reason] += 1
        for language in languages:
            self.languages.setdefault(language, Counter())[reason] += 1

    def leave_out(self, reason: str, language: str, whole: bool) -> None:
        """Count what a reader leaves out: a whole row, or a text of one, in a language as the source calls it."""
        try:
            language = normalise(language)
        except DataError:
            language = str(language)
        if whole:
            self.row([language])
            self.lose(reason, [language])
        else:
            self.languages.setdefault(language, Counter()).update(["read", reason])

    def plain(self) -> dict[str, Any]:
        """As JSON, without what is listed in `skipped`."""
        languages = {code: dict(sorted(found.items())) for code, found in sorted(self.languages.items())}
        return {
            "read": self.read,
            "left_out": dict(sorted(self.left_out.items())),
            "languages": languages,
            "layouts": [layout.plain() for layout in self.layouts],
        }

    def __str__(self) -> str:
        """Why rows were left out, in words."""
        if self.read and self.left_out[MALFORMED] == self.read:
            return f"all {self.read:,} rows were malformed, the first: {self.skipped[0]}"
        unwanted = (f"{code} {found[UNWANTED]:,}" for code, found in sorted(self.languages.items()) if found[UNWANTED])
        more = {UNWANTED: ", ".join(unwanted), MALFORMED: f"the first: {self.skipped[0]}" if self.skipped else ""}
        parts = [
            f"{count:,} {reason}" + (f" ({more[reason]})" if more.get(reason) else "")
            for reason, count in sorted(self.left_out.items())
        ]
        return f"of {self.read:,} rows read: {'; '.join(parts)}" if parts else f"{self.read:,} rows were read"


class Problems:
    """Malformed rows: raised at once, or left out, listed and counted when the user asked to skip them.

    Args:
        skip: do not raise.
        skipped: gets "file:line: reason" of each; None: the tally's own list does.
        tally: gets the counts.
        longest_line: bytes of a line; a longer one is malformed.
        longest_text: characters of a text; a longer one is malformed.
    """

    def __init__(
        self,
        skip: bool = False,
        skipped: list[str] | None = None,
        *,
        tally: Tally | None = None,
        longest_line: int = LONGEST_LINE,
        longest_text: int = LONGEST_TEXT,
    ) -> None:
        self.skip, self.tally = skip, Tally() if tally is None else tally
        if skipped is not None:
            self.tally.skipped = skipped
        self.longest_line, self.longest_text = longest_line, longest_text
        self.languages: set[str] | None = None

    def wants(self, code: str) -> bool:
        """Whether texts in a language are to be read at all; others need not be."""
        return self.languages is None or not is_language(code) or normalise(code) in self.languages

    def report(self, where: str, reason: str) -> None:
        """A row that cannot be used: raise DataError, or note it and return."""
        self.note(where, reason)
        self.tally.row()
        self.tally.lose(MALFORMED)

    def note(self, where: str, reason: str) -> None:
        """A part of a row that cannot be used: raise DataError, or list it and return."""
        if not self.skip:
            raise DataError(f"{where}: {reason} (data.on_error: skip leaves such rows out and lists them)")
        self.tally.skipped.append(f"{where}: {reason}")


class Strict(Problems):
    """Malformed lines end an evaluation: a score over half of the data would pass for a score."""

    def note(self, where: str, reason: str) -> None:
        """Raise DataError."""
        raise DataError(f"{where}: {reason}")
