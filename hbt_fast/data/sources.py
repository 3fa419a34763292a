"""Sources: what a user names under data.sources, and the stream of rows that each gives.

The formats are in `hbt_fast.data.formats`; here are the settings, what is common to all formats (languages, empty
texts, skipping malformed rows, limits), and the files that a source is made of.
"""

from __future__ import annotations

import difflib
import math
import unicodedata
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Literal

from hbt_fast.base.ranges import NAME, PATH, TEXT, one_of, ranges, real, whole
from hbt_fast.data.languages import LANGUAGE, normalise
from hbt_fast.data.problems import (
    ALONE,
    EMPTY,
    LONGEST_LINE,
    LONGEST_TEXT,
    MALFORMED,
    UNWANTED,
    VARIANT,
    Problems,
    Tally,
)
from hbt_fast.data.reading import half_pair
from hbt_fast.data.rows import DataError, Row

NAMES = (
    "query", "passage", "negatives", "content", "language", "query_language", "passage_language", "id", "scores",
    "negative_scores", "prompt",
)  # fmt: skip
Format = Literal[
    "auto", "squad", "jsonl", "json", "csv", "tsv", "parquet", "arrow", "tmx", "lines", "judged", "hf", "ir_datasets",
    "cldr",
]  # fmt: skip
Layout = Literal["auto", "pairs", "flagembedding", "tevatron", "dpr", "messages", "anchors", "triplets"]

