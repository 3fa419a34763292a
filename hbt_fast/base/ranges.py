"""Ranges of settings: what each may be stands beside its dataclass, and `check` walks a whole tree of settings.

    @ranges(size=whole(1), alpha=real(0, 1), languages=LANGUAGE)
    @dataclass(frozen=True)
    class BatchConfig: ...

A rule holds for a value, for each entry of a list, and as (rule of keys, rule of values) for a dictionary. What the
type says (bool, Literal, None or not, whole number or not) needs no rule: it is checked too, since settings may be made
in Python as well as parsed.
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import cache
from numbers import Integral, Real
from typing import Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

from hbt_fast.base.errors import UserError

MOST = 2**31 - 1  # of a number that has no bound of its own
SHOWN = 80  # characters of a value, in a message
NULLS = ("null", "Null", "NULL", "~")  # YAML's; in a setting that is a text they are a slip

C = TypeVar("C", bound=type)


class Rule(NamedTuple):
    """What a setting may be.

    Attributes:
        write: what to write, after "write".
        holds: whether a value of the right type is in range.
        examples: values just within the range, for tests.
        others: values out of it, for tests.
    """

    write: str
    holds: Callable[[Any], bool]
    examples: tuple = ()
    others: tuple = ()


def whole(low: int, high: int = MOST) -> Rule:
    """A whole number from low to high."""
    write = f"a whole number from {low:,} on" if high == MOST else f"a whole number from {low:,} to {high:,}"
    return Rule(write, lambda value: low <= value <= high, (low, high), (low - 1, high + 1))


def real(low: float, high: float, *, above: bool = False, below: bool = False) -> Rule:
    """A finite number from low to high.

    Args:
        low: the least.
        high: the largest.
        above: it must be above the least.
        below: it must be below the largest.
    """
    write = f"a number {'above' if above else 'from'} {low:g} {'and below' if below else 'to'} {high:g}"

    def holds(value: float) -> bool:
        return (low < value if above else low <= value) and (value < high if below else value <= high)

    inside = (math.nextafter(low, high) if above else low, math.nextafter(high, low) if below else high)
    outside = (math.nan, math.inf, -math.inf, *([low] if above else []), *([high] if below else []), low - 1, high + 1)
    return Rule(write, holds, inside, outside)


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" or character == "\0" for character in text)


TEXT = Rule("text of whole Unicode characters", _is_unicode, ("", "Frage: "), ("\udc80", "a\0b"))
NAME = Rule(
    "a name",
    lambda text: bool(text.strip()) and text not in NULLS and _is_unicode(text),
    ("x",),
    ("", " ", "null", "\udc80"),
)
PATH = NAME._replace(write="a path")


def one_of(*names: str) -> Rule:
    """One of some names."""
    return Rule("one of " + ", ".join(names), names.__contains__, names, ("", "null", names[0] + "x"))


def ranges(**rules: Rule | tuple[Rule, Rule]) -> Callable[[C], C]:
    """Declare the rules of a dataclass's fields; the decorator stands above @dataclass."""

    def declare(cls: C) -> C:
        cls.ranges = rules
        return cls

    return declare


def check(settings: object, prefix: str = "", error: type[UserError] = UserError) -> None:
    """See that all settings of a dataclass, and of those within it, are of their type and in range.

    Args:
        settings: a dataclass with `ranges`.
        prefix: before each name in messages, as "batch.".
        error: what to raise.

    Raises:
        UserError: names the setting, its value, and what to write.
    """
    hints = _hints(type(settings))
    for field in fields(settings):
        rule = getattr(settings, "ranges", {}).get(field.name)
        _check(getattr(settings, field.name), hints[field.name], rule, prefix + field.name, error)


@cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def wanted(cls: type, name: str) -> str:
    """What to write for a setting, as text: "a whole number from 1 on or auto".

    Args:
        cls: the dataclass.
        name: dotted, within it.
    """
    first, _, rest = name.partition(".")
    kind = _hints(cls)[first]
    return wanted(kind, rest) if rest and is_dataclass(kind) else _wanted(kind, getattr(cls, "ranges", {}).get(first))


def _kinds(kind: object, value: object = None) -> tuple[object, list[object], bool]:
    """The type that is no Literal and not None (or None), the Literal's values, and whether None is allowed.

    Of a type and lists of it, it is the list where the value is one.
    """
    kinds = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    words = [word for one in kinds if get_origin(one) is Literal for word in get_args(one)]
    left = [one for one in kinds if one is not type(None) and get_origin(one) is not Literal]
    lists = [one for one in left if get_origin(one) is list] if isinstance(value, list | tuple) else []
    return (lists or left or [None])[0], words, type(None) in kinds


def _wanted(kind: object, rule: Rule | tuple[Rule, Rule] | None) -> str:
    kind, words, nullable = _kinds(kind)
    base = get_origin(kind) or kind
    if base is None:
        what = []
    elif base is list:
        of = get_args(kind)[0]
        what = [f"a list, each of its entries {_wanted(of, rule)}"]
        if is_dataclass(of):
            what = [f"a list of settings in braces, as [{{{fields(of)[0].name}: ...}}]"]
    elif base is dict:
        what = [f"a dictionary: {rule[0].write}: {rule[1].write}"]
    elif rule is None:
        what = [{bool: "true or false"}.get(base, f"the settings of a {base.__name__}")]
    else:
        what = [rule.write]
    *most, last = [*what, *map(str, words), *["null"] * nullable]
    return f"{', '.join(most)} or {last}" if most else last


def _check(value: object, hint: object, rule: Rule | tuple | None, name: str, error: type[UserError]) -> None:
    kind, words, nullable = _kinds(hint, value)
    if (value is None and nullable) or any(type(value) is type(word) and value == word for word in words):
        return
    base, right, entries = get_origin(kind) or kind, False, []
    if is_dataclass(base):
        right = isinstance(value, base)
    elif base is list:  # [] would be taken for null, which is "all", or for no name
        right = isinstance(value, list | tuple) and (bool(value) or kind is hint)
        entries = [(entry, get_args(kind)[0], rule, f"{name}[{n}]") for n, entry in enumerate(value)] if right else []
    elif base is dict:
        right, rules = isinstance(value, dict), rule or (None, None)
        for key, entry in value.items() if right else ():
            entries.append((key, get_args(kind)[0], rules[0], f"a key of {name}"))
            entries.append((entry, get_args(kind)[1], rules[1], f"{name}.{key}"))
    elif base is not None:
        right = isinstance(value, {bool: bool, int: Integral, float: Real, str: str}[base])
        right = right and (base is bool) == isinstance(value, bool) and (rule is None or rule.holds(value))
    if not right:
        shown = "null" if value is None else str(value).lower() if isinstance(value, bool) else ascii(value)
        if isinstance(value, str):
            shown = repr(value)
        shown = f"{shown[:SHOWN]}..." if len(shown) > SHOWN else shown
        raise error(f"{name} is {shown}; write {_wanted(hint, rule)}")
    if is_dataclass(base):
        check(value, f"{name}.", error)
    for entry in entries:
        _check(*entry, error)
