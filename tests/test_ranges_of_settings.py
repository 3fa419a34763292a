"""Every setting has a range, which is checked before anything is read, however the setting was given."""

import math
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Literal, get_args, get_origin

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hbt_fast.base.command_line import setting_names
from hbt_fast.base.errors import UserError
from hbt_fast.base.ranges import _hints, _kinds
from hbt_fast.base.settings_files import read
from hbt_fast.config import Config, dump, parse
from hbt_fast.data.sources import Format, Source
from hbt_fast.settings import check_config

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
BOUND = {int, float, str}


def scalars(cls=Config, prefix=""):
    """(dotted name, rule, type) of every number and text among the settings, and in their lists and dictionaries."""
    for field in fields(cls):
        kind, _, _ = _kinds(_hints(cls)[field.name])
        rule = getattr(cls, "ranges", {}).get(field.name)
        inner = [one for one in get_args(kind) if is_dataclass(one)]
        if is_dataclass(kind) or inner:
            yield from scalars(*inner or [kind], f"{prefix}{field.name}{'[0]' if inner else ''}.")
        elif get_origin(kind) is dict:
            for part, of, its in zip(("key", "value"), get_args(kind), rule or (None, None), strict=True):
                yield f"{prefix}{field.name}:{part}", its, _kinds(of)[0]
        elif get_origin(kind) is list:
            yield f"{prefix}{field.name}[0]", rule, get_args(kind)[0]
        elif kind in BOUND:
            yield prefix + field.name, rule, kind


ALL = list(scalars())


def put(config, name, value):
    """Settings with one changed: a.b, a.b[0], a.b:key (of a dictionary)."""
    first, _, rest = name.partition(".")
    key, part = first.removesuffix("[0]").partition(":")[::2]
    if first.endswith("[0]"):
        new = [put(Source(path="x.jsonl"), rest, value)] if rest else [value]
    elif part:
        inner = {"files": "x.txt", "fields": "x", "prompts": "x", "language_weights": 1.0}[key]
        new = {value: inner} if part == "key" else {"query" if key in ("fields", "prompts") else "de": value}
    else:
        new = put(getattr(config, key), rest, value) if rest else value
    return replace(config, **{key: new})


def test_every_number_and_text_has_a_range():
    assert [name for name, rule, _ in ALL if rule is None] == []
    assert len(ALL) > 60


@pytest.mark.parametrize(("name", "rule", "kind"), ALL, ids=[name for name, _, _ in ALL])
def test_what_is_out_of_range_is_named_with_what_to_write(name, rule, kind):
    wrong_type = [True, (), object(), b"x", *([] if kind is str else ["x"]), *([3] if kind is str else [])]
    assert rule.others
    for value in (*rule.others, *wrong_type):
        with pytest.raises(UserError) as error:
            check_config(put(Config(), name, value))
        said = name.partition(":")[0]
        assert str(error.value).startswith((said, f"a key of {said}")), error.value
        assert "; write " in str(error.value)


@pytest.mark.parametrize(("name", "rule", "kind"), ALL, ids=[name for name, _, _ in ALL])
def test_the_ends_of_a_range_are_in_it(name, rule, kind):
    assert rule.examples
    for value in rule.examples:
        assert rule.holds(value)
        said = refusal(check_config, put(Config(), name, value))  # it may not go with another setting
        assert not said.startswith(f"{name} is {value!r}; write {rule.write}")


@pytest.mark.parametrize("name", setting_names(Config))
def test_null_and_other_types_are_refused_where_the_type_does_not_allow_them(name):
    hint = Config
    for part in name.split("."):
        hint = _hints(hint)[part]
    wrong = [object(), *([] if type(None) in get_args(hint) else [None]), *([1, "true"] if hint is bool else [])]
    for value in [*wrong, *([True, 1.0] if get_origin(hint) is Literal else [])]:  # True == 1, which is a zero_stage
        with pytest.raises(UserError) as error:
            check_config(put(Config(), name, value))
        assert str(error.value).startswith(f"{name} is "), error.value


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("train.steps", np.int64(7)),
        ("train.learning_rate", np.float32(0.5)),
        ("train.learning_rate", 1),
        ("loss.matryoshka_dimensions", (32, 16)),
        ("batch.language_weights", {"de": np.float64(2)}),
    ],
)
def test_other_numbers_and_sequences_of_python_are_taken(name, value):
    check_config(put(Config(), name, value))


