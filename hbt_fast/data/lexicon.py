"""Bilingual dictionaries for code-switching, and what a word is.

Two forms are read. GATITOS (arXiv 2303.15265): `en_es.tsv` or `es_en.tsv`, a line is source<TAB>target, with further
targets in further columns or on further lines. MUSE (arXiv 1710.04087): `en-es.txt`, source and target with a space or
a tab between them. The two languages come from the file's name.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import regex
import xxhash

from hbt_fast.data.languages import normalise
from hbt_fast.data.problems import Problems
from hbt_fast.data.reading import lines
from hbt_fast.data.rows import DataError
from hbt_fast.data.sources import expand

TSHEG = "\u0f0b"  # stands between the syllables of Tibetan, inside words as well as between them
_SCRIPTS = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}"
# what words of these scripts are made of: letters, marks, the long-vowel sign (of no one script), the tsheg; no digits
UNSPACED = rf"[[[{_SCRIPTS}]&&[\p{{L}}\p{{M}}\u3007]]\u30fc{TSHEG}]"
# regex's \w, unlike re's, holds marks and joiners (Hindi, Persian), which do not end a word
WORD = regex.compile(rf"(?V1)({UNSPACED}[{UNSPACED}\p{{M}}]*|[\w--{UNSPACED}]+)")
SPACED_WORD = regex.compile(r"(\w+)")  # the same, many times faster, where no character of `BLOCKS` is in the text
ASCII_WORD = re.compile(r"(\w+)", re.ASCII)  # and faster again
BLOCKS = re.compile(
    "[\u0e00-\u109f\u1780-\u17ff\u2e80-\u31ff\u3220-\u9fff\ua9e0-\uaa7f\uf900-\ufaff\uff66-\uff9f"
    "\U00016fe0-\U00016fff\U0001aff0-\U0001b16f\U00020000-\U0003ffff]"
)
RUN = regex.compile(rf"(?V1){UNSPACED}")  # what a word of a script without spaces begins with: rather a run of words


def fold(text: str) -> str:
    """The form in which words are compared: NFC, case folded, single spaces."""
    text = unicodedata.normalize("NFC", text).casefold()
    return unicodedata.normalize("NFC", " ".join(text.split()))


class Lexicon:
    """Word translations of several language pairs.

    Args:
        tables: (source language, target language) -> folded source -> translations in order.
    """

    def __init__(self, tables: Mapping[tuple[str, str], Mapping[str, tuple[str, ...]]]) -> None:
        self._tables = {pair: MappingProxyType(dict(table)) for pair, table in sorted(tables.items()) if table}

    @classmethod
    def read(
        cls,
        paths: Sequence[str | Path],
        *,
        languages: Collection[str] | None = None,
        on_error: Literal["raise", "skip"] = "raise",
        skipped: list[str] | None = None,
    ) -> Lexicon:
        """Read dictionaries.

        Where only one direction of a pair is there, the other is its inverse. Pairs that would need a third language
        are not made. Of a folder, files are read whose names end in .tsv, and those in .txt that are named after two
        languages (so that a LICENSE.txt may stand beside them); each may be .gz.

        Args:
            paths: files, folders or globs.
            languages: read only files whose two languages are both among these (170 languages take a gigabyte).
            on_error: "raise" stops at the first malformed line; "skip" appends "file:line: reason" to `skipped`.
            skipped: gets what was skipped.

        Raises:
            DataError: a malformed line, a file name without two languages, no entry at all; says where and what to
                write instead.
        """
        if isinstance(paths, str | Path):
            paths = [paths]
        problems = Problems(on_error == "skip", [] if skipped is None else skipped)
        wanted = None if languages is None else {normalise(code) for code in languages}
        files = [named for path in paths for named in _files(str(path)) if wanted is None or wanted >= set(named[1])]
        there = {pair for _, pair in files}
        tables: dict[tuple[str, str], dict[str, dict[str, None]]] = {}  # the inner dict is an ordered set
        for path, (source, target) in files:
            forward = tables.setdefault((source, target), {})
            inverse = None if (target, source) in there else tables.setdefault((target, source), {})
            for left, right in _entries(path, problems):
                forward.setdefault(fold(left), {})[_after_lower(left, right)] = None
                if inverse is not None:
                    inverse.setdefault(fold(right), {})[_after_lower(right, left)] = None
        if not any(tables.values()):
            among = f" with both languages among {', '.join(sorted(wanted))}" if wanted is not None else ""
            raise DataError(
                f"lexicons: no entry in {', '.join(map(str, paths)) or 'an empty list of paths'}{among}; name "
                "dictionaries such as en_de.tsv with source<TAB>target on each line"
            )
        return cls({pair: {key: tuple(found) for key, found in table.items()} for pair, table in tables.items()})

    def translations(self, source_language: str, target_language: str) -> Mapping[str, tuple[str, ...]]:
        """Folded source word or phrase -> its translations, in file order, without repeats.

        Translations are written as they follow a lower-case source: "Hello / Hola" gives "hola", "house / Haus" gives
        "Haus".

        Raises:
            DataError: no such pair in the lexicon.
        """
        pair = normalise(source_language), normalise(target_language)
        if pair not in self._tables:
            targets = ", ".join(self.targets(pair[0])) or "no language"
            raise DataError(
                f"lexicons: no entries from {pair[0]} to {pair[1]} (from {pair[0]} there is {targets}); add a file "
                f"{pair[0]}_{pair[1]}.tsv"
            )
        return self._tables[pair]

    def targets(self, source_language: str) -> tuple[str, ...]:
        """The languages into which words of this one can be translated, sorted."""
        source = normalise(source_language)
        return tuple(target for language, target in self._tables if language == source)

    @property
    def languages(self) -> tuple[str, ...]:
        """All languages, sorted."""
        return tuple(sorted({language for pair in self._tables for language in pair}))

    @property
    def fingerprint(self) -> str:
        """A hash of all entries in their order, whichever files they are from."""
        entries = xxhash.xxh3_64()
        for pair in sorted(self._tables):
            entries.update(repr((pair, list(self._tables[pair].items()))).encode("utf-8", "surrogatepass"))
        return entries.hexdigest()


def _files(path: str) -> Iterator[tuple[str, tuple[str, str]]]:
    """(file, its two languages) of a path."""
    folder = Path(path).expanduser().is_dir()
    for file in expand(path):
        name = Path(file.split("::")[0]).name.removesuffix(".gz")
        if folder and not name.endswith((".tsv", ".txt")):
            continue
        try:
            yield file, _pair(file, name)
        except DataError:
            if not folder or name.endswith(".tsv"):
                raise


def _pair(file: str, name: str) -> tuple[str, str]:
    stem = name.partition(".")[0]  # MUSE has en-de.0-5000.txt
    codes = stem.split("_") if "_" in stem else stem.split("-")
    ask = "name it after its two languages, source first: en_de.tsv (en_zh-CN.tsv where a code has a hyphen)"
    if len(codes) != 2:
        raise DataError(f"{file}: which languages are these? {ask}")
    try:
        source, target = map(normalise, codes)
    except DataError as error:
        raise DataError(f"{file}: {error}; {ask}") from None
    if source == target:
        raise DataError(f"{file}: both languages are {source} here (regions and scripts do not count); {ask}")
    return source, target


def _entries(path: str, problems: Problems) -> Iterator[tuple[str, str]]:
    """(source, target) of a file, NFC, as written."""
    tabs_only = path.split("::")[0].removesuffix(".gz").endswith(".tsv")
    for number, text in lines(path, problems):
        if text is None or not text.strip():
            continue
        tabs = tabs_only or "\t" in text
        cells = [" ".join(cell.split()) for cell in unicodedata.normalize("NFC", text).split("\t" if tabs else None)]
        if tabs and len(cells) < 2:
            problems.report(f"{path}:{number}", "one column; a source, a tab and a target are needed")
        elif not tabs and len(cells) != 2:
            reason = f"{len(cells)} words; a source and a target are needed, with a tab between them if either has more"
            problems.report(f"{path}:{number}", f"{reason} than one word")
        elif not all(cells):
            side = "source" if not cells[0] else f"target (column {cells.index('') + 1})"
            problems.report(f"{path}:{number}", f"the {side} is empty; write it, or take the line out")
        else:
            yield from ((cells[0], target) for target in cells[1:])


def _after_lower(source: str, target: str) -> str:
    """A translation as it would follow the source in lower case: a capital that both sides have is the entry's."""
    if not (source[0].isupper() and target[0].isupper()):
        return target
    if len(source) > 1 and source.isupper() and target.isupper():
        return target.lower()
    return target[0].lower() + target[1:]


def split(text: str) -> tuple[list[str], list[int]]:
    """The words of an NFC text, folded, and where they begin and end: word i is text[edges[2 * i] : edges[2 * i + 1]].

    Runs of scripts without spaces stay whole.
    """
    if text.isascii():
        parts = ASCII_WORD.split(text.lower())
        return parts[1::2], [*accumulate(map(len, parts))]
    parts = (WORD if BLOCKS.search(text) else SPACED_WORD).split(text)
    folded = unicodedata.normalize("NFC", "\n".join(parts[1::2]).casefold())  # one call for all words
    return folded.split("\n") if len(parts) > 1 else [], [*accumulate(map(len, parts))]


def has_letter(word: str) -> bool:
    """Whether a word is more than digits and underscores."""
    return word.isalpha() or any(map(str.isalpha, word))


def unspaced_share(texts: Sequence[str]) -> float:
    """How much of the texts' words is in scripts that put no spaces between words, 0 to 1."""
    total = unspaced = 0
    for text in texts:
        for word in WORD.findall(text):
            total += len(word)
            unspaced += len(word) if RUN.match(word) else 0
    return unspaced / max(total, 1)
