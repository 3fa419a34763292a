"""Command lines by jsonargparse, with YAML as people mean it, and mistakes said in the words of the settings."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any, get_args

import yaml

from hbt_fast.base.errors import UserError
from hbt_fast.base.ranges import _hints, wanted
from hbt_fast.base.settings_files import load, read

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

UNREADABLE = (yaml.YAMLError, OverflowError, RecursionError)
MODE = "hbt_fast"  # of jsonargparse: our YAML, and no other program's in this process
ELSEWHERE = {  # what other trainers call it
    "lr": "train.learning_rate",
    "epochs": "train.steps",
    "max_steps": "train.steps",
    "output_dir": "train.run_dir",
    "model_name_or_path": "model.path",
    "warmup_ratio": "train.warmup",
    "per_device_train_batch_size": "batch.size",
    "bf16": "train.precision",
    "fp16": "train.precision",
}


def new_parser(program: str, description: str) -> ArgumentParser:
    """An empty command line."""
    from jsonargparse import ArgumentParser, set_loader

    set_loader(MODE, _value, (yaml.YAMLError,))
    return ArgumentParser(
        prog=program, description=description, exit_on_error=False, allow_abbrev=False, parser_mode=MODE
    )


def _value(text: str) -> Any:
    """The value of a setting on the command line: what YAML takes for nothing but a comment is a text here."""
    value = load(text)
    return text if value is None and text.strip() not in ("", "~", "null", "Null", "NULL") else value


def parse_with(parser: ArgumentParser, arguments: Sequence[str], settings: type) -> Namespace:
    """What a command line says.

    Args:
        parser: from `new_parser`.
        arguments: the command line; of --config FILE the file is read here.
        settings: the dataclass whose fields the parser takes, for messages.

    Raises:
        UserError: names the file, if it is wrong in itself, and the setting, and what to write.
    """
    from jsonargparse import ArgumentError

    arguments, files = _with_texts(arguments, settings)
    try:
        return parser.instantiate(parser.parse_args(arguments))
    except (ArgumentError, *UNREADABLE) as error:
        said = _said(error, settings)
    where = ""
    for path, text in files.items():
        try:
            parser.parse_args([f"--config={text}"])
        except (ArgumentError, *UNREADABLE) as error:
            if _said(error, settings) == said:
                where = f"{path}: "
    raise UserError(f"{where}{said}\n(--help lists the settings)")


def _with_texts(arguments: Sequence[str], settings: type) -> tuple[list[str], dict[str, str]]:
    """The command line with the texts of files after --config, and the texts by path."""
    made, files, rest, groups = [], {}, list(arguments), group_names(settings)
    while rest:
        argument = rest.pop(0)
        if argument == "--config" and rest:
            argument = f"--config={rest.pop(0)}"
        if argument.startswith("--config="):
            path = argument.removeprefix("--config=")
            files[path] = yaml.safe_dump(_grouped(read(path), settings, path), sort_keys=False)
            argument = f"--config={files[path]}"
        name, _, value = argument.removeprefix("--").partition("=")
        if name in groups and not (value or "".join(rest[:1])).lstrip().startswith("{"):
            raise UserError(f"{name} is a group of settings; write one of them, as {name}.{groups[name]}=VALUE")
        made.append(argument)
    return made, files


def _grouped(value: dict, settings: type, path: str, prefix: str = "") -> dict:
    """Settings of a file without the groups that say nothing; jsonargparse takes anything for a group.

    Raises:
        UserError: a group is no mapping.
    """
    made, groups = {}, group_names(settings)
    for key, inner in value.items():
        if key in groups and inner is not None and not isinstance(inner, dict):
            raise UserError(
                f"{path}: {prefix}{key} is {inner!r:.80}, and a group of settings; write {prefix}{key}: "
                f"{{{groups[key]}: ...}}"
            )
        if key not in groups:
            made[key] = inner
        elif inner:
            made[key] = _grouped(inner, _hints(settings)[key], path, f"{prefix}{key}.")
    return made


def _said(error: Exception, settings: type) -> str:
    """A message of jsonargparse in the words of the settings, with the nearest right name or value."""
    message = str(error).strip()
    if isinstance(error, OverflowError | RecursionError):
        return "a number of more than 300 digits, which no setting takes, or one nested too deeply"
    if unknown := re.search(r"unrecognized arguments: -*(\S+)", message):
        given = unknown[1].partition("=")[0]
        if given in setting_names(settings):
            return f"{given} has no value; write {given}=VALUE"
        if not message.startswith("Parser key"):
            return f"there is no setting {given}{_near(given, setting_names(settings))}"
    if of_group := re.search(r"Group '([\w.]+)' does not accept option '([^']+)'", message):
        given = f"{of_group[1]}.{of_group[2]}"
        return f"there is no setting {given}{_near(given, setting_names(settings))}"
    key = re.match(r'Parser key "([\w.]+)"', message)
    if not key or key[1] not in (names := setting_names(settings)):
        return message
    entry = entry_class(settings, key[1])
    known = [] if entry is None else setting_names(entry)
    inner = re.findall(r'Parser key "([\w.]+)"', message)[-1]
    value = re.search(r"Given value: (.*)", message) or re.search(r"Got value: (.*)", message)
    if value and (inner == key[1] or inner in known):
        said = {"None": "null", "True": "true", "False": "false"}.get(value[1], value[1])
        cls, of = (settings, "") if inner == key[1] else (entry, f"{key[1]}: ")
        choice = wanted(cls, inner)
        near = difflib.get_close_matches(value[1], re.findall(r"[\w@-]+", choice), 1, 0.6) if " or " in choice else []
        return f"{of}{inner} is {said}; write {choice}" + (f"; did you mean {near[0]}?" if near else "")
    if option := re.search(r"Option '([^']+)' is not accepted", message):
        return f"{key[1]}: there is no {option[1]}{_near(option[1], known)}"
    if unknown:
        return f"{key[1]}: there is no {given}{_near(given, known)}"
    words = [word.strip(".") for word in re.findall(r"[\w.-]+", message)]
    hints = [_near(word, known) for word in words if word not in (*known, *names)]
    return message + next(filter(None, hints), "")


def _near(given: str, known: Sequence[str]) -> str:
    """ "; did you mean ...?", or nothing."""
    word = given.replace("-", "_").lower()
    leaf = word.rpartition(".")[2]
    found = [name for name in known if word in (name, name.replace(".", "_"))]
    found = found or ([ELSEWHERE[leaf]] if ELSEWHERE.get(leaf) in known else [])
    found = found or [name for name in known if leaf == name.rpartition(".")[2]][:3]
    found = found or difflib.get_close_matches(word, known, 1, 0.75)
    if not found:
        leaves = [name.rpartition(".")[2] for name in known]
        group = [name for name in known if name.rpartition(".")[0] == word.rpartition(".")[0]] if "." in word else known
        near = difflib.get_close_matches(leaf, [name.rpartition(".")[2] for name in group] or leaves, 1, 0.75)
        found = [name for name in group if near and name.rpartition(".")[2] == near[0]][:3]
    return f"; did you mean {' or '.join(found)}?" if found else ""


def group_names(settings: type, prefix: str = "") -> dict[str, str]:
    """The groups of settings within a dataclass by dotted name, and the first setting of each."""
    names = {}
    for field in fields(settings):
        if is_dataclass(kind := _hints(settings)[field.name]):
            names[prefix + field.name] = setting_names(kind)[0]
            names |= group_names(kind, f"{prefix}{field.name}.")
    return names


def setting_names(settings: type, prefix: str = "") -> list[str]:
    """All settings of a dataclass by dotted name."""
    names = []
    for field in fields(settings):
        kind = _hints(settings)[field.name]
        names += setting_names(kind, f"{prefix}{field.name}.") if is_dataclass(kind) else [prefix + field.name]
    return names


def entry_class(settings: type, name: str) -> type | None:
    """The dataclass that a setting is a list of, if it is."""
    kind: Any = settings
    for part in name.split("."):
        kind = _hints(kind)[part]
    return next(filter(is_dataclass, get_args(kind)), None)
