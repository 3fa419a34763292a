"""Make a bilingual dictionary for code-switching out of translated sentences.

python -m hbt_fast.lexicon --source corpus.tmx --languages en de --out lexicons
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from hbt_fast.base.command_line import UNREADABLE, new_parser
from hbt_fast.base.programs import program
from hbt_fast.base.ranges import check
from hbt_fast.data.align import induce, write
from hbt_fast.data.languages import normalise
from hbt_fast.data.rows import DataError
from hbt_fast.data.sources import Source, read_source

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

PROGRAM = "hbt_fast.lexicon"


@program(PROGRAM)
def main(arguments: list[str] | None = None) -> None:
    """Make a dictionary from the command line and say what is in it."""
    from jsonargparse import ArgumentError

    arguments = _paths_as_settings(sys.argv[1:] if arguments is None else arguments)
    made = parser()
    try:
        parsed = made.instantiate(made.parse_args(arguments))
        check(parsed.source, "source.")
        if not parsed.source.path and not parsed.source.files:
            raise DataError("source: give either path or files: --source FILE or --source.files {de: FILE, en: FILE}")
        options = {name: parsed[name] for name in induce.__kwdefaults__}
        skipped: list[str] = []
        first, second = map(normalise, parsed.languages)
        if first == second:
            raise DataError(f"languages: both are {first}; name two")
        path = Path(parsed.out) / f"{first}_{second}.tsv"
        pairs = translations(parsed.source, first, second, parsed.on_error, skipped)
        entries = induce(_counted(pairs, counter := [0], (first, second)), **options)
        if not entries:
            raise DataError(
                f"{counter[0]:,} sentence pairs gave no entry; give more, or a smaller min_count or min_probability"
            )
        write(entries, path)
    except (ArgumentError, *UNREADABLE) as error:
        raise DataError(f"{str(error).strip()}\n(--help lists the settings)") from None
    sources = len({entry.source for entry in entries})
    print(f"{len(entries):,} entries for {sources:,} words from {counter[0]:,} sentence pairs: {path}")
    if skipped:
        print(f"{len(skipped):,} malformed rows left out (on_error: skip), the first: {skipped[0]}")
    for entry in sorted(entries, key=lambda entry: -entry.count)[:5]:
        share = f"{entry.probability:6.1%} of {entry.source!r}, {entry.count:,} links"
        print(f"  {entry.source:<20} {entry.target:<20} {share}")


def parser() -> ArgumentParser:
    """The command line; `--source PATH` is short for `--source.path PATH`."""
    made = new_parser(PROGRAM, __doc__.splitlines()[0])
    made.add_class_arguments(Source, "source")
    made.set_defaults({"source.bitext": True})
    made.add_argument("--languages", nargs=2, required=True, metavar=("FROM", "TO"), help="the two languages: en de")
    made.add_argument("--out", required=True, metavar="FOLDER", help="where FROM_TO.tsv is written")
    made.add_argument(
        "--on_error",
        type=Literal["raise", "skip"],
        default="raise",
        help="raise stops at the first malformed row of the source; skip leaves such rows out",
    )
    made.add_function_arguments(induce, skip={"pairs"})
    return made


def translations(
    source: Source,
    first: str,
    second: str,
    on_error: Literal["raise", "skip"] = "raise",
    skipped: list[str] | None = None,
) -> Iterator[tuple[str, str]]:
    """(text, its translation) of a source: the texts that one row has in both languages on the same side.

    Raises:
        DataError: see `read_source`.
    """
    for row in read_source(source, (first, second), on_error, skipped):
        sides = (row.queries,) if row.queries == row.passages else (row.queries, row.passages)
        for side in sides:
            if first in side and second in side:
                yield side[first], side[second]


def _counted(
    pairs: Iterator[tuple[str, str]], counter: list[int], languages: Sequence[str]
) -> Iterator[tuple[str, str]]:
    for pair in pairs:
        counter[0] += 1
        yield pair
    if not counter[0]:
        raise DataError(
            f"source: no row has a text both in {languages[0]} and in {languages[1]}; name translations (a TMX, a TSV "
            "or JSON Lines with a column per language, line-aligned source.files) and the languages they have"
        )


def _paths_as_settings(arguments: Sequence[str]) -> list[str]:
    """`--source corpus.tmx` as `--source.path corpus.tmx`; `--source {path: ..., ...}` stays."""
    made, before = [], ""
    for argument in arguments:
        if before == "--source" and not argument.lstrip().startswith("{"):
            made[-1] = "--source.path"
        made.append(re.sub(r"^--source=(?!\s*{)", "--source.path=", argument))
        before = argument
    return made


if __name__ == "__main__":
    main()
