"""Whether what a file of results holds is what its dataclass declares."""

from __future__ import annotations

from typing import Any, get_args, get_origin, get_type_hints

from hbt_fast.data.reading import described


def check_fields(kind: type, values: dict[str, Any]) -> None:
    """See that values read from JSON have the types of a dataclass's fields.

    Args:
        kind: a dataclass of str, int, float, lists and dictionaries of these, and unions of plain types.
        values: by name; names that it has not are passed over.

    Raises:
        ValueError: one is of another type; names it.
    """
    for name, hint in get_type_hints(kind).items():
        if name in values and not _is(values[name], hint):
            raise ValueError(f"{name!r} is or holds something that it should not: {described(values[name])}")


def _is(value: object, hint: Any) -> bool:
    inner = get_args(hint)
    if get_origin(hint) is list:
        return isinstance(value, list) and all(_is(one, inner[0]) for one in value)
    if get_origin(hint) is dict:
        return isinstance(value, dict) and all(isinstance(k, str) and _is(v, inner[1]) for k, v in value.items())
    if inner:  # a union
        return any(_is(value, one) for one in inner)
    if hint is float:
        return isinstance(value, float) or (isinstance(value, int) and abs(value) < 1 << 1000)
    return hint not in (str, int) or isinstance(value, hint)
