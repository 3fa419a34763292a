"""Readers of the text formats: each turns a source into rows. What is common to all is in `hbt_fast.data.sources`."""

from __future__ import annotations

import csv
import json
import zlib
from collections.abc import Iterator
from itertools import zip_longest
from typing import Any

from hbt_fast.data.rows import DataError, Row
from hbt_fast.data.sources import NAMES, Problems, Source, expand


def lines(path: str) -> Iterator[tuple[int, str]]:
    """(line number from 1, text without its end) of a UTF-8 file, which may be .gz or a member of a .zip.

    Raises:
        DataError: not UTF-8 (names the line), empty, or not readable.
    """
    import fsspec

    number = 0
    try:
        with fsspec.open(path, "rb", compression="infer") as file:
            for number, raw in enumerate(file, 1):
                try:
                    yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
                except UnicodeDecodeError as error:
                    raise DataError(
                        f"{path}:{number}: not UTF-8 (byte {error.start} of the line is 0x{raw[error.start]:02x}); "
                        "convert the file, for instance: iconv -f latin1 -t utf-8"
                    ) from None
    except (OSError, KeyError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({type(error).__name__}: {error})") from None
    if not number:
        raise DataError(f"{path}: empty file")


def records(path: str, problems: Problems) -> Iterator[tuple[str, dict[str, Any]]]:
    """("file:line", object) of a JSON Lines file; blank lines are passed over."""
    for number, text in lines(path):
        where = f"{path}:{number}"
        if not text.strip():
            continue
        try:
            record = json.loads(text)
        except json.JSONDecodeError as error:
            problems.report(where, f"not JSON: {error.msg} at column {error.colno}")
            continue
        if not isinstance(record, dict):
            problems.report(where, f"a JSON object is needed, this is a {type(record).__name__}")
            continue
        yield where, record


def read_jsonl(source: Source, problems: Problems) -> Iterator[Row]:
    """JSON Lines: one pair a line, or n-way texts by language, or one file per language joined by the id field."""
    if source.files:
        yield from _joined(source, problems)
        return
    for path in expand(source.path):
        for where, record in records(path, problems):
            if "question" in record and "context" in record and not source.fields:
                # SQuAD as JSON Lines
                from hbt_fast.data.squad import row_of_record

                made = row_of_record(record, source, where, problems)
            else:
                made = _row(record, source, where, problems)
            if made is not None:
                yield made


def _joined(source: Source, problems: Problems) -> Iterator[Row]:
    """One file per language, joined by id (a suffix _LANGUAGE of ids is dropped); texts are bitext."""
    text_name, id_name = source.fields.get("query", "query"), source.fields.get("id", "id")
    joined: dict[str, dict[str, str]] = {}
    for language, path in source.files.items():
        for file in expand(path):
            for where, record in records(file, problems):
                missing = [name for name in (text_name, id_name) if not isinstance(record.get(name), str | int)]
                if missing:
                    problems.report(where, _no_field(missing[0], "query" if missing[0] == text_name else "id", record))
                    continue
                key = str(record[id_name])
                own = record.get("lang", language)
                joined.setdefault(key.removesuffix(f"_{own}"), {})[language] = str(record[text_name])
    for key, texts in joined.items():
        yield Row(texts, texts, {}, key, f"{source.name or 'files'}:{key}")


def _row(record: dict[str, Any], source: Source, where: str, problems: Problems) -> Row | None:
    """The row of one record with named fields (JSON Lines, TSV with a header, Hugging Face data sets)."""
    name = {n: source.fields.get(n, n) for n in NAMES}
    content = record.get(name["content"])
    content = None if content is None else str(content)
    if source.bitext:
        texts = {key: value for key, value in record.items() if key not in (name["id"], name["content"]) and value}
        bad = [key for key, value in texts.items() if not isinstance(value, str)]
        if bad:
            problems.report(
                where, f"{bad[0]!r} is no text; with bitext: true every field is a language code and its text"
            )
            return None
        key = record.get(name["id"])
        return Row(texts, texts, {}, content if content is not None or key is None else str(key), where)
    sides = {}
    for side in ("query", "passage"):
        value = record.get(name[side])
        if isinstance(value, str):
            language = record.get(name[f"{side}_language"]) or record.get(name["language"]) or source.language
            if not language:
                problems.report(
                    where, f"no language: set the source's language, or give the record {name['language']!r}"
                )
                return None
            value = {language: value}
        if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
            problems.report(where, _no_field(name[side], side, record))
            return None
        sides[side] = value
    negatives = record.get(name["negatives"]) or {}
    if isinstance(negatives, str | list):
        negatives = {next(iter(sides["passage"])): negatives}
    if not isinstance(negatives, dict):
        problems.report(where, f"{name['negatives']!r} must be a text, a list of texts, or such lists by language")
        return None
    negatives = {code: (texts,) if isinstance(texts, str) else tuple(texts or ()) for code, texts in negatives.items()}
    if not all(isinstance(text, str) for texts in negatives.values() for text in texts):
        problems.report(where, f"{name['negatives']!r} holds something that is no text")
        return None
    return Row(sides["query"], sides["passage"], negatives, content, where)


def _no_field(name: str, role: str, record: dict[str, Any]) -> str:
    there = ", ".join(map(repr, record)) or "none"
    return f"no text {name!r}; the fields are {there}. Say which one it is with the source's fields: {{{role}: NAME}}"


def read_tsv(source: Source, problems: Problems) -> Iterator[Row]:
    """Tab-separated text. The first line (or the source's columns) names the columns: query, passage, ..., or, with
    bitext: true, language codes.
    """
    for path in expand(source.path):
        header = source.columns or None
        for number, text in lines(path):
            cells = next(csv.reader([text], delimiter="\t", quoting=csv.QUOTE_NONE), [])
            if header is None:
                header = cells
                needed = [source.fields.get(n, n) for n in ("query", "passage")]
                if not source.bitext and not set(needed) <= set(header):
                    raise DataError(
                        f"{path}:1: the first line must name the columns, among them {needed[0]!r} and {needed[1]!r}; "
                        f"it has {', '.join(map(repr, header))}. For translations, name them by language (en, de) and "
                        "set bitext: true. If the first line is data, list the names in the source's columns"
                    )
            elif len(cells) != len(header):
                problems.report(f"{path}:{number}", f"{len(cells)} columns, the first line has {len(header)}")
            else:
                record = dict(zip(header, cells, strict=True))
                made = _row(record, source, f"{path}:{number}", problems)
                if made is not None:
                    yield made


def read_tmx(source: Source, problems: Problems) -> Iterator[Row]:
    """TMX: every translation unit is a row of bitext. Entities are refused: they can make gigabytes of a small file."""
    from xml.etree.ElementTree import ParseError

    import fsspec
    from defusedxml import DefusedXmlException
    from defusedxml.ElementTree import iterparse

    language_key = "{http://www.w3.org/XML/1998/namespace}lang"
    for path in [*expand(source.path)] if source.path else [f for p in source.files.values() for f in expand(p)]:
        unit, found = 0, False
        try:
            with fsspec.open(path, "rb", compression="infer") as file:
                for _, element in iterparse(file):
                    if element.tag != "tu":
                        continue
                    unit, found = unit + 1, True
                    where = f"{path}: unit {element.get('tuid') or unit}"
                    texts = {}
                    for variant in element.iter("tuv"):
                        code, segment = variant.get(language_key) or variant.get("lang"), variant.find("seg")
                        if code and segment is not None:
                            texts[code] = "".join(segment.itertext())
                    element.clear()
                    if len(texts) < 2:
                        problems.report(where, "fewer than two languages with a text")
                        continue
                    yield Row(texts, texts, {}, None, where)
        except ParseError as error:
            raise DataError(f"{path}:{error.position[0]}: not well-formed XML ({error})") from None
        except DefusedXmlException as error:
            raise DataError(
                f"{path}: declares XML entities ({error}), which are not read; write the texts out"
            ) from None
        if not found:
            raise DataError(f"{path}: no translation unit (<tu>) in it")


def read_lines(source: Source, problems: Problems) -> Iterator[Row]:
    """Line-aligned text files, one per language: translations, or each line with the one after it.

    With pair: next lines are paired two and two (1 with 2, 3 with 4, within a document), so that no text is a query
    in one row and a passage in another.
    """
    if not source.files:
        raise DataError(f"{source.path}: format lines needs files (language: path), one file per language")
    paths = {code: expand(path)[0] for code, path in source.files.items()}
    documents = (text for _, text in lines(expand(source.documents)[0])) if source.documents else None
    before: tuple[str | None, dict[str, str]] | None = None
    for number, found in enumerate(zip_longest(*(lines(path) for path in paths.values())), 1):
        if None in found:
            short = list(paths.values())[found.index(None)]
            raise DataError(
                f"{short}: has {number - 1} lines, others have more; line-aligned files must be equally long"
            )
        texts = {code: text for code, (_, text) in zip(paths, found, strict=True) if text.strip()}
        where = f"{next(iter(paths.values()))}:{number}"
        document = next(documents, None) if documents else None
        if documents and document is None:
            raise DataError(f"{source.documents}: has {number - 1} lines, {next(iter(paths.values()))} has more")
        if source.pair == "translation":
            yield Row(texts, texts, {}, str(number), where)
        elif before is not None and before[0] == document:
            yield Row(before[1], texts, {}, str(number), where)
            before = None
        else:
            before = (document, texts)


def read_hf(source: Source, problems: Problems) -> Iterator[Row]:
    """A Hugging Face data set, by hub name or local folder; no code of a data set is run."""
    from pathlib import Path

    import datasets

    path = str(source.path)
    try:
        if (Path(path) / "dataset_info.json").is_file() or (Path(path) / "dataset_dict.json").is_file():
            loaded = datasets.load_from_disk(path)
            loaded = loaded[source.split] if isinstance(loaded, datasets.DatasetDict) else loaded
        else:
            loaded = datasets.load_dataset(path, source.config, split=source.split)
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetNotFoundError) as error:
        raise DataError(
            f"{path}: cannot be loaded as a Hugging Face data set ({type(error).__name__}: {error})"
        ) from None
    for number, record in enumerate(loaded):
        made = _row(record, source, f"{path} ({source.split}) row {number}", problems)
        if made is not None:
            yield made


def read_cldr(source: Source, problems: Problems) -> Iterator[Row]:
    """The training half of the embedded demo."""
    from hbt_fast.data.cldr import cldr_rows

    return cldr_rows("train")


def read_squad(source: Source, problems: Problems) -> Iterator[Row]:
    """SQuAD; see `hbt_fast.data.squad`."""
    from hbt_fast.data.squad import read

    return read(source, problems)