@pytest.mark.parametrize("word", ["null", "Null", "NULL", "~"])
def test_a_null_that_became_a_text_is_refused_where_a_name_is_needed(word):
    for name in ("train.run_dir", "eval.split", "model.path"):
        assert refusal(check_config, put(Config(), name, word)).startswith(f"{name} is '{word}'; write a ")
    check_config(put(Config(), "model.query_prompt", word))  # text like any other


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("x" * 10_000, f"'{'x' * 79}..."),
        ([0] * 10_000, "[" + "0, " * 26 + "0..."),
        (False, "false"),
        (None, "null"),
        ("\x1b\udc80", r"'\x1b\udc80'"),
        ("für", "'für'"),
    ],
)
def test_a_value_is_shown_as_it_is_written_and_in_short(value, shown):
    assert refusal(check_config, put(Config(), "train.steps", value)).startswith(f"train.steps is {shown}; write a ")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_recipes_are_in_range(path):
    config = parse("p", "d", ["--config", str(path)])
    check_config(config)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model.scratch.heads=5"], r"heads is 5, which does not divide .* 192; write 4 or 6 heads"),
        (["loss.matryoshka_dimensions=[500]"], r"matryoshka_dimensions has 500; write numbers from 1 to 191"),
        (
            ["loss.learn_temperature=true", "loss.temperature=0.001"],
            r"max_scale is 100, below 1/loss.temperature, 1000",
        ),
        (
            ["loss.learn_temperature=true", "loss.temperature=0.0099"],
            r"max_scale is 100, below 1/loss.temperature, 101",
        ),
        (["batch.strategy=code-switched"], r"batch.code_switch.lexicons names no dictionary"),
        (
            ["batch.code_switch={lexicons: [x], queries: false, passages: false}"],
            r"batch.code_switch: queries and passages are both false",
        ),
        (["train.zero_stage=2", "train.engine=torch"], r"train.zero_stage is 2, which needs"),
        (["train.deepspeed=none.json"], r"train.deepspeed is 'none.json', and there is no such file"),
        (["eval.task=beir"], r"eval.task is beir, but eval.data is not set"),
        (
            ["eval.task=beir", "eval.data=x", "eval.context=true"],
            r"eval.context is set, which task beir has no use for",
        ),
        (["data.sources=[{path: a.tsv, files: {de: b}}]"], r"data.sources\[0\]: give either path or files"),
        (["data.sources=[{name: a}]"], r"data.sources\[0\]: give either path or files"),
        (
            ["data.sources=[{format: cldr, path: a}]"],
            r"data.sources\[0\].path is set, which format cldr has no use for",
        ),
        (["data.sources=[{path: a.tsv, config: x}]"], r"config is set, which format auto has no use for"),
        (
            ["data.languages=[]"],
            r"data.languages is \[\]; write a list, each of its entries a language code .* or null",
        ),
        (["batch.language_weights={de: 1, deu: 2}"], r"language_weights names de twice, as de and as deu"),
    ],
)
def test_settings_that_do_not_go_together_are_named(arguments, message):
    with pytest.raises(UserError, match=message):
        parse("p", "d", arguments)


SET = {
    "bitext": True, "passage": "paragraph", "pair": "next", "columns": ["a"], "documents": "d", "split": "dev",
    "config": "c", "path": "p", "files": {"de": "f"}, "exclude_paragraphs_of": ["e"], "quoting": "plain",
    "layout": "pairs", "fields": {"query": "q"},
}  # fmt: skip
HEEDED = {
    "auto": SET.keys() - {"config"},
    "squad": {"passage", "path", "files", "exclude_paragraphs_of", "layout"},
    "jsonl": {"bitext", "passage", "path", "files", "layout", "fields"},
    "json": {"bitext", "path", "layout", "passage", "fields"},
    "csv": {"bitext", "columns", "path", "quoting", "layout", "passage", "fields"},
    "tsv": {"bitext", "columns", "path", "quoting", "layout", "passage", "fields"},
    "parquet": {"bitext", "path", "layout", "passage", "fields"},
    "arrow": {"bitext", "path", "layout", "passage", "fields"},
    "tmx": {"bitext", "path", "files"},
    "lines": {"pair", "documents", "path", "files"},
    "hf": {"bitext", "split", "config", "path", "layout", "passage", "fields"},
    "judged": {"split", "path"},
    "ir_datasets": {"path"},
    "cldr": set(),
}


