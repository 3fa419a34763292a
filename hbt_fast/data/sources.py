"""Sources: what a user names under data.sources, and the stream of rows that each gives.

The formats are in `hbt_fast.data.formats`; here are the settings, what is common to all formats (languages, empty
texts, skipping malformed rows, limits), and the files that a source is made of.
"""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Literal

from hbt_fast.base.ranges import NAME, PATH, one_of, ranges, real, whole
from hbt_fast.data.languages import LANGUAGE, normalise
from hbt_fast.data.rows import DataError, Row

NAMES = ("query", "passage", "negatives", "content", "language", "query_language", "passage_language", "id")
Format = Literal["auto", "squad", "jsonl", "tsv", "tmx", "lines", "hf", "cldr"]


@ranges(
    path=PATH,
    files=(LANGUAGE, PATH),
    name=NAME,
    language=LANGUAGE,
    columns=NAME,
    documents=PATH,
    fields=(one_of(*NAMES), NAME),
    exclude_paragraphs_of=PATH,
    split=NAME,
    config=NAME,
    limit=whole(1),
    weight=real(0, 1e9),
)
@dataclass(frozen=True)
class Source:
    """One training source.

    Args:
        path: a file, a folder, a glob, or a member of a zip archive as zip://MEMBER::ARCHIVE; .gz is read as such. For
            format hf: a hub name or a local folder.
        files: language -> path, for parallel data that has one file per language. Rows are joined by question id
            (squad), by the id field (jsonl) or by line number (lines).
        format: squad (SQuAD JSON, or JSON Lines with context, question and answers), jsonl, tsv, tmx, lines, hf
            (Hugging Face datasets), cldr (the embedded demo); auto goes by the file's ending.
        name: in reports; the file's name if not given. Sources of one name are one: their rows are read one after the
            other and share batches.
        language: of all texts, where the format does not say it.
        bitext: texts are translations of each other rather than question and answer; each serves as query and as
            passage (tmx always; tsv and jsonl on request, their columns are language codes then).
        passage: squad: sentence takes the sentence that holds the answer, paragraph the whole paragraph.
        pair: lines: translation pairs a line with its translations; next with the line that follows it.
        columns: tsv: the names of the columns of a file without a first line that names them.
        documents: lines: a file with the document of each line, so that next does not pair across documents.
        fields: what this source calls query, passage, negatives, content, language, query_language,
            passage_language, id: {query: question}.
        exclude_paragraphs_of: SQuAD files; every paragraph that has a question id or a text of theirs is left out.
        split: hf: the split.
        config: hf: the data set's configuration.
        limit: take only so many rows.
        weight: how often batches come from here, relative to other sources; null: by size.
    """

    path: str | None = None
    files: dict[str, str] = field(default_factory=dict)
    format: Format = "auto"
    name: str | None = None
    language: str | None = None
    bitext: bool = False
    passage: Literal["sentence", "paragraph"] = "sentence"
    pair: Literal["translation", "next"] = "translation"
    columns: list[str] = field(default_factory=list)
    documents: str | None = None
    fields: dict[str, str] = field(default_factory=dict)
    exclude_paragraphs_of: list[str] = field(default_factory=list)
    split: str = "train"
    config: str | None = None
    limit: int | None = None
    weight: float | None = None


class Problems:
    """Malformed rows: raised at once, or collected when the user asked to skip them."""

    def __init__(self, skip: bool, skipped: list[str]) -> None:
        self.skip, self.skipped = skip, skipped

    def report(self, where: str, reason: str) -> None:
        """Raise DataError, or note it and return."""
        if not self.skip:
            raise DataError(f"{where}: {reason} (data.on_error: skip leaves such rows out and lists them)")
        self.skipped.append(f"{where}: {reason}")


def read_source(
    source: Source,
    languages: tuple[str, ...] | None = None,
    on_error: Literal["raise", "skip"] = "raise",
    skipped: list[str] | None = None,
) -> Iterator[Row]:
    """The rows of a source, one at a time.

    Texts are NFC-normalised and stripped; languages are short codes (see `normalise`). A row without a query and a
    passage in the wanted languages is left out silently: it is not an error not to be in these languages.

    Args:
        source: where to read.
        languages: keep only texts in these.
        on_error: "raise" stops at the first malformed row; "skip" appends "file:line: reason" to `skipped`.
        skipped: gets what was skipped.

    Raises:
        DataError: what is wrong, in which file and line, and what to write instead.
    """
    from hbt_fast.data import formats

    problems = Problems(on_error == "skip", [] if skipped is None else skipped)
    wanted = {normalise(code) for code in languages} if languages else None
    kind = _format(source)
    reader = getattr(formats, f"read_{kind}")
    rows = _cleaned(reader(source, problems), wanted, problems)
    yield from islice(rows, source.limit)


