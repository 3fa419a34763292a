"""Layouts: what the fields of a record mean, as the trainers of this field write them.

A layout is a set of field names, found by looking at the first record or named by the source's `layout`. What their
values may be is the same in all; see `hbt_fast.data.record_rows`.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hbt_fast.data.rows import DataError

if TYPE_CHECKING:
    from hbt_fast.data.sources import Source

Fields = dict[str, list[tuple[str, Any]]]  # (name, value) of a record's fields, by what they are
Names = dict[str, tuple[str, ...]]  # what a field is, as "negatives" -> what records call it; * stands for anything

PLAIN = {
    "content": ("content",), "id": ("id",), "language": ("language",), "query_language": ("query_language",),
    "passage_language": ("passage_language",), "scores": ("scores", "score"), "negative_scores": ("negative_scores",),
    "prompt": ("prompt",),
}  # fmt: skip
NEGATIVES = ("negative", "negatives", "negative_[0-9]*", "negative[0-9]*")
LISTS = ("flagembedding", "tevatron", "dpr", "messages")  # layouts whose passages are lists
SEVERAL = ("passage", "negatives")  # what several fields may be
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
LABELS = {"label", "labels", "score", "relevance", "relevant", "gain", "is_relevant"}
LOOKED_AT = 1000  # records in which fields that are not read are looked for
MOST_COLUMNS = 1000  # sets of fields that are remembered


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
        there: fields of these, whatever they hold.
        not_above_0: those that may say that a row is no answer -> in how many of these rows they are 0 or below.
        columns: names of a record's fields -> which of them are what.
    """

    name: str
    names: Names
    given: Names
    looked: int = 0
    read: dict[str, None] = field(default_factory=dict)
    unread: dict[str, None] = field(default_factory=dict)
    there: dict[str, None] = field(default_factory=dict)
    not_above_0: dict[str, int] = field(default_factory=dict)
    columns: dict[tuple[str, ...], list[tuple[str, tuple[str, ...]]]] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, record: Mapping[str, Any], source: Source) -> Layout:
        """The layout of a source whose first record this is."""
        given = {what: (name,) if isinstance(name, str) else tuple(name) for what, name in source.fields.items()}
        for what, names in given.items():
            if len(names) > 1 and what not in SEVERAL:
                raise DataError(
                    f"source {source.name or source.path!r}: its fields say that {what} is {', '.join(names)}; write "
                    f"one name (lists are for {' and '.join(SEVERAL)})"
                )
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

    def fields(self, record: Mapping[str, Any]) -> Fields:
        """The fields of a record that hold something, by what they are, in the order of their names."""
        names = self.columns.get(key := tuple(record))
        if names is None:
            if len(self.columns) == MOST_COLUMNS:
                self.columns.clear()
            names = self.columns[key] = self._names_in(record)
        found = {}
        for what, own in names:
            if values := [(name, value) for name in own if (value := record[name]) is not None and value != ""]:
                found[what] = values
        return found

    def _names_in(self, record: Mapping[str, Any]) -> list[tuple[str, tuple[str, ...]]]:
        """Which of a record's fields are what; of those that a pattern fits, only what nothing else is."""
        taken = {name for names in self.names.values() for name in names if name in record}
        found = []
        for what, names in self.names.items():
            own: dict[str, None] = {}
            for name in names:
                fitting = [name] if name in record else [n for n in fnmatch.filter(record, name) if n not in taken]
                own |= dict.fromkeys(fitting)
            taken |= own.keys()
            found += [(what, tuple(own))] if own else []
        return found

    def look(self, record: Mapping[str, Any], fields: Fields) -> None:
        """Note which fields are read and which are not.

        Raises:
            DataError: the source's `fields` names one that no record has.
        """
        if self.looked == LOOKED_AT:
            return
        self.looked += 1
        used = {name for own in fields.values() for name, _ in own}
        self.there |= dict.fromkeys(record)
        for name in LABELS & record.keys() - used:
            if isinstance(record[name], int | float) and record[name] <= 0:
                self.not_above_0[name] = self.not_above_0.get(name, 0) + 1
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
                if name not in self.there and not fnmatch.filter(self.there, name):
                    near = difflib.get_close_matches(name, self.unread, 1)
                    hint = f"did you mean {near[0]!r}?" if near else f"they have {', '.join(self.there)}"
                    raise DataError(
                        f"the source's fields say that {what} is {name!r}, which none of its first {self.looked:,} "
                        f"records has; {hint}"
                    )

    def plain(self) -> dict[str, Any]:
        """As JSON."""
        found = {"layout": self.name, "read": list(self.read), "not read": list(self.unread)}
        return found | ({"not above 0": self.not_above_0} if self.not_above_0 else {})


def _fits(record: Mapping[str, Any], names: Names) -> bool:
    return all(
        any(name in record or fnmatch.filter(record, name) for name in names[what]) for what in ("query", "passage")
    )
