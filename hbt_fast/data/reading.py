"""Files of other people, read in bounded memory: plain, compressed or in an archive; lines, JSON Lines, one document.

Whatever is in them, what comes out is text, JSON, or a DataError that names the file and line.
"""

from __future__ import annotations

import io
import json
import lzma
import math
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

from hbt_fast.base.errors import UserError
from hbt_fast.data.problems import Problems, Strict
from hbt_fast.data.rows import DataError

# What files, decompressors and archives raise; NotImplementedError and RuntimeError: a zip of an unknown method, or
# encrypted; ImportError: a protocol or compression whose package is not there.
BROKEN = (
    OSError, EOFError, LookupError, ValueError, NotImplementedError, RuntimeError, ImportError, struct.error,
    zlib.error, lzma.LZMAError, zipfile.BadZipFile,
)  # fmt: skip
BYTE_ORDER_MARKS = {
    b"\xff\xfe\x00\x00": "utf-32", b"\x00\x00\xfe\xff": "utf-32", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16",
}  # fmt: skip
LARGEST = 2 << 30  # bytes of a document that is read at once; json makes about ten times as much of it
HALVES = re.compile("[\ud800-\udfff]")


@contextmanager
def opened(path: str) -> Iterator[BinaryIO]:
    """A file that may be compressed, or a member of an archive as zip://MEMBER::ARCHIVE, to read bytes from.

    Raises:
        DataError: it is not there, or broken: on opening, and where the block reads it.
    """
    import fsspec

    try:
        with fsspec.open(path, "rb", compression="infer") as file:
            # a member of a zip looks for line ends in pieces of 4 KB, in Python
            yield io.BufferedReader(file, 1 << 20) if isinstance(file, zipfile.ZipExtFile) else file
    except UserError:
        raise
    except BROKEN as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise DataError(f"{path}: cannot be read ({type(error).__name__}: {reason})") from None


def lines(path: str, problems: Problems | None = None, *, rows: bool = True) -> Iterator[tuple[int, str | None]]:
    """(line number from 1, text without its end) of a UTF-8 file, which may be .gz or a member of a .zip.

    Args:
        path: of the file.
        problems: told of lines that are not text or too long; where it skips them, their text is None. None: an error.
        rows: whether a line is a row, rather than a part of one.

    Raises:
        DataError: a line that is not UTF-8 or too long (names the line), an empty file, one that cannot be read.
    """
    problems = Strict() if problems is None else problems
    limit, number, report = problems.longest_line, 0, problems.report if rows else problems.note
    with opened(path) as file:
        readline = file.readline
        while raw := readline(limit + 2):
            number += 1
            if number == 1:
                _refuse_utf16(raw, path)
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            if len(raw) > limit and not raw.endswith(b"\n"):
                report(f"{path}:{number}", _too_long(problems))
                while (raw := readline(1 << 20)) and not raw.endswith(b"\n"):
                    pass
                yield number, None
                continue
            try:
                text = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                report(
                    f"{path}:{number}",
                    f"not UTF-8 (byte {error.start} of the line is 0x{raw[error.start]:02x}); "
                    "convert the file, for instance: iconv -f latin1 -t utf-8",
                )
                text = None
            else:
                if "\0" in text:
                    report(
                        f"{path}:{number}", "holds NUL bytes, which no text has; if it is UTF-16, convert the file: "
                        "iconv -f utf-16 -t utf-8",
                    )  # fmt: skip
                    text = None
            yield number, text if text is None else text.rstrip("\r\n")
    if not number:
        raise DataError(f"{path}: empty file; leave it out")


def _too_long(problems: Problems) -> str:
    most = f"longer than {problems.longest_line:,} bytes"
    if isinstance(problems, Strict):
        return f"{most}; is it a file of lines?"
    return f"{most} (data.longest_line); is it a file of lines? If it is, write a larger data.longest_line"


def _refuse_utf16(raw: bytes, path: str) -> None:
    for mark, encoding in BYTE_ORDER_MARKS.items():
        if raw.startswith(mark):
            raise DataError(f"{path}: is {encoding.upper()}, UTF-8 is needed; convert it: iconv -f {encoding} -t utf-8")