def _cleaned(rows: Iterator[Row], wanted: set[str] | None, problems: Problems) -> Iterator[Row]:
    for row in rows:
        queries, wrong = _texts(row.queries, wanted)
        passages, also_wrong = _texts(row.passages, wanted)
        for reason in dict.fromkeys(wrong + also_wrong):
            problems.report(row.where, reason)
        if not queries or not passages:
            continue
        if len(queries) == len(passages) == 1 and queries == passages:
            continue  # bitext of which only one language is wanted: nothing to learn from
        negatives = {}
        for code, texts in row.negatives.items():
            language = normalise(code)
            if texts and (wanted is None or language in wanted):
                cleaned = (unicodedata.normalize("NFC", text).strip() for text in texts)
                negatives[language] = tuple(text for text in cleaned if text)
        yield Row(queries, passages, negatives, row.content, row.where)


def _texts(texts: dict[str, str], wanted: set[str] | None) -> tuple[dict[str, str], list[str]]:
    """The wanted texts by short language code, and what is wrong with the others."""
    kept, wrong = {}, []
    for code, text in texts.items():
        try:
            language = normalise(code)
        except DataError as error:
            wrong.append(str(error))
            continue
        text = unicodedata.normalize("NFC", text).strip()
        if wanted is None or language in wanted:
            if text:
                kept.setdefault(language, text)  # of two variants of a language (zh-CN, zh-TW) the first is taken
            else:
                wrong.append(f"empty text ({code})")
    return kept, wrong


def _format(source: Source) -> str:
    if source.format == "cldr":
        return "cldr"
    if (source.path is None) == (not source.files):
        raise DataError(f"source {source.name or ''!r}: give either path or files (one file per language)")
    if source.format != "auto":
        return source.format
    path = (source.path or next(iter(source.files.values()))).split("::")[0].removesuffix(".gz")
    endings = {".json": "squad", ".jsonl": "jsonl", ".ndjson": "jsonl", ".tsv": "tsv", ".tmx": "tmx", ".txt": "lines"}
    found = endings.get(Path(path).suffix)
    if found is None and Path(path).is_dir() and any(Path(path).glob("*.json")):
        found = "squad"
    if found is None:
        raise DataError(
            f"{path}: cannot tell the format from the name; set the source's format to squad, jsonl, tsv, tmx, lines "
            "or hf"
        )
    return found


def input_files(source: Source) -> list[Path]:
    """The local files a source is made of (archives, not their members): a store is rebuilt when one changes."""
    paths = [source.path] if source.path else list(source.files.values())
    paths += [*source.exclude_paragraphs_of, *([source.documents] if source.documents else [])]
    if source.format == "hf" and not Path(source.path or "").is_dir():
        return []  # a hub name: the settings say all there is to say
    if source.format == "cldr":
        return []
    found = []
    for path in paths:
        found += [Path(name) for name in expand(path.rpartition("::")[2])]
    return found


def expand(path: str) -> list[str]:
    """The files of a path: itself, a folder's files, or the matches of a glob (each for the ARCHIVE of zip://M::ARCHIVE).

    Raises:
        DataError: nothing there; names what is near.
    """
    member, separator, local = path.rpartition("::")
    here = Path(local).expanduser()
    if here.is_dir():
        found = sorted(str(p) for p in here.rglob("*") if p.is_file() and not p.name.startswith("."))
    elif any(c in here.name for c in "*?["):
        found = sorted(str(p) for p in here.parent.glob(here.name))
    else:
        found = [str(here)] if here.is_file() else []
    if not found:
        names = [p.name for p in here.parent.iterdir()] if here.parent.is_dir() else []
        near = difflib.get_close_matches(here.name, names, 3, 0.4)
        hint = f"; in that folder there are {', '.join(near)}" if near else ""
        hint = hint or ("" if here.parent.is_dir() else f"; there is no folder {here.parent}")
        raise DataError(f"{local}: no such file{hint}")
    return [f"{member}{separator}{name}" for name in found]