@pytest.mark.parametrize("kind", get_args(Format))
def test_what_a_format_has_no_use_for_is_refused(kind):
    for name, value in SET.items():
        place = {} if kind == "cldr" or name == "files" else {"path": "p"}
        said = refusal(check_config, put(Config(), "data.sources", [Source(format=kind, **place | {name: value})]))
        message = f"data.sources[0].{name} is set, which format {kind} has no use for; "
        assert said.startswith(message) if name not in HEEDED[kind] else said == ""


@pytest.mark.parametrize(
    "arguments",
    [
        ["loss.temperature=0.001"],  # it is not learned
        ["loss.learn_temperature=true", "loss.temperature=0.01"],  # 1/0.01 is max_scale
        ["model.path=x", "model.scratch.heads=5", "loss.matryoshka_dimensions=[500]"],  # its shape is not used
        ["batch.code_switch.languages=[de]"],
    ],
)
def test_settings_that_go_together_are_taken(arguments):
    assert refusal(parse, "p", "d", arguments) == ""


def test_no_setting_is_null_that_cannot_be():
    for name in ("train.run_dir", "data.store_dir", "loss.backend", "train.steps", "loss.temperature"):
        with pytest.raises(UserError, match=rf"^{name} is '?null'?; write"):
            parse("p", "d", [f"{name}=null"])
    for name in ("model.path", "eval.split", "eval.data", "train.deepspeed", "model.dropout", "data.languages"):
        config = parse("p", "d", [f"{name}=null"])
        assert getattr(getattr(config, name.partition(".")[0]), name.partition(".")[2]) is None


NASTY = st.one_of(
    st.sampled_from(
        [math.nan, math.inf, -math.inf, -1, 0, 1, 2**31, 2**63, 2**64, 10**400, 1e308, 5e-324, -0.0, True, False, None]
    ),
    st.sampled_from(["", " ", "null", "no", "~", "nan", ".nan", ".inf", "1e3", "1_000", "0x10", "010", "9" * 5000]),
    st.sampled_from(["{", "[", "[[[", "{a: 1, a: 2}", "[" * 2000, "&a [*a]", "!!int x", "a: b: c", "- -", "%"]),
    st.sampled_from(["/", "/dev/null", ".", "..", "\u2028", "\ud800", "a\0b", "𝕏", "--config", "=", ":", "x: y", "<<"]),
    st.sampled_from([[], [[]], {}, {"": ""}, [None], [math.nan], {"de": math.nan}, {"no": 1}, [{"path": "x"}], [{}]]),
    st.text(max_size=20),
    st.integers(),
    st.floats(),
)  # fmt: skip
NAMES = [*setting_names(Config), "model", "train", "loss", "data", "x", "train.x", "model.scratch", "batch.code_switch"]


def refusal(function, *arguments):
    """What a user error of a call says; "" where it is none."""
    try:
        function(*arguments)
    except UserError as error:
        return str(error) or "nothing"
    return ""


def outcome(arguments):
    """The settings, which are then in range; None where they are refused."""
    if refusal(parse, "p", "d", arguments):
        return None
    config = parse("p", "d", arguments)
    check_config(config)
    return config


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(NAMES), NASTY), min_size=1, max_size=3))
def test_any_command_line_gives_settings_or_a_message(given):
    outcome([f"{name}={value}" for name, value in given])


@settings(max_examples=40, deadline=None)
@given(given=st.lists(st.tuples(st.sampled_from(NAMES), NASTY), min_size=1, max_size=3))
def test_any_file_gives_settings_or_a_message(tmp_path_factory, given):
    import yaml

    whole = {}
    for name, value in given:
        inner, *rest = whole, *name.split(".")
        for part in rest[:-1]:
            inner = inner.setdefault(part, {}) if isinstance(inner, dict) else {}
        if isinstance(inner, dict):
            inner[rest[-1]] = value
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(yaml.safe_dump(whole, allow_unicode=False))
    config = outcome(["--config", str(path)])
    if config is not None:
        path.write_text(dump(config), encoding="utf-8")
        assert repr(outcome(["--config", str(path)])) == repr(config)


@settings(max_examples=60, deadline=None)
@given(text=st.one_of(st.binary(max_size=60), NASTY.map(lambda value: str(value).encode("utf-8", "surrogatepass"))))
def test_any_bytes_are_a_mapping_or_a_message(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(text)
    assert refusal(read, str(path)).startswith(f"--config {path}") or isinstance(read(str(path)), dict)