def records(path: str, problems: Problems) -> Iterator[tuple[str, dict[str, Any]]]:
    """("file:line", object) of a JSON Lines file; blank lines are passed over."""
    for number, text in lines(path, problems):
        if text is None or not text.strip():
            continue
        where = f"{path}:{number}"
        try:
            record = parsed(text)
        except DataError as error:
            problems.report(where, str(error))
            continue
        if not isinstance(record, dict):
            problems.report(where, f"a JSON object is needed, this is {described(record)}")
            continue
        yield where, record


def parsed(text: str) -> Any:
    """The value that JSON says.

    Raises:
        DataError: it is none (its line is an attribute), or one that Python does not read: too deeply nested, a number
            of thousands of digits.
    """
    try:
        return json.loads(text, object_pairs_hook=_object)
    except DataError:
        raise
    except json.JSONDecodeError as error:
        made = DataError(f"not JSON: {error.msg} at column {error.colno}")
        made.line = error.lineno
        raise made from None
    except RecursionError:
        raise DataError("JSON that is too deeply nested to be read") from None
    except ValueError:  # int() of many digits: it takes time as their square
        raise DataError("JSON with a number of thousands of digits, which is not read") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"the key {twice[:60]!r} is there twice; leave one out")
    return made


def document(path: str) -> Any:
    """The value of a file that is one JSON document.

    Raises:
        DataError: it is no JSON, not UTF-8, empty, or cannot be read; names the file and line.
    """
    with opened(path) as file:
        raw = file.read(LARGEST + 1)
    if len(raw) > LARGEST:
        raise DataError(f"{path}: larger than {LARGEST >> 30} GiB, more than is read at once; write it as JSON Lines")
    _refuse_utf16(raw, path)
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}:{line}: not UTF-8 (byte {error.start} is 0x{raw[error.start]:02x}); convert it, for instance: "
            "iconv -f latin1 -t utf-8"
        ) from None
    if not text.strip():
        raise DataError(f"{path}: empty file; leave it out")
    try:
        return parsed(text)
    except DataError as error:
        raise DataError(f"{path}:{getattr(error, 'line', 1)}: {error}") from None


def described(value: object) -> str:
    """What a JSON value is, in words, for a message."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and math.isnan(value):
        return "NaN"
    if isinstance(value, int | float):
        shown = str(value)
        return f"the number {shown if len(shown) <= 40 else shown[:37] + '...'}"
    if isinstance(value, str):
        return f"the text {value[:60]!r}"
    return {dict: "an object", list: "a list"}.get(type(value), f"a {type(value).__name__}")


def half_pair(text: str) -> str:
    """What is wrong with a text that holds half of a surrogate pair, as one cut inside an emoji; "" with all others."""
    if text.isascii() or not HALVES.search(text):
        return ""
    return f"the text {text[:60]!r} holds half of a surrogate pair; mend it"


def refuse_half_pairs(value: object, where: str) -> None:
    """See that no text in a JSON value holds half of a surrogate pair, which no encoder takes and no file holds.

    Raises:
        DataError: one does.
    """
    stack = [value]
    while stack:
        value = stack.pop()
        if isinstance(value, str):
            if reason := half_pair(value):
                raise DataError(f"{where}: {reason}")
        elif isinstance(value, dict):
            stack += [*value, *value.values()]
        elif isinstance(value, list):
            stack += value


class Bounded:
    """A file of which so much can be read until `whole` is called: what is parsed of it is held in memory till then.

    Args:
        file: to read from.
        path: of it, for messages.
        what: is held in memory, for messages.
        most: bytes of it.
    """

    def __init__(self, file: BinaryIO, path: str, what: str, most: int) -> None:
        self.file, self.path, self.what, self.most, self.left = file, path, what, most, most

    def read(self, count: int) -> bytes:
        """As of a file."""
        raw = self.file.read(count)
        self.left -= len(raw)
        if self.left < 0:
            raise DataError(
                f"{self.path}: {self.what} longer than {self.most:,} bytes (data.longest_line); "
                "if it is one, write a larger data.longest_line"
            )
        return raw

    def whole(self) -> None:
        """What was read so far is done with."""
        self.left = self.most
