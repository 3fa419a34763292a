"""YAML as people mean it: YAML 1.2's true and false (no is Norwegian), 1e-5 a number, no key twice.

PyYAML reads YAML 1.1, in which no, off and y are booleans, 1e-5 and 2:30 are a text and 150, and the last of equal keys
wins in silence.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from hbt_fast.base.errors import UserError

LARGEST = 16 << 20  # bytes of a file of settings
NODES = 1_000_000  # of it, aliases counted wherever they stand
SCALARS = {  # tag -> form, first characters
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?(?:0|[1-9][0-9_]*)|0x[0-9a-fA-F]+", "-+0123456789"),
    "float": (
        r"[-+]?(?:\.[0-9]+|[0-9][0-9_]*\.[0-9_]*)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
}  # fmt: skip


@cache
def _loader() -> type:
    class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        pass

    gone = {f"tag:yaml.org,2002:{name}" for name in (*SCALARS, "timestamp", "value")}
    Loader.yaml_implicit_resolvers = {
        first: [(tag, form) for tag, form in forms if tag not in gone]
        for first, forms in Loader.yaml_implicit_resolvers.items()
    }
    for name, (form, first) in SCALARS.items():
        Loader.add_implicit_resolver(f"tag:yaml.org,2002:{name}", re.compile(f"(?:{form})$"), list(first))
    Loader.add_constructor("tag:yaml.org,2002:map", _mapping)
    return Loader


def _mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> Any:
    seen: dict[str, int] = {}
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode):
            if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value} is there twice, first in line {seen[key.value]}", key.start_mark
                )
            seen[key.value] = key.start_mark.line + 1
    yield from loader.construct_yaml_map(node)


def load(text: str) -> Any:
    """The value that a YAML text stands for.

    Raises:
        yaml.YAMLError: it is no YAML, has a key twice, or is nested too deeply.
    """
    loader = None
    try:
        loader = _loader()(text)
        value = loader.get_single_data()
    except RecursionError:
        raise yaml.YAMLError("nested too deeply") from None
    except (ValueError, LookupError, TypeError, AttributeError) as error:  # 5,000 digits; a tag that its value belies
        what = f"a value that cannot be read ({error})"
        raise yaml.YAMLError(what) from None
    finally:
        if loader is not None:
            loader.dispose()
    _count(value, 0, 0)
    return value


def _count(value: object, count: int, depth: int) -> int:
    """That aliases do not make it huge or endless."""
    if count > NODES or depth > 200:
        raise yaml.YAMLError(f"more than {NODES:,} values, aliases counted, or nested deeper than 200")
    if isinstance(value, dict | list):
        for entry in value.values() if isinstance(value, dict) else value:
            count = _count(entry, count + 1, depth + 1)
    return count


def read(path: str) -> dict[Any, Any]:
    """What a file of settings says: a YAML mapping, or nothing.

    Raises:
        UserError: it is not; names the file, and the line if there is one.
    """
    file = Path(path).expanduser()
    try:
        with open(file, "rb") as opened:
            raw = opened.read(LARGEST + 1)
    except (OSError, ValueError) as error:  # of a name with a null character
        raise UserError(
            f"--config {path}: {getattr(error, 'strerror', None) or error}; name a YAML file of settings"
        ) from None
    if len(raw) > LARGEST:
        raise UserError(f"--config {path}: larger than {LARGEST >> 20} MiB, which is no file of settings")
    try:
        value = load(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"--config {path}: not UTF-8 text (byte {error.start} is 0x{raw[error.start]:02x})") from None
    except yaml.YAMLError as error:
        mark, what = getattr(error, "problem_mark", None), getattr(error, "problem", None) or str(error)
        what = "a tab is no indentation in YAML; write spaces" if r"'\t'" in what else what.replace("\n", " ")
        line = "" if mark is None else f":{mark.line + 1}"
        raise UserError(f"--config {path}{line}: not YAML of settings: {what}") from None
    if not isinstance(value, dict | None):
        raise UserError(f"--config {path}: settings are groups, as train: {{steps: 100}}; this is {_kind(value)}")
    return value or {}


def _kind(value: object) -> str:
    return "a list" if isinstance(value, list) else f"the text {value!r:.60}" if isinstance(value, str) else repr(value)
