"""A record becomes rows, by its layout: one for each of its positives.

A passage is a text, texts by language, or a list of passages; it may be an object with a title and a text, or the
messages of a chat. Hard negatives are passages, lists of them, or such lists by language.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from hbt_fast.data.layouts import LISTS, PLAIN, Fields, Layout
from hbt_fast.data.problems import Problems
from hbt_fast.data.reading import described, parsed
from hbt_fast.data.rows import DataError, Row

if TYPE_CHECKING:
    from hbt_fast.data.sources import Source

TEXTS, IDS = ("text", "contents", "body"), ("docid", "passage_id", "doc_id", "pid", "_id", "id")  # of a passage


class UnreadableError(Exception):
    """A record that is no row; the message says what is wrong with it."""


def rows_of(record: Mapping[str, Any], layout: Layout, source: Source, where: str, problems: Problems) -> Iterator[Row]:
    """The rows of a record: one for each of its positives.

    Args:
        record: by field name.
        layout: what its fields mean.
        source: its `language` is that of texts whose record names none.
        where: the record's place.
        problems: told of what cannot be read.
    """
    fields = layout.fields(record)
    layout.look(record, fields)
    try:
        for what in ("query", "passage"):
            if what not in fields:
                raise UnreadableError(no_text(record, layout.names[what][0], what))
        if layout.name in LISTS:
            _parse_cells(fields)
        content = identifier(record, layout.names["content"][0])
        queries = _texts(*fields["query"][0], lambda: _language(fields, layout, "query", source))
        positives = _positives(fields["passage"], lambda: _language(fields, layout, "passage", source))
        negatives = _negatives(fields.get("negatives", ()), next(iter(positives[0][0])))
        prompt = _prompt(fields)
        scores, negative_scores = _all_scores(fields, len(positives), negatives)
    except UnreadableError as error:
        problems.report(where, str(error))
        return
    for n, (passages, key) in enumerate(positives):
        score = scores[n] if scores else None
        own = content or (f"{next(iter(passages))}:{key}" if key else None)  # ids are those of a language's collection
        yield Row(queries, passages, negatives, own, where, score, negative_scores, prompt)


def _parse_cells(fields: Fields) -> None:
    """Make lists of what should be some and is text, as in a cell of CSV: in place."""
    for what in ("passage", "negatives", "scores", "negative_scores"):
        for n, (name, value) in enumerate(fields.get(what, ())):
            if isinstance(value, str) and value.lstrip().startswith("["):
                try:
                    fields[what][n] = name, parsed(value)
                except DataError:
                    raise UnreadableError(
                        f"{name!r} is {described(value)}, which looks like a list and is no JSON (pandas writes lists "
                        "so); write JSON Lines or Parquet"
                    ) from None


def identifier(record: Mapping[str, Any], name: str) -> str | None:
    """An id as text; None if there is none.

    Raises:
        UnreadableError: it is neither text nor number.
    """
    value = record.get(name)
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool | list | dict) or (isinstance(value, float) and not math.isfinite(value)):
        raise UnreadableError(f"{name!r} is {described(value)}; an id is needed: a text or a number, or leave it out")
    return str(value)


def _positives(
    values: Iterable[tuple[str, Any]], language: Callable[[], str]
) -> list[tuple[dict[str, str], str | None]]:
    """(texts by language, id) of each passage that answers the query."""
    found = [
        (_texts(name, passage, language), key)
        for name, value in values
        for passage, key in (_passage(name, entry) for entry in _listed(value))
    ]
    if not found:
        name = next(iter(values))[0]
        raise UnreadableError(f"{name!r} is an empty list; write a passage, or leave the row out")
    return found


def no_text(record: Mapping[str, Any], name: str, what: str) -> str:
    """What is wrong with a record in whose field there is no text.

    Args:
        record: by field name.
        name: of the field.
        what: it is to the source's `fields`.
    """
    if name in record:
        return _no_text(name, record[name])
    there = ", ".join(map(repr, record)) or "none"
    return f"no text {name!r}; the fields are {there}. Say which one it is with the source's fields: {{{what}: NAME}}"


def _no_text(name: str, value: object) -> str:
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    ask = f'write it in quotes if it is one: "{value}"' if number and len(str(value)) <= 40 else "write one"
    return f"{name!r} is {described(value)}, a text is needed; {ask}, or leave the row out"


def _listed(value: object) -> list:
    """The passages of a field: the messages of one chat are one, a list of anything else is several."""
    return value if isinstance(value, list) and not _is_chat(value) else [value]


def _is_chat(value: object) -> bool:
    """Whether a value is the messages of one chat: {role, content} each."""
    return isinstance(value, list) and bool(value) and all(isinstance(m, dict) and "role" in m for m in value)


def _passage(name: str, value: object) -> tuple[str | dict[str, str], str | None]:
    """A passage's text, or texts by language, and its id."""
    if _is_chat(value):
        return _chat(name, value), None
    if isinstance(value, dict) and (key := next((k for k in TEXTS if isinstance(value.get(k), str)), None)):
        title = value.get("title") or ""
        if not isinstance(title, str):
            raise UnreadableError(f"{name!r} has a title that is {described(title)}; write a text, or leave it out")
        return f"{title} {value[key]}".strip(), next(filter(None, (identifier(value, k) for k in IDS)), None)
    return value, None


