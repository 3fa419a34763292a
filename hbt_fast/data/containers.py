"""Records of files of people, whatever they come in: JSON Lines, JSON arrays, CSV, TSV, Parquet, Arrow.

A container gives records, dictionaries by field name, with the place where each stands. What the fields mean is the
business of `hbt_fast.data.layouts`.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Iterator
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from hbt_fast.data.problems import Problems
from hbt_fast.data.reading import array_records, lines, opened, parsed, records
from hbt_fast.data.rows import DataError

if TYPE_CHECKING:
    import pyarrow as pa

    from hbt_fast.data.sources import Source

Records = Iterator[tuple[str, dict[str, Any]]]

COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".zip")
CONTAINERS = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "tsv", ".tab": "tsv",
    ".parquet": "parquet", ".arrow": "arrow", ".feather": "arrow",
}  # fmt: skip
BESIDE = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")  # what Hugging Face writes
BATCH = 1024  # rows of a table that become Python's at a time
QUOTED = re.compile(r'"(?:[^"]|"")*"')


def ending(path: str) -> str:
    """The ending that says what a file is, in small letters, without that of its compression; "" for none.

    Args:
        path: of a file, or a member of an archive as zip://MEMBER::ARCHIVE.
    """
    found = ""
    for name in map(PurePath, reversed(path.split("::"))):  # an archive's name says what a member's does not
        while name.suffix.lower() in COMPRESSED:
            name = name.with_suffix("")
        found = name.suffix.lower() if name.suffix.lower() in CONTAINERS or not found else found
    return found


def read_container(kind: str, path: str, source: Source, problems: Problems) -> Records:
    """("file:line", record) of a file.

    Args:
        kind: a value of `CONTAINERS`.
        path: of the file.
        source: its `columns` and `quoting` say how a table of text is read.
        problems: told of records that cannot be read.

    Raises:
        DataError: the file is not there, or not what it should be; names the place.
    """
    if kind == "jsonl":
        return records(path, problems)
    if kind == "json":
        return array_records(path, problems)
    if kind in ("csv", "tsv"):
        return _table(path, "," if kind == "csv" else "\t", source, problems)
    return _arrow(path, kind, problems)


def kind_of_json(path: str, longest_line: int) -> str:
    """What a file that is called .json holds: "json", an array; "jsonl", records by line; or "squad", one document.

    Args:
        path: of the file.
        longest_line: bytes of a line of records.
    """
    with opened(path) as file:
        first = file.read(1 << 16).removeprefix(b"\xef\xbb\xbf").lstrip()
        if first.startswith(b"["):
            return "json"
        while not first.partition(b"\n")[2].lstrip() and len(first) <= longest_line and (more := file.read(1 << 16)):
            first += more
    line, _, rest = first.partition(b"\n")
    try:
        whole = rest.lstrip().startswith(b"{") and isinstance(parsed(line.decode()), dict)
    except (DataError, UnicodeDecodeError):
        return "squad"  # its reader says what is wrong
    return "jsonl" if whole else "squad"


def _table(path: str, separator: str, source: Source, problems: Problems) -> Records:
    """The lines of a table of text, whose first line (or the source's columns) names the columns.

    Quotes are those of RFC 4180 in CSV: a cell between quotes may hold separators and line breaks, and doubles the
    quotes in it. In TSV they are characters, as in MS MARCO's files, unless the source says otherwise.
    """
    quoted = source.quoting == "quoted" or (source.quoting == "auto" and separator == ",")
    cells = _quoted(path, separator, problems) if quoted else _plain(path, separator, source, problems)
    header = source.columns or None
    for number, row in cells:
        if header is None:
            header = [name.strip() for name in row]
            if twice := next((name for name in header if header.count(name) > 1), None):
                raise DataError(f"{path}:{number}: two columns are called {twice!r}; give each a name of its own")
        elif len(row) != len(header):
            hint = "" if quoted or '"' not in "".join(row) else (
                "; if the file has cells between quotes, with line breaks in them, set the source's quoting: quoted"
            )  # fmt: skip
            problems.report(f"{path}:{number}", f"{len(row)} columns, the first line has {len(header)}{hint}")
        else:
            yield f"{path}:{number}", dict(zip(header, row, strict=True))


def _plain(path: str, separator: str, source: Source, problems: Problems) -> Iterator[tuple[int, list[str]]]:
    for number, text in lines(path, problems):
        if text is None:
            if number == 1 and not source.columns:
                raise DataError(f"{path}:1: the first line must name the columns, and is malformed")
            continue
        row = text.split(separator)
        if source.quoting == "auto" and '"' in text and (cell := next(filter(QUOTED.fullmatch, row), None)):
            raise DataError(
                f"{path}:{number}: a cell is all between quotes, {cell[:60]}. If a program wrote them (pandas, Excel), "
                "set the source's quoting: quoted; if they are part of the text, quoting: plain"
            )
        yield number, row


def _quoted(path: str, separator: str, problems: Problems) -> Iterator[tuple[int, list[str]]]:
    before = csv.field_size_limit(problems.longest_line)
    begin = 1
    reader = csv.reader(_texts(path, problems), delimiter=separator, strict=True)
    try:
        while True:
            csv.field_size_limit(problems.longest_line)
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                raise DataError(f"{path}:{begin}: not a table with quoted cells ({error})") from None
            if row:
                yield begin, row
            begin = reader.line_num + 1
    finally:
        csv.field_size_limit(before)


def _texts(path: str, problems: Problems) -> Iterator[str]:
    """Lines with their ends; a carriage return within one is white space."""
    for _, text in lines(path, problems):
        yield "\n" if text is None else text.replace("\r", " ") + "\n"


def _arrow(path: str, kind: str, problems: Problems) -> Records:
    """The rows of a Parquet or Arrow file."""
    import pyarrow as pa

    number = 0
    try:
        for batch in _batches(path, kind):
            names = batch.schema.names
            if twice := next((name for name in names if names.count(name) > 1), None):
                raise DataError(f"{path}: two columns are called {twice!r}; give each a name of its own")
            for record in batch.to_pylist():
                number += 1
                yield f"{path}: row {number}", record
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as {kind} ({str(error).splitlines()[0]})") from None


def _batches(path: str, kind: str) -> Iterable[pa.RecordBatch]:
    import pyarrow as pa
    import pyarrow.parquet

    with opened(path) as file:
        if path.partition("::")[0].lower().endswith(COMPRESSED):  # where seeking is reading anew
            file = io.BytesIO(file.read())
        if kind == "parquet":
            yield from pyarrow.parquet.ParquetFile(file).iter_batches(BATCH)
            return
        try:
            opener = pa.ipc.open_file(file)
            several = (opener.get_batch(n) for n in range(opener.num_record_batches))
        except pa.ArrowInvalid:  # a stream, as Hugging Face data sets are
            file.seek(0)
            several = pa.ipc.open_stream(file)
        for batch in several:
            yield from (batch.slice(begin, BATCH) for begin in range(0, len(batch), BATCH))
