"""The files of a checkpoint: where they are, typed values of their JSON, and what libraries raise for them.

A checkpoint is data that somebody else wrote, and any of its files may hold anything. Whatever is wrong ends as an
EncoderError that names the file and, in JSON, the field.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from hbt_fast.base.errors import UserError
from hbt_fast.encoder.hub import cache_only
from hbt_fast.encoder.model import EncoderError

LARGEST = 64 << 20  # bytes of a JSON file that is read here; the largest known ones have less than one MiB
LONGEST = 400  # characters of what a library says


@dataclass(frozen=True)
class Fields:
    """An object of a checkpoint's JSON, with values of the types that are asked for.

    Args:
        where: names it in messages.
        values: by key; null is what is not there.
    """

    where: str
    values: dict[str, Any]

    def text(self, key: str) -> str | None:
        """A string, or None where there is none."""
        return self._of(key, lambda value: isinstance(value, str), 'a text, such as "query: "')

    def flag(self, key: str, default: bool = False) -> bool:
        """true or false."""
        found = self._of(key, lambda value: isinstance(value, bool), "true or false")
        return default if found is None else found

    def whole(self, key: str) -> int | None:
        """A whole number from 1 on, or None where there is none."""
        counts = lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= 1  # noqa: E731
        return self._of(key, counts, "a whole number from 1 on")

    def object(self, key: str) -> Fields:
        """An object, empty where there is none."""
        found = self._of(key, lambda value: isinstance(value, dict), "an object, in {}")
        return Fields(f'{self.where}: "{key}"', found or {})

    def _of(self, key: str, right: Any, what: str) -> Any:
        value = self.values.get(key)
        if value is not None and not right(value):
            raise EncoderError(f'{self.where}: "{key}" is {shown(value)}; it must be {what}')
        return value


def shown(value: object) -> str:
    """A JSON value in a message, however large it is."""
    if isinstance(value, dict | list):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value):,} entries"
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**30:
        return f"a number of about {int(value.bit_length() * 0.30103):,} digits"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:60]}..."


def read_fields(name: str, path: str) -> Fields | None:
    """The object that a JSON file of a checkpoint holds; None if it has no such file.

    Args:
        name: folder or hub name.
        path: in it.

    Raises:
        EncoderError: the file cannot be read or is not an object.
    """
    content = _read(name, path, dict)
    return None if content is None else Fields(f"{name}/{path}", content)


def read_list(name: str, path: str) -> list | None:
    """As `read_fields`, of a file that holds a list."""
    return _read(name, path, list)


def find(name: str, path: str) -> Path | None:
    """Where a file of a checkpoint is on this machine; None if it has no such file.

    Args:
        name: folder or hub name.
        path: in it.

    Raises:
        EncoderError: see `cache_only`; or the path leaves the folder, or the file cannot be fetched.
    """
    from transformers.utils import cached_file

    here = cache_only(name)
    parts = PurePosixPath(path)
    if parts.is_absolute() or ".." in parts.parts or "\\" in path or not path.isprintable():
        raise EncoderError(
            f"{name}: the path {shown(path)} leaves the checkpoint's folder; files elsewhere are not read"
        )
    try:
        found = cached_file(name, path, local_files_only=here, _raise_exceptions_for_missing_entries=False)
    except (OSError, ValueError) as error:
        raise EncoderError(f"{name}/{path}: cannot be fetched: {brief(error)}") from error
    return found and Path(found)


@contextmanager
def refusals(where: str, what: str, instead: str = "fetch it again") -> Iterator[None]:
    """Turn what transformers, tokenizers and safetensors raise for a checkpoint into EncoderError.

    They raise whatever the first line that trips over a wrong value raises: KeyError, TypeError, ZeroDivisionError,
    RecursionError, panics of Rust that are no Exception.

    Args:
        where: the checkpoint, or its file.
        what: is done with it.
        instead: what to do.
    """
    try:
        yield
    except (UserError, MemoryError):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        if "trust_remote_code" in str(error):
            raise EncoderError(
                f"{where}: its own Python code would have to be run, which hbt_fast never does; take a checkpoint of "
                "an architecture that transformers has"
            ) from error
        raise EncoderError(f"{where}: {what} ({brief(error)}); {instead}") from error


def brief(error: BaseException) -> str:
    """What an error of a library says, with its type where that is needed to understand it."""
    said = " ".join(str(error).split())
    said = said if len(said) <= LONGEST else f"{said[:LONGEST]}..."
    return said.rstrip(".;") if isinstance(error, OSError | ValueError) and said else f"{type(error).__name__}: {said}"


def _read(name: str, path: str, kind: type) -> Any:
    file = find(name, path)
    if file is None:
        return None
    try:
        if file.stat().st_size > LARGEST:
            raise EncoderError(f"{name}/{path}: {file.stat().st_size / 2**20:,.0f} MiB, which no such file has")
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise EncoderError(f"{name}/{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, EncoderError):
            raise
        raise EncoderError(f"{name}/{path}: not valid JSON ({brief(error)}); fetch it again") from error
    if not isinstance(content, kind):
        raise EncoderError(f"{name}/{path}: not a JSON {'list' if kind is list else 'object'}; fetch it again")
    return content
