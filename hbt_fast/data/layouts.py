"""Layouts: what the fields of a record mean, as the trainers of this field write them; each turns a record into rows.

A layout is a set of field names, found by looking at the first record or named by the source's `layout`. Whatever the
names, a passage is a text, texts by language, or a list of passages (a row for each); a passage may be an object with
a title and a text, or chat messages.
"""

from __future__ import annotations

import difflib
import fnmatch
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hbt_fast.data.problems import Problems
from hbt_fast.data.reading import described
from hbt_fast.data.rows import DataError, Row

if TYPE_CHECKING:
    from hbt_fast.data.sources import Source

Names = dict[str, tuple[str, ...]]  # what a field is, as "negatives" -> what records call it; * stands for anything

PLAIN = {
    "content": ("content",), "id": ("id",), "language": ("language",), "query_language": ("query_language",),
    "passage_language": ("passage_language",), "scores": ("scores", "score"), "negative_scores": ("negative_scores",),
    "prompt": ("prompt",),
}  # fmt: skip
NEGATIVES = ("negative", "negatives", "negative_*", "negative[0-9]*")
LAYOUTS: dict[str, Names] = {  # the first whose query and passage a record has
    "flagembedding": {
        "query": ("query",), "passage": ("pos",), "negatives": ("neg",), "scores": ("pos_scores",),
        "negative_scores": ("neg_scores",),
    },
    "tevatron": {"query": ("query",), "passage": ("positive_passages",), "negatives": ("negative_passages",)},
    "dpr": {
        "query": ("question",), "passage": ("positive_ctxs",), "negatives": ("hard_negative_ctxs", "negative_ctxs"),
    },
    "messages": {"query": ("messages",), "passage": ("positive_messages",), "negatives": ("negative_messages",)},
    "anchors": {"query": ("anchor",), "passage": ("positive",), "negatives": NEGATIVES},
    "triplets": {"query": ("query",), "passage": ("positive",), "negatives": NEGATIVES},
    "pairs": {"query": ("query",), "passage": ("passage",), "negatives": ("negatives",)},
}  # fmt: skip
TEXTS, IDS = ("text", "contents", "body"), ("docid", "passage_id", "doc_id", "pid", "_id", "id")  # of a passage
LOOKED_AT = 1000  # records in which fields that are not read are looked for


class UnreadableError(Exception):
    """A record that is no row; the message says what is wrong with it."""


@dataclass
class Layout:
    """How the records of a source are read.

    Attributes:
        name: of the layout.
        names: what records call their fields.
        given: of these, what the source's `fields` says.
        looked: records that were looked at, the first ones.
        read: fields of these that are read.
        unread: fields that are not.
    """

    name: str
    names: Names
    given: Names
    looked: int = 0
    read: dict[str, None] = field(default_factory=dict)
    unread: dict[str, None] = field(default_factory=dict)

    @classmethod
    def of(cls, record: Mapping[str, Any], source: Source) -> Layout:
        """The layout of a source whose first record this is."""
        given = {what: (name,) if isinstance(name, str) else tuple(name) for what, name in source.fields.items()}
        found = source.layout
        if found == "auto":
            fitting = [name for name in LAYOUTS if _fits(record, LAYOUTS[name])]
            if not fitting and not {"query", "passage"} <= given.keys():  # it may be one of them but for a name or two
                fitting = [name for name in LAYOUTS if _fits(record, {**LAYOUTS[name], **given})]
            found = next(iter(fitting), "pairs")
        return cls(found, {**PLAIN, **LAYOUTS[found], **given}, given)

    def fits(self, record: Mapping[str, Any]) -> bool:
        """Whether a record has a query and a passage by these names, whatever they hold."""
        return _fits(record, self.names)

    def values(self, record: Mapping[str, Any], what: str) -> list[tuple[str, Any]]:
        """(name, value) of the fields that are `what`, in the order of their names."""
        found = []
        for pattern in self.names.get(what, ()):
            if pattern in record:
                found.append((pattern, record[pattern]))
            elif "*" in pattern:
                found += [(name, record[name]) for name in record if fnmatch.fnmatchcase(name, pattern)]
        return [(name, value) for name, value in dict(found).items() if value is not None and value != ""]

    def look(self, record: Mapping[str, Any]) -> None:
        """Note which fields are read and which are not.

        Raises:
            DataError: the source's `fields` names one that no record has.
        """
        if self.looked == LOOKED_AT:
            return
        self.looked += 1
        used = {name for what in self.names for name, _ in self.values(record, what)}
        self.read |= dict.fromkeys(name for name in record if name in used)
        self.unread |= dict.fromkeys(name for name in record if name not in used and record[name] not in (None, ""))
        if self.looked == LOOKED_AT:
            self.check()

    def check(self) -> None:
        """See that the records that were looked at have what the source's `fields` names.

        Raises:
            DataError: none has.
        """
        for what, names in self.given.items():
            for name in names:
                if not fnmatch.filter(self.read, name):
                    near = difflib.get_close_matches(name, self.unread, 1)
                    hint = (
                        f"did you mean {near[0]!r}?" if near else f"they have {', '.join({**self.read, **self.unread})}"
                    )
                    raise DataError(
                        f"the source's fields say that {what} is {name!r}, which none of its first {self.looked:,} "
                        f"records has; {hint}"
                    )

    def plain(self) -> dict[str, Any]:
        """As JSON."""
        return {"layout": self.name, "read": list(self.read), "not read": list(self.unread)}


