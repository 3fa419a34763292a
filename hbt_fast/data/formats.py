"""Readers of the text formats: each turns a source into rows. What is common to all is in `hbt_fast.data.sources`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import zip_longest
from typing import Any, BinaryIO

from hbt_fast.data.problems import Problems
from hbt_fast.data.reading import described, lines, opened, records
from hbt_fast.data.rows import DataError, Row
from hbt_fast.data.sources import NAMES, Source, expand


def read_jsonl(source: Source, problems: Problems) -> Iterator[Row]:
    """JSON Lines: one pair a line, or n-way texts by language, or one file per language joined by the id field."""
    if source.files:
        yield from _joined(source, problems)
        return
    for path in expand(source.path):
        for where, record in records(path, problems):
            if "question" in record and "context" in record and not source.fields:  # SQuAD as JSON Lines
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
                if not isinstance(record.get(text_name), str):
                    problems.report(where, _no_text(text_name, "query", record))
                    continue
                key = _id(record, id_name, where, problems)
                if key is None:
                    if record.get(id_name) is None:
                        problems.report(where, _no_text(id_name, "id", record))
                    continue
                own = record.get("lang", language)
                joined.setdefault(key.removesuffix(f"_{own}"), {})[language] = record[text_name]
    for key, texts in joined.items():
        yield Row(texts, texts, {}, key, f"{source.name or 'files'}:{key}")


def _row(record: dict[str, Any], source: Source, where: str, problems: Problems) -> Row | None:
    """The row of one record with named fields (JSON Lines, TSV with a header, Hugging Face data sets)."""
    name = {n: source.fields.get(n, n) for n in NAMES}
    content = _id(record, name["content"], where, problems)
    if content is None and record.get(name["content"]) is not None:
        return None
    if source.bitext:
        texts = {
            key: value
            for key, value in record.items()
            if key not in (name["id"], name["content"]) and value is not None and value != ""
        }
        for key, value in texts.items():
            if not isinstance(value, str):
                problems.report(
                    where,
                    f"{key!r} is {described(value)}, no text; with bitext: true every field is a language code and "
                    "its text",
                )
                return None
        if content is None:
            content = _id(record, name["id"], where, problems)
            if content is None and record.get(name["id"]) is not None:
                return None
        return Row(texts, texts, {}, content, where)
    sides = {}
    for side in ("query", "passage"):
        value = record.get(name[side])
        if isinstance(value, str):
            language = _language(record, (name[f"{side}_language"], name["language"]), source, where, problems)
            if language is None:
                return None
            value = {language: value}
        if not isinstance(value, dict):
            problems.report(where, _no_text(name[side], side, record))
            return None
        if not value or not all(isinstance(text, str) for text in value.values()):
            problems.report(where, _no_texts(name[side], value))
            return None
        sides[side] = value
    try:
        negatives = _negatives(record.get(name["negatives"]), next(iter(sides["passage"])))
    except DataError as error:
        problems.report(where, f"{name['negatives']!r} {error}")
        return None
    return Row(sides["query"], sides["passage"], negatives, content, where)


def _negatives(value: object, language: str) -> dict[str, tuple[str, ...]]:
    """Hard negatives by language; those that do not say are in this one."""
    if value is None or value == "":
        return {}
    found = {}
    for code, texts in value.items() if isinstance(value, dict) else ((language, value),):
        texts = [texts] if isinstance(texts, str) else [] if texts is None else texts
        if not isinstance(texts, list):
            raise DataError(f"must be a text, a list of texts, or such lists by language; it has {described(texts)}")
        bad = [text for text in texts if not isinstance(text, str)]
        if bad:
            raise DataError(f"holds something that is no text: {described(bad[0])}")
        found[code] = tuple(texts)
    return found


def _id(record: dict[str, Any], name: str, where: str, problems: Problems) -> str | None:
    """An id as text; None if there is none, or after a report if it is neither text nor number."""
    value = record.get(name)
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool | list | dict) or (isinstance(value, float) and not math.isfinite(value)):
        problems.report(where, f"{name!r} is {described(value)}; an id is needed: a text or a number, or leave it out")
        return None
    return str(value)


def _language(
    record: dict[str, Any], names: tuple[str, ...], source: Source, where: str, problems: Problems
) -> str | None:
    """The language that the first of these fields of a record names, or the source; None after a report."""
    for name in names:
        value = record.get(name)
        if value is None or value == "":
            continue
        if not isinstance(value, str):
            problems.report(where, f"{name!r} is {described(value)}; a language code is needed, as 'en'")
            return None
        return value
    if not source.language:
        problems.report(where, f"no language: set the source's language, or give the record {names[-1]!r}")
        return None
    return source.language


def _no_text(name: str, role: str, record: dict[str, Any]) -> str:
    if name in record:
        value = record[name]
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        ask = f'write it in quotes if it is one: "{value}"' if number and len(str(value)) <= 40 else "write one"
        return f"{name!r} is {described(value)}, a text is needed; {ask}, or leave the row out"
    there = ", ".join(map(repr, record)) or "none"
    return f"no text {name!r}; the fields are {there}. Say which one it is with the source's fields: {{{role}: NAME}}"


def _no_texts(name: str, texts: dict[str, Any]) -> str:
    for code, text in texts.items():
        if not isinstance(text, str):
            return f"{name!r} of {code!r} is {described(text)}, a text is needed; write one, or leave {code!r} out"
    return f"{name!r} has no text in any language; write one, or leave the row out"


def read_tsv(source: Source, problems: Problems) -> Iterator[Row]:
    """Tab-separated text. The first line (or the source's columns) names the columns: query, passage, ..., or, with
    bitext: true, language codes.
    """
    for path in expand(source.path):
        header = source.columns or None
        for number, text in lines(path, problems):
            if text is None:
                if header is None:
                    raise DataError(f"{path}:1: the first line must name the columns, and is malformed")
                continue
            cells = text.split("\t")
            if header is None:
                header = cells
                needed = [source.fields.get(n, n) for n in ("query", "passage")]
                if not source.bitext and not set(needed) <= set(header):
                    raise DataError(
                        f"{path}:1: the first line must name the columns, among them {needed[0]!r} and {needed[1]!r}; "
                        f"it has {', '.join(map(repr, header))}. For translations, name them by language (en, de) and "
                        "set bitext: true. If the first line is data, list the names in the source's columns"
                    )
                if twice := next((name for name in header if header.count(name) > 1), None):
                    raise DataError(f"{path}:1: two columns are called {twice!r}; give each a name of its own")
            elif len(cells) != len(header):
                problems.report(f"{path}:{number}", f"{len(cells)} columns, the first line has {len(header)}")
            else:
                record = dict(zip(header, cells, strict=True))
                made = _row(record, source, f"{path}:{number}", problems)
                if made is not None:
                    yield made


class _Bounded:
    """A file of which so much can be read until `whole` is called: what is parsed of it is held in memory till then."""

    def __init__(self, file: BinaryIO, path: str, most: int) -> None:
        self.file, self.path, self.most, self.left = file, path, most, most

    def read(self, count: int) -> bytes:
        """As of a file."""
        raw = self.file.read(count)
        self.left -= len(raw)
        if self.left < 0:
            raise DataError(
                f"{self.path}: a translation unit (or the header) longer than {self.most:,} bytes (data.longest_line); "
                "if it is one, write a larger data.longest_line"
            )
        return raw

    def whole(self) -> None:
        """What was read so far is done with."""
        self.left = self.most


def read_tmx(source: Source, problems: Problems) -> Iterator[Row]:
    """TMX: every translation unit is a row of bitext. Entities are refused: they can make gigabytes of a small file."""
    from xml.etree.ElementTree import ParseError

    from defusedxml import DefusedXmlException
    from defusedxml.ElementTree import iterparse

    language_key = "{http://www.w3.org/XML/1998/namespace}lang"
    for path in [*expand(source.path)] if source.path else [f for p in source.files.values() for f in expand(p)]:
        unit, above = 0, []
        with opened(path) as raw:
            file = _Bounded(raw, path, problems.longest_line)
            try:
                for event, element in iterparse(file, ("start", "end")):
                    if event == "start":
                        above.append(element)
                        continue
                    above.pop()
                    if element.tag != "tu":
                        continue
                    unit += 1
                    where = f"{path}: unit {element.get('tuid') or unit}"
                    texts = {}
                    for variant in element.iter("tuv"):
                        code, segment = variant.get(language_key) or variant.get("lang"), variant.find("seg")
                        if code and segment is not None:
                            texts[code] = "".join(segment.itertext())
                    for one in above[-1:]:  # or the tree grows with the file
                        one.clear()
                    file.whole()
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
        if not unit:
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
    for number, found in enumerate(zip_longest(*(lines(path, problems, rows=False) for path in paths.values())), 1):
        if None in found:
            short = list(paths.values())[found.index(None)]
            raise DataError(
                f"{short}: has {number - 1} lines, others have more; line-aligned files must be equally long"
            )
        texts = {code: text for code, (_, text) in zip(paths, found, strict=True) if text and text.strip()}
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
    path = str(source.path)
    for number, record in enumerate(_loaded(path, source)):
        made = _row(record, source, f"{path} ({source.split}) row {number}", problems)
        if made is not None:
            yield made


def _loaded(path: str, source: Source) -> Iterator[dict[str, Any]]:
    """The records of a Hugging Face data set, whose files may turn out broken at any of them."""
    from pathlib import Path

    import datasets

    broken = (OSError, ValueError, LookupError, TypeError, RuntimeError, ImportError, NotImplementedError)
    try:
        if (Path(path) / "dataset_info.json").is_file() or (Path(path) / "dataset_dict.json").is_file():
            loaded = datasets.load_from_disk(path)
            loaded = loaded[source.split] if isinstance(loaded, datasets.DatasetDict) else loaded
        else:
            loaded = datasets.load_dataset(path, source.config, split=source.split)
        yield from loaded
    except (*broken, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"{path}: cannot be loaded as a Hugging Face data set ({type(error).__name__}: {error})"
        ) from None


def read_cldr(source: Source, problems: Problems) -> Iterator[Row]:
    """The training half of the embedded demo."""
    from hbt_fast.data.cldr import cldr_rows

    return cldr_rows("train")


def read_squad(source: Source, problems: Problems) -> Iterator[Row]:
    """SQuAD; see `hbt_fast.data.squad`."""
    from hbt_fast.data.squad import read

    return read(source, problems)
