"""Files of other people, read in bounded memory: plain, compressed or in an archive; lines, JSON Lines, one document.

Whatever is in them, what comes out is text, JSON, or a DataError that names the file and line.
"""

from __future__ import annotations

import codecs
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
EMPTY = "{}: empty file; leave it out"
WHITE = re.compile(r"[ \t\n\r]*")  # JSON's


@contextmanager
def opened(path: str) -> Iterator[BinaryIO]:
    """A file that may be compressed, or a member of an archive as zip://MEMBER::ARCHIVE, to read bytes from.

    Raises:
        DataError: it is not there, or broken: on opening, and where the block reads it.
    """
    import fsspec

    zstandard = path.partition("::")[0].lower().endswith(".zst")
    try:
        with fsspec.open(path, "rb", compression=None if zstandard else "infer") as file:
            if zstandard:
                yield io.BufferedReader(_Zstandard(file), 1 << 20)
            elif isinstance(file, zipfile.ZipExtFile):  # looks for line ends in pieces of 4 KB, in Python
                yield io.BufferedReader(file, 1 << 20)
            else:
                yield file
    except UserError:
        raise
    except BROKEN as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise DataError(f"{path}: cannot be read ({type(error).__name__}: {reason})") from None


class _Zstandard(io.RawIOBase):
    """What a .zst file holds, in any number of frames; the package's own readers take one that breaks off for whole."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.frame, self.raw, self.ready = file, None, b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        from zstandard import ZstdDecompressor, ZstdError

        while not self.ready:
            self.raw = self.raw or self.file.read(1 << 13)  # which may become thousands of times as much
            if not self.raw and self.frame is not None:
                raise EOFError("the file breaks off")
            if not self.raw:
                return 0
            self.frame = self.frame or ZstdDecompressor().decompressobj()
            try:
                self.ready, self.raw = memoryview(self.frame.decompress(self.raw)), b""
            except ZstdError as error:
                raise ValueError(str(error)) from None
            if self.frame.eof:
                self.frame, self.raw = None, self.frame.unused_data
        count = min(len(buffer), len(self.ready))
        buffer[:count], self.ready = self.ready[:count], self.ready[count:]
        return count


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
        raise DataError(EMPTY.format(path))


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


def array_records(path: str, problems: Problems) -> Iterator[tuple[str, dict[str, Any]]]:
    """("file:line", object) of a file that is one JSON array, an element at a time."""
    text = _Text(path, problems)
    with opened(path) as text.file:
        if (first := text.next()) != "[":
            raise DataError(f"{text.where}: no JSON array; it must begin with [" if first else EMPTY.format(path))
        text.at += 1
        found = text.next()
        if found == "]":
            text.at += 1
        while found != "]":
            text.next()
            where, record = text.where, text.value()
            if isinstance(record, dict):
                yield where, record
            else:
                problems.report(where, f"a JSON object is needed, this is {described(record)}")
            if (found := text.next()) not in (",", "]"):
                raise DataError(f"{text.where}: not JSON: after an element of an array, a comma or ] is needed")
            text.at += 1
        if text.next():
            raise DataError(f"{text.where}: not JSON: something follows the array's end")


class _Text:
    """A JSON document that is read as far as it is needed.

    Attributes:
        file: to read from.
        text: what is in memory.
        at: the place in it.
    """

    def __init__(self, path: str, problems: Problems) -> None:
        self.path, self.problems, self.file = path, problems, io.BytesIO()
        self.text, self.at = "", 0
        self.line, self.counted = 1, 0  # the line of a place
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")()

    @property
    def where(self) -> str:
        """The place as "file:line"."""
        self.line += self.text.count("\n", self.counted, self.at)
        self.counted = self.at
        return f"{self.path}:{self.line}"

    def next(self) -> str:
        """Go to the next character that is no white space; "" at the end."""
        while True:
            self.at = WHITE.match(self.text, self.at).end()
            if self.at < len(self.text):
                return self.text[self.at]
            if not self._more():
                return ""

    def value(self) -> Any:
        """The value that begins here; go to its end."""
        while True:
            try:
                value, end = decoded(self.text, self.at)
                if end < len(self.text) or not self._more():  # else a number may go on
                    self.at = end
                    return value
            except NotJSONError as error:
                # "Unterminated string" names where it begins; \ud83d\ude00 is the longest that is cut elsewhere
                begun = error.why.startswith("Unterminated string") or error.at > len(self.text) - 12
                if not begun or not self._more():
                    self.at = error.at
                    raise DataError(f"{self.where}: not JSON: {error.why}") from None
            except DataError as error:
                raise DataError(f"{self.where}: {error}") from None

    def _more(self) -> bool:
        """Read on, twice as much as is there; False at the end of the file."""
        left = len(self.text) - self.at
        if left > self.problems.longest_line:
            raise DataError(
                f"{self.where}: an element longer than {self.problems.longest_line:,} bytes (data.longest_line); if it "
                "is one, write a larger data.longest_line"
            )
        raw, where = self.file.read(max(1 << 16, left)), self.where
        if not self.text:
            _refuse_utf16(raw, self.path)
        self.text, self.at, self.counted = self.text[self.at :], 0, 0
        try:
            more = self.decoder.decode(raw, final=not raw)
        except UnicodeDecodeError as error:
            raise DataError(
                f"{where}: after it comes what is not UTF-8 (0x{error.object[error.start]:02x}); convert the file, for "
                "instance: iconv -f latin1 -t utf-8"
            ) from None
        self.text += more
        return bool(raw)


class NotJSONError(DataError):
    """A text that is no JSON: why, and where in it."""

    def __init__(self, error: json.JSONDecodeError) -> None:
        super().__init__(f"not JSON: {error.msg} at column {error.colno}")
        self.why, self.at, self.line = error.msg, error.pos, error.lineno


def parsed(text: str) -> Any:
    """The value that JSON says.

    Raises:
        NotJSONError: it is none.
        DataError: it is one that Python does not read: too deeply nested, a number of thousands of digits; or has a key
            twice.
    """
    begin = WHITE.match(text).end()
    value, end = decoded(text, begin)
    end = WHITE.match(text, end).end()
    if end < len(text):
        raise NotJSONError(json.JSONDecodeError("Extra data", text, end))
    return value


def decoded(text: str, at: int) -> tuple[Any, int]:
    """The value that begins at a place of a text, and its end; errors as of `parsed`."""
    try:
        return DECODER.raw_decode(text, at)
    except DataError:
        raise
    except json.JSONDecodeError as error:
        raise NotJSONError(error) from None
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


DECODER = json.JSONDecoder(object_pairs_hook=_object)


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
        raise DataError(EMPTY.format(path))
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
