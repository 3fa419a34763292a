"""Readers of the text formats: each turns a source into rows. What is common to all is in `hbt_fast.data.sources`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

from hbt_fast.data.containers import BESIDE, CONTAINERS, ending, kind_of_json, read_container
from hbt_fast.data.layouts import Layout
from hbt_fast.data.problems import Problems
from hbt_fast.data.reading import Bounded, described, lines, opened, records
from hbt_fast.data.record_rows import UnreadableError, identifier, no_text, rows_of
from hbt_fast.data.rows import DataError, Row
from hbt_fast.data.sources import Source, expand

PATIENCE = 5.0  # seconds that the hub has for its first answer


def read_records(source: Source, problems: Problems) -> Iterator[Row]:
    """Records of any container in any layout, or of one file per language joined by the id field."""
    if source.files:
        yield from _joined(source, problems)
        return
    yield from _rows(_records(source, problems), source, problems)


read_jsonl = read_json = read_csv = read_tsv = read_parquet = read_arrow = read_records


def _records(source: Source, problems: Problems) -> Iterator[tuple[str, dict[str, Any]]]:
    """The records of all files of a source."""
    paths = expand(source.path)
    is_folder, given = Path(source.path).expanduser().is_dir(), source.format in CONTAINERS.values()
    kinds = {path: CONTAINERS.get(ending(path)) for path in paths if Path(path).name not in BESIDE}
    if given and not is_folder:  # whatever their names
        kinds = dict.fromkeys(paths, source.format)
    elif given:  # JSON Lines are called .json, too
        like = ("jsonl", "json") if source.format == "jsonl" else (source.format,)
        kinds = {path: source.format for path, kind in kinds.items() if kind in like}
    if not any(kinds.values()):
        names = ", ".join(Path(path).name for path in paths[:5])
        raise DataError(
            f"{source.path}: holds no file of format {source.format} by its ending, but {names}; give a glob"
        )
    for path, kind in kinds.items():
        if kind == "json" and not given:
            kind = kind_of_json(path, problems.longest_line)
        if kind == "squad":
            raise DataError(f"{path}: SQuAD beside other files; give it a source of its own")
        if kind is not None:  # of a folder: what lies beside the data
            found = read_container(kind, path, source, problems)
            yield from _named(found, path, source) if kind in ("csv", "tsv") and not source.bitext else found


def _named(found: Iterator[tuple[str, dict[str, Any]]], path: str, source: Source) -> Iterator[tuple[str, dict]]:
    """The records of a table of text, whose first line was taken for names of columns; see that they are."""
    for first in found:
        layout = Layout.of(first[1], source)
        if not layout.fits(first[1]):
            layout.look(first[1], {})
            layout.check()  # what its fields name, if they do
            there = ", ".join(map(repr, first[1]))
            raise DataError(
                f"{path}:1: the first line must name the columns, 'query' and 'passage' among them; it has {there}. If "
                "they are names, say which is which with the source's fields: {query: NAME, passage: NAME}; if it is a "
                "row, name the columns with columns: [query, passage]"
            )
        yield first
        break
    yield from found


def _rows(found: Iterable[tuple[str, dict[str, Any]]], source: Source, problems: Problems) -> Iterator[Row]:
    """The rows of records, by the layout of the first that has one."""
    layout = None
    for where, record in found:
        if source.bitext:
            yield from _translations(record, source, where, problems)
        elif {"question", "context", "answers"} <= record.keys() and source.layout == "auto" and not source.fields:
            # SQuAD, a question at a time
            from hbt_fast.data.squad import row_of_record

            made = row_of_record(record, source, where, problems)
            if made is not None:
                yield made
        else:
            this = layout or Layout.of(record, source)
            if layout is None and this.fits(record):  # the first that can be read decides
                layout = this
                problems.tally.layouts.append(layout)
            yield from rows_of(record, this, source, where, problems)


def _joined(source: Source, problems: Problems) -> Iterator[Row]:
    """One file per language, joined by id (a suffix _LANGUAGE of ids is dropped); texts are bitext."""
    text_name, id_name = _field(source, "query"), _field(source, "id")
    joined: dict[str, dict[str, str]] = {}
    for language, path in source.files.items():
        for file in expand(path):
            for where, record in records(file, problems):
                if not isinstance(record.get(text_name), str):
                    problems.report(where, no_text(record, text_name, "query"))
                    continue
                try:
                    key = identifier(record, id_name)
                except UnreadableError as error:
                    problems.report(where, str(error))
                    continue
                if key is None:
                    problems.report(where, no_text(record, id_name, "id"))
                    continue
                own = record.get("lang", language)
                joined.setdefault(key.removesuffix(f"_{own}"), {})[language] = record[text_name]
    for key, texts in joined.items():
        yield Row(texts, texts, {}, key, f"{source.name or 'files'}:{key}")


def _field(source: Source, what: str) -> str:
    """The one field that a source calls so."""
    name = source.fields.get(what, what)
    if isinstance(name, str):
        return name
    raise DataError(f"source {source.name or source.path!r}: its fields say that {what} is {name}; write one name")


def _translations(record: dict[str, Any], source: Source, where: str, problems: Problems) -> Iterator[Row]:
    """The row of a record whose fields are language codes and their texts."""
    content, key = _field(source, "content"), _field(source, "id")
    texts = {name: text for name, text in record.items() if name not in (key, content) and text not in (None, "")}
    try:
        if bad := next((name for name, text in texts.items() if not isinstance(text, str)), None):
            raise UnreadableError(
                f"{bad!r} is {described(texts[bad])}, no text; with bitext: true every field is a language code and "
                "its text"
            )
        named = identifier(record, content)
        yield Row(texts, texts, {}, identifier(record, key) if named is None else named, where)
    except UnreadableError as error:
        problems.report(where, str(error))


def read_tmx(source: Source, problems: Problems) -> Iterator[Row]:
    """TMX: every translation unit is a row of bitext. Entities are refused: they can make gigabytes of a small file."""
    from xml.etree.ElementTree import ParseError

    from defusedxml import DefusedXmlException
    from defusedxml.ElementTree import iterparse

    language_key = "{http://www.w3.org/XML/1998/namespace}lang"
    for path in [*expand(source.path)] if source.path else [f for p in source.files.values() for f in expand(p)]:
        unit, above = 0, []
        with opened(path) as raw:
            file = Bounded(raw, path, "a translation unit (or the header)", problems.longest_line)
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
    numbered = enumerate(_loaded(path, source))
    yield from _rows(((f"{path} ({source.split}) row {n}", record) for n, record in numbered), source, problems)


def _loaded(path: str, source: Source) -> Iterator[dict[str, Any]]:
    """The records of a Hugging Face data set, whose files may turn out broken at any of them."""
    import datasets

    broken = (OSError, ValueError, LookupError, TypeError, RuntimeError, ImportError, NotImplementedError)
    try:
        if (Path(path) / "dataset_info.json").is_file() or (Path(path) / "dataset_dict.json").is_file():
            loaded = datasets.load_from_disk(path)
            loaded = loaded[source.split] if isinstance(loaded, datasets.DatasetDict) else loaded
        elif Path(path).is_file():
            kind = CONTAINERS.get(ending(path), "")
            kind = {"jsonl": "json", "tsv": "csv"}.get(kind, kind)
            loaded = datasets.load_dataset(kind, data_files=path, split="train")
        else:
            if not Path(path).exists():
                _see_hub(path)
            loaded = datasets.load_dataset(path, source.config, split=source.split)
        yield from loaded
    except DataError:
        raise
    except (*broken, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"{path}: cannot be loaded as a Hugging Face data set ({type(error).__name__}: {error})"
        ) from None


def _see_hub(name: str) -> None:
    """See that the hub answers; `datasets` would try six times for every file, and then say that it is not there."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if constants.HF_HUB_OFFLINE:
        return
    try:
        get_hf_file_metadata(hf_hub_url(name, "README.md", repo_type="dataset"), timeout=PATIENCE)
    except (HfHubHTTPError, HFValidationError):
        return  # it answers, or will not be asked; datasets says the rest
    except Exception as error:  # whatever the HTTP library of the installed huggingface_hub raises
        raise DataError(
            f"{name}: no such file or folder, and the hub is out of reach ({error or type(error).__name__}); give a "
            "path, or where the data set is in the hub's cache, set HF_HUB_OFFLINE=1"
        ) from None


def read_judged(source: Source, problems: Problems) -> Iterator[Row]:
    """A folder with a corpus, queries and judgements; see `hbt_fast.data.judged`."""
    from hbt_fast.data.judged import read_folder

    return read_folder(source, problems)


def read_ir_datasets(source: Source, problems: Problems) -> Iterator[Row]:
    """A data set of ir_datasets; see `hbt_fast.data.judged`."""
    from hbt_fast.data.judged import read_named

    return read_named(source, problems)


def read_cldr(source: Source, problems: Problems) -> Iterator[Row]:
    """The training half of the embedded demo."""
    from hbt_fast.data.cldr import cldr_rows

    return cldr_rows("train")


def read_squad(source: Source, problems: Problems) -> Iterator[Row]:
    """SQuAD; see `hbt_fast.data.squad`."""
    from hbt_fast.data.squad import read

    return read(source, problems)