def _fits(record: Mapping[str, Any], names: Names) -> bool:
    return all(any(fnmatch.filter(record, name) for name in names[what]) for what in ("query", "passage"))


def rows_of(record: Mapping[str, Any], layout: Layout, source: Source, where: str, problems: Problems) -> Iterator[Row]:
    """The rows of a record: one for each of its positives.

    Args:
        record: by field name.
        layout: what its fields mean.
        source: its `language` is that of texts whose record names none.
        where: the record's place.
        problems: told of what cannot be read.
    """
    layout.look(record)
    try:
        content = identifier(record, layout.names["content"][0])
        queries = _texts(*_first(record, layout, "query"), lambda: _language(record, layout, "query", source))
        positives = _positives(record, layout, lambda: _language(record, layout, "passage", source))
        negatives = _negatives(record, layout, next(iter(positives[0][0])))
        prompt = _prompt(record, layout)
        scores, negative_scores = _all_scores(record, layout, len(positives), negatives)
    except UnreadableError as error:
        problems.report(where, str(error))
        return
    for n, (passages, key) in enumerate(positives):
        score = scores[n] if scores else None
        yield Row(queries, passages, negatives, content or key, where, score, negative_scores, prompt)


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
    record: Mapping[str, Any], layout: Layout, language: Callable[[], str]
) -> list[tuple[dict[str, str], str | None]]:
    """(texts by language, id) of each passage that answers the query."""
    name, _ = _first(record, layout, "passage")
    found = [
        (name, *_passage(name, entry)) for name, value in layout.values(record, "passage") for entry in _listed(value)
    ]
    if not found:
        raise UnreadableError(f"{name!r} is an empty list; write a passage, or leave the row out")
    return [(_texts(name, passage, language), key) for name, passage, key in found]


def _first(record: Mapping[str, Any], layout: Layout, what: str) -> tuple[str, Any]:
    """Name and value of the field that is `what`."""
    found = layout.values(record, what)
    if found:
        return found[0]
    raise UnreadableError(no_text(record, layout.names[what][0], what))


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
    for code, text in value.items():
        if not isinstance(text, str):
            raise UnreadableError(
                f"{name!r} of {code!r} is {described(text)}, a text is needed; write one, or leave {code!r} out"
            )
    if not value:
        raise UnreadableError(f"{name!r} has no text in any language; write one, or leave the row out")
    return value


def _negatives(record: Mapping[str, Any], layout: Layout, language: str) -> dict[str, tuple[str, ...]]:
    """Hard negatives by language; those that do not say are in this one."""
    found: dict[str, tuple[str, ...]] = {}
    for name, value in layout.values(record, "negatives"):
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


def _prompt(record: Mapping[str, Any], layout: Layout) -> str | None:
    """What the record puts before its query."""
    for name, value in layout.values(record, "prompt"):
        if not isinstance(value, str):
            raise UnreadableError(_no_text(name, value))
        return value
    return None


def _all_scores(
    record: Mapping[str, Any], layout: Layout, positives: int, negatives: dict[str, tuple[str, ...]]
) -> tuple[tuple[float, ...], dict[str, tuple[float, ...]]]:
    """A teacher's scores of the positives, and of the hard negatives; one list may hold those after these."""
    counts = {code: len(texts) for code, texts in negatives.items() if texts}
    (name, value), *_ = layout.values(record, "scores") or [("", None)]
    if (
        name in PLAIN["scores"]
        and len(counts) == 1
        and isinstance(value, list)
        and len(value) == positives + sum(counts.values())
    ):
        both = _scores(record, layout, "scores", {"": len(value)})[""]
        return both[:positives], dict.fromkeys(counts, both[positives:])
    scores = _scores(record, layout, "scores", {"": positives}).get("", ())
    return scores, _scores(record, layout, "negative_scores", counts)


def _scores(
    record: Mapping[str, Any], layout: Layout, what: str, counts: dict[str, int]
) -> dict[str, tuple[float, ...]]:
    """A teacher's scores by language, one for each of so many passages, NaN for null; {} where there are none."""
    for name, value in layout.values(record, what):
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
            values = entry if isinstance(entry, list) else [entry]
            good = all(v is None or _single(v) for v in values)
            if not good or len(values) not in (0, counts.get(code, 0)):
                raise UnreadableError(
                    f"{name!r} must be {counts.get(code, 0)} numbers, one for each passage; it is {str(value)[:80]}"
                )
            if values:
                made[code] = tuple(math.nan if v is None else float(v) for v in values)
        return made
    return {}


def _single(value: object) -> bool:
    """Whether a value is a number that can be kept in 32 bits."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 3e38  # and no NaN


def _language(record: Mapping[str, Any], layout: Layout, side: str, source: Source) -> str:
    """The language that a record names for a side, or the source."""
    for what in (f"{side}_language", "language"):
        for name, value in layout.values(record, what):
            if not isinstance(value, str):
                raise UnreadableError(f"{name!r} is {described(value)}; a language code is needed, as 'en'")
            return value
    if not source.language:
        raise UnreadableError(
            f"no language: set the source's language, or give the record {layout.names['language'][0]!r}"
        )
    return source.language