ONLY = {  # settings of a source that only some formats heed
    "bitext": ("auto", "jsonl", "json", "csv", "tsv", "parquet", "arrow", "tmx", "hf"),
    "passage": ("auto", "squad", "jsonl", "json", "csv", "tsv", "parquet", "arrow", "hf"),
    "fields": ("auto", "jsonl", "json", "csv", "tsv", "parquet", "arrow", "hf"),
    "pair": ("auto", "lines"),
    "columns": ("auto", "csv", "tsv"),
    "quoting": ("auto", "csv", "tsv"),
    "layout": ("auto", "squad", "jsonl", "json", "csv", "tsv", "parquet", "arrow", "hf"),
    "documents": ("auto", "lines"),
    "split": ("auto", "hf", "judged"),
    "config": ("hf",),
    "path": (
        "auto",
        "squad",
        "jsonl",
        "json",
        "csv",
        "tsv",
        "parquet",
        "arrow",
        "tmx",
        "lines",
        "judged",
        "hf",
        "ir_datasets",
    ),
    "files": ("auto", "squad", "jsonl", "tmx", "lines"),
    "exclude_paragraphs_of": ("auto", "squad"),
}


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
    prompts=(one_of("query", "passage"), TEXT),
    hard_negatives=whole(0, 2**16),
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
            passage_language, id, scores, negative_scores, prompt, as {query: question}; or several fields, as
            {negatives: [negative_1, negative_2]}, in which * stands for anything.
        layout: what the fields of records mean: pairs (query, passage, negatives), flagembedding (query, pos, neg),
            tevatron (query, positive_passages, negative_passages), dpr (question, positive_ctxs, hard_negative_ctxs),
            messages (messages, positive_messages, negative_messages), anchors (anchor, positive, negative, negative_1
            ...), triplets (query, positive, negative ...); auto goes by the first record.
        quoting: csv, tsv: quoted reads a cell between quotes as RFC 4180 says, plain takes quotes for characters; auto:
            csv is quoted, tsv is plain, and a cell that is all between quotes is an error.
        exclude_paragraphs_of: SQuAD files; every paragraph that has a question id or a text of theirs is left out.
        split: hf, judged: the split.
        config: hf: the data set's configuration.
        limit: take only so many rows.
        prompts: before its queries and passages, as {query: ..., passage: ...}, instead of those of the model; without
            it, the query prompt that its records name (FlagEmbedding's field "prompt").
        hard_negatives: per pair at most, instead of batch.hard_negatives.
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
    fields: dict[str, str | list[str]] = field(default_factory=dict)
    layout: Layout = "auto"
    quoting: Literal["auto", "quoted", "plain"] = "auto"
    exclude_paragraphs_of: list[str] = field(default_factory=list)
    split: str = "train"
    config: str | None = None
    limit: int | None = None
    prompts: dict[str, str] = field(default_factory=dict)
    hard_negatives: int | None = None
    weight: float | None = None


def refuse_unheeded(source: Source, kind: str, name: str) -> None:
    """See that nothing is set that a format has no use for.

    Args:
        source: the settings.
        kind: of the formats, "auto" for one of those that is found by looking.
        name: of the source, for the message.

    Raises:
        DataError: something is.
    """
    unlike = Source()
    for setting, formats in ONLY.items():
        if kind not in formats and getattr(source, setting) != getattr(unlike, setting):
            raise DataError(
                f"{name}.{setting} is set, which format {kind} has no use for; leave it out, or write another format "
                f"({' or '.join(formats)})"
            )


def read_source(
    source: Source,
    languages: tuple[str, ...] | None = None,
    on_error: Literal["raise", "skip"] = "raise",
    skipped: list[str] | None = None,
    *,
    tally: Tally | None = None,
    longest_line: int = LONGEST_LINE,
    longest_text: int = LONGEST_TEXT,
) -> Iterator[Row]:
    """The rows of a source, one at a time.

    Texts are NFC-normalised and stripped; languages are short codes (see `normalise`). A row without a query and a
    passage in the wanted languages is left out and counted: it is not an error not to be in these languages.

    Args:
        source: where to read.
        languages: keep only texts in these.
        on_error: "raise" stops at the first malformed row; "skip" appends "file:line: reason" to `skipped`. Of a row
            with texts in many languages the malformed ones are left out.
        skipped: gets what was skipped; None: `tally.skipped` does.
        tally: gets the counts of what was read and left out.
        longest_line: bytes of a line; a longer one is malformed.
        longest_text: characters of a text; a longer one is malformed.

    Raises:
        DataError: what is wrong, in which file and line, and what to write instead.
    """
    from hbt_fast.data import formats

    limits = {"longest_line": longest_line, "longest_text": longest_text}
    problems = Problems(on_error == "skip", skipped, tally=tally, **limits)
    wanted = {normalise(code) for code in languages} if languages else None
    problems.languages = wanted
    kind = _format(source, longest_line)
    if source.format == "auto":
        refuse_unheeded(source, kind, f"source {source.name or source.path or 'files'}")
    reader = getattr(formats, f"read_{kind}")
    rows = _cleaned(reader(source, problems), wanted, problems)
    yield from islice(rows, source.limit)
    for layout in problems.tally.layouts:
        layout.check()


def _cleaned(rows: Iterator[Row], wanted: set[str] | None, problems: Problems) -> Iterator[Row]:
    tally = problems.tally
    for row in rows:
        lost: dict[tuple[str, str], None] = {}  # an ordered set of language, why a text in it is left out
        wrong: dict[str, None] = {}  # an ordered set
        queries = _texts(row.queries, wanted, problems, lost, wrong)
        passages = queries
        if row.passages is not row.queries:
            passages = _texts(row.passages, wanted, problems, lost, wrong)
        negatives, negative_scores = _negatives(row, wanted, problems, wrong)
        for reason in wrong:
            problems.note(row.where, reason)
        there = queries.keys() | passages.keys()
        tally.row(there | {language for language, _ in lost})
        for language, reason in lost:
            if reason == VARIANT or language not in there:
                tally.languages[language][reason] += 1
        if not queries or not passages:
            tally.lose(MALFORMED if wrong else UNWANTED if lost else EMPTY, there)
        elif len(queries) == len(passages) == 1 and queries == passages:
            tally.lose(MALFORMED if wrong else ALONE, there)  # nothing to learn from
        else:
            yield Row(
                queries, passages, negatives, row.content, row.where, row.score, negative_scores, prompt=row.prompt
            )


def _texts(
    texts: dict[str, str],
    wanted: set[str] | None,
    problems: Problems,
    lost: dict[tuple[str, str], None],
    wrong: dict[str, None],
) -> dict[str, str]:
    """The wanted texts by short language code; why others are `lost`, and what is `wrong` with those of them."""
    kept: dict[str, str] = {}
    for code, text in texts.items():
        try:
            language = normalise(code)
        except DataError as error:
            wrong[str(error)] = None
            continue
        if wanted is not None and language not in wanted:
            lost[language, UNWANTED] = None
            continue
        text = unicodedata.normalize("NFC", text).strip()
        if reason := _unusable(text, code, problems.longest_text):
            lost[language, MALFORMED] = None
            wrong[reason] = None
        elif language in kept:
            lost[language, VARIANT] = None
        else:
            kept[language] = text
    return kept


def _negatives(
    row: Row, wanted: set[str] | None, problems: Problems, wrong: dict[str, None]
) -> tuple[dict[str, tuple[str, ...]], dict[str, tuple[float, ...]]]:
    """The wanted hard negatives, as `_texts`, and their scores; empty ones are passed over."""
    kept: dict[str, tuple[str, ...]] = {}
    kept_scores: dict[str, tuple[float, ...]] = {}
    for code, texts in row.negatives.items():
        try:
            language = normalise(code)
        except DataError as error:
            wrong[str(error)] = None
            continue
        if not texts or not (wanted is None or language in wanted):
            continue
        own, own_scores = [], []
        scores = row.negative_scores.get(code) or (math.nan,) * len(texts)
        for n, text in enumerate(texts):
            text = unicodedata.normalize("NFC", text).strip()
            reason = _unusable(text, code, problems.longest_text) if text else ""
            if reason:
                wrong[reason] = None
            elif text:
                own.append(text)
                own_scores += scores[n : n + 1]
        kept[language] = (*kept.get(language, ()), *own)
        if row.negative_scores:
            kept_scores[language] = (*kept_scores.get(language, ()), *own_scores)
    return kept, kept_scores


def _unusable(text: str, code: str, longest: int) -> str:
    """What is wrong with a text; "" if nothing is."""
    if not text:
        return f"empty text ({code})"
    if len(text) > longest:
        return (
            f"a text of {len(text):,} characters ({code}); data.longest_text is {longest:,}: split the text, or write "
            "a larger data.longest_text"
        )
    return half_pair(text)


def _format(source: Source, longest_line: int = LONGEST_LINE) -> str:
    from hbt_fast.data.collection_files import kind_of_file
    from hbt_fast.data.containers import BESIDE, CONTAINERS, ending, kind_of_json

    if source.format == "cldr":
        return "cldr"
    if (source.path is None) == (not source.files):
        raise DataError(f"source {source.name or ''!r}: give either path or files (one file per language)")
    if source.format != "auto":
        return source.format
    path = source.path or next(iter(source.files.values()))
    found = {**CONTAINERS, ".tmx": "tmx", ".txt": "lines"}.get(ending(path))
    here, kinds = Path(path).expanduser(), set()
    if found is None and (here.is_dir() or any(c in here.name for c in "*?[")):
        inside = expand(path)
        kinds = {CONTAINERS.get(ending(name)) for name in inside if Path(name).name not in BESIDE} - {None}
        found = "json" if "json" in kinds else next(iter(sorted(kinds)), None)
        relative = [Path(name.rpartition("::")[2]).relative_to(here) for name in inside] if here.is_dir() else []
        if any(kind_of_file(name) in ("qrels", "triples") for name in relative):
            found = "judged"
        if (here / "dataset_info.json").is_file() or (here / "dataset_dict.json").is_file():
            found = "hf"
    if found == "json":
        first = next(name for name in expand(path) if ending(name) == ".json" and Path(name).name not in BESIDE)
        found = "squad" if source.files else kind_of_json(first, longest_line)
        if found == "squad" and len(kinds) > 1:
            raise DataError(
                f"{path}: holds SQuAD JSON ({Path(first).name}) beside files of other kinds ({', '.join(sorted(kinds))}"
                "); give each kind a source of its own"
            )
    if found is None:
        raise DataError(
            f"{path}: cannot tell the format from the name; set the source's format to squad, jsonl, json, csv, tsv, "
            "parquet, arrow, tmx, lines, judged or hf"
        )
    return found


def _members(path: str) -> list[str]:
    """The members of a zip archive that has several, as zip://MEMBER::ARCHIVE; of any other file itself."""
    if not path.lower().endswith(".zip"):
        return [path]
    try:
        with zipfile.ZipFile(path) as archive:
            names = [one.filename for one in archive.infolist() if not one.is_dir()]
            first = archive.infolist()[0].filename if names else ""
    except (OSError, zipfile.BadZipFile, ValueError):  # who reads it says what is wrong
        return [path]
    names = [n for n in names if not any(part.startswith((".", "__MACOSX")) for part in n.split("/"))]
    return [path] if len(names) == 1 and names[0] == first else [f"zip://{name}::{path}" for name in names]


def input_files(source: Source) -> list[Path]:
    """The local files a source is made of (archives, not their members): a store is rebuilt when one changes."""
    paths = [source.path] if source.path else list(source.files.values())
    paths += [*source.exclude_paragraphs_of, *([source.documents] if source.documents else [])]
    if source.format == "hf" and not Path(source.path or "").is_dir():
        return []  # a hub name: the settings say all there is to say
    if source.format in ("cldr", "ir_datasets"):
        return []
    found = []
    for path in paths:
        found += [Path(name.rpartition("::")[2]) for name in expand(path.rpartition("::")[2])]
    return list(dict.fromkeys(found))


def expand(path: str) -> list[str]:
    """The files of a path: itself, a folder's files, or the matches of a glob (each for the ARCHIVE of zip://M::ARCHIVE).

    Raises:
        DataError: nothing there; names what is near.
    """
    member, separator, local = path.rpartition("::")
    try:
        here = Path(local).expanduser()
        if here.is_file():  # also one called "train[1].jsonl"
            found = [str(here)]
        elif here.is_dir():
            inside = sorted(str(p) for p in here.rglob("*") if p.is_file())
            found = [p for p in inside if not any(name.startswith(".") for name in Path(p).relative_to(here).parts)]
        elif any(c in here.name for c in "*?["):
            found = sorted(str(p) for p in here.parent.glob(here.name))
        else:
            found = []
    except (OSError, ValueError, RuntimeError, NotImplementedError) as error:  # ~nobody, "a**", a name of 300 letters
        raise DataError(f"{local}: no file can be named so ({error})") from None
    if not found:
        names = [p.name for p in here.parent.iterdir()] if here.parent.is_dir() else []
        near = difflib.get_close_matches(here.name, names, 3, 0.5)
        hint = f"; in that folder there are {', '.join(near)}" if near else ""
        hint = hint or ("" if here.parent.is_dir() else f"; there is no folder {here.parent}")
        raise DataError(f"{local}: no such file{hint}")
    if not member:
        return [name for path in found for name in _members(path)]
    return [f"{member}{separator}{name}" for name in found]