def _chat(name: str, messages: list[dict[str, Any]]) -> str:
    """The text of a chat: what its messages say, one after the other."""
    parts = [message.get("content") for message in messages]
    if bad := [part for part in parts if not isinstance(part, str)]:
        raise UnreadableError(f"{name!r} has a message whose content is {described(bad[0])}, a text is needed")
    return "\n".join(parts)


def _texts(name: str, value: object, language: Callable[[], str]) -> dict[str, str]:
    """Texts by language of a value that is a text, a chat, or texts by language."""
    if _is_chat(value):
        value = _chat(name, value)
    if isinstance(value, str):
        return {language(): value}
    if not isinstance(value, dict):
        raise UnreadableError(_no_text(name, value))
    value = {code: text for code, text in value.items() if text is not None}  # as Parquet has a missing translation
    for code, text in value.items():
        if not isinstance(text, str):
            raise UnreadableError(
                f"{name!r} of {code!r} is {described(text)}, a text is needed; write one, or leave {code!r} out"
            )
    if not value:
        raise UnreadableError(f"{name!r} has no text in any language; write one, or leave the row out")
    return value


def _negatives(values: Iterable[tuple[str, Any]], language: str) -> dict[str, tuple[str, ...]]:
    """Hard negatives by language; those that do not say are in this one."""
    found: dict[str, tuple[str, ...]] = {}
    for name, value in values:
        by_language = isinstance(value, dict) and not any(isinstance(value.get(k), str) and k in TEXTS for k in value)
        for code, entries in value.items() if by_language else ((language, value),):
            if entries is None:
                continue
            texts = []
            for entry in _listed(entries):
                text, _ = _passage(name, entry)
                if not isinstance(text, str):
                    wanted = "must be a text, a list of texts, or such lists by language"
                    raise UnreadableError(f"{name!r} {wanted}; it has {described(entry)}")
                texts.append(text)
            found[code] = (*found.get(code, ()), *texts)
    return found


def _prompt(fields: Fields) -> str | None:
    """What the record puts before its query."""
    for name, value in fields.get("prompt", ()):
        if not isinstance(value, str):
            raise UnreadableError(_no_text(name, value))
        return value
    return None


def _all_scores(
    fields: Fields, positives: int, negatives: dict[str, tuple[str, ...]]
) -> tuple[tuple[float, ...], dict[str, tuple[float, ...]]]:
    """A teacher's scores of the positives, and of the hard negatives; one list may hold those after these."""
    if "scores" not in fields and "negative_scores" not in fields:
        return (), {}
    counts = {code: len(texts) for code, texts in negatives.items() if texts}
    (name, value), *_ = fields.get("scores", [("", None)])
    if (
        name in PLAIN["scores"]
        and len(counts) == 1
        and isinstance(value, list)
        and len(value) == positives + sum(counts.values())
    ):
        both = _scores(fields, "scores", {"": len(value)})[""]
        return both[:positives], dict.fromkeys(counts, both[positives:])
    scores = _scores(fields, "scores", {"": positives}).get("", ())
    return scores, _scores(fields, "negative_scores", counts)


def _scores(fields: Fields, what: str, counts: dict[str, int]) -> dict[str, tuple[float, ...]]:
    """A teacher's scores by language, one for each of so many passages, NaN for null; {} where there are none."""
    for name, value in fields.get(what, ()):
        if len(counts) != 1 and not isinstance(value, dict):
            if value == []:
                return {}
            raise UnreadableError(
                f"{name!r} must be numbers, one for each passage, by language as the passages are; it is "
                f"{str(value)[:80]}"
            )
        by_language = value if isinstance(value, dict) else {next(iter(counts)): value}
        made = {}
        for code, entry in by_language.items():
            values = [_number(v) for v in (entry if isinstance(entry, list) else [entry])]
            good = None not in values
            if not good or len(values) not in (0, counts.get(code, 0)):
                raise UnreadableError(
                    f"{name!r} must be {counts.get(code, 0)} numbers, one for each passage; it is {str(value)[:80]}"
                )
            if values:
                made[code] = tuple(values)
        return made
    return {}


def _number(value: object) -> float | None:
    """A number that 32 bits hold, NaN for null, also of text (a cell of CSV) or Decimal (Parquet); None: it is none."""
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if abs(number) < 3e38 or math.isnan(number) else None


def _language(fields: Fields, layout: Layout, side: str, source: Source) -> str:
    """The language that a record names for a side, or the source."""
    for what in (f"{side}_language", "language"):
        for name, value in fields.get(what, ()):
            if not isinstance(value, str):
                raise UnreadableError(f"{name!r} is {described(value)}; a language code is needed, as 'en'")
            return value
    if not source.language:
        raise UnreadableError(
            f"no language: set the source's language, or give the record {layout.names['language'][0]!r}"
        )
    return source.language
