"""The command line: YAML, overrides in both spellings, and errors that name the nearest right setting."""

from dataclasses import replace

import pytest
import torch
from yaml import YAMLError

from hbt_fast.base.errors import UserError
from hbt_fast.base.settings_files import _loader, load
from hbt_fast.config import Config, TrainConfig, dump, parse
from hbt_fast.engine.backends import SettingError, deepspeed_config
from hbt_fast.engine.launch import start
from hbt_fast.train import train


def parsed(*arguments):
    return parse("hbt_fast.train", "trains", list(arguments))


def test_a_file_then_the_command_line(tmp_path):
    (tmp_path / "a.yaml").write_text(
        "batch: {size: 32, strategy: cross}\ndata:\n  sources: [{path: x.jsonl, weight: 2}]\n"
    )
    config = parsed("--config", str(tmp_path / "a.yaml"), "train.steps=7", "--batch.size", "64", "--local_rank=1")
    assert (config.batch.size, config.batch.strategy, config.train.steps) == (64, "cross", 7)
    assert config.data.sources[0].path == "x.jsonl"
    assert parsed("data.sources=[{path: b.tsv, bitext: true}]").data.sources[0].bitext


def test_sources_on_the_command_line_replace_those_of_the_file(tmp_path):
    (tmp_path / "a.yaml").write_text("data:\n  sources: [{path: x.jsonl, language: de, limit: 3}, {path: y.jsonl}]\n")
    for spelled in (["data.sources=[{path: z.jsonl}]"], ["--data.sources", "[{path: z.jsonl}]"]):
        (source,) = parsed("--config", str(tmp_path / "a.yaml"), *spelled).data.sources
        assert (source.path, source.language, source.limit) == ("z.jsonl", None, None)


def test_groups_that_say_nothing_are_none(tmp_path):
    (tmp_path / "a.yaml").write_text("model:\ndata: {}\nbatch: {code_switch: null, size: 32}\nloss:\n  # later\n")
    config = parsed("--config", str(tmp_path / "a.yaml"))
    assert config == replace(Config(), batch=replace(Config().batch, size=32))


def test_a_wrong_setting_is_said_to_be_of_the_file_that_has_it(tmp_path):
    (tmp_path / "a.yaml").write_text("train: {steps: many}\n")
    (tmp_path / "b.yaml").write_text("train: {seed: x}\n")
    right = tmp_path / "c.yaml"
    right.write_text("train: {steps: 3}\n")
    files = [f"--config={tmp_path / name}.yaml" for name in "abc"]
    for arguments, said in (
        (files[:2], f"{tmp_path / 'a.yaml'}: train.steps is many; write"),
        ([files[0], files[2]], f"{tmp_path / 'a.yaml'}: train.steps is many; write"),
        ([files[2], files[1]], f"{tmp_path / 'b.yaml'}: train.seed is x; write"),
        ([files[2], "train.steps=many"], "train.steps is many; write"),
    ):
        with pytest.raises(UserError) as error:
            parsed(*arguments)
        assert str(error.value).startswith(said)


def test_what_is_written_reads_back_equal(tmp_path):
    config = parsed("data.sources=[{path: x.jsonl, files: {}, fields: {query: q}}]", "loss.temperature=0.02")
    (tmp_path / "b.yaml").write_text(dump(config))
    assert parsed("--config", str(tmp_path / "b.yaml")) == config


@pytest.mark.parametrize(
    ("argument", "hint"),
    [
        ("train.stepz=3", "did you mean train.steps"),
        ("--train.learning_rat=3", "did you mean train.learning_rate"),
        ("batch.strategy=hybird", "did you mean hybrid?"),
        ("train.steps=many", "train.steps"),
        ("data.sources=[{pth: x}]", "data.sources: there is no pth; did you mean path?"),
        ("data.sources=[{path: x, langauge: en}]", "data.sources: there is no langauge; did you mean language?"),
        ("--batch-size=3", "did you mean batch.size?"),
        ("--train.learning-rate=3", "did you mean train.learning_rate?"),
        ("--learning-rate=3", "did you mean train.learning_rate?"),
        ("--lr=3", "did you mean train.learning_rate?"),
        ("query_promt=x", "did you mean model.query_prompt?"),
        ("languages=[de]", "did you mean data.languages or batch.code_switch.languages or eval.languages?"),
        ("--train=nan", "train is a group of settings; write one of them, as train.run_dir=VALUE"),
        ("train.steps", "train.steps has no value; write train.steps=VALUE"),
    ],
)
def test_a_wrong_setting_is_named_with_the_nearest_right_one(argument, hint):
    with pytest.raises(UserError) as error:
        parsed(argument)
    assert hint in str(error.value)


def test_nothing_is_meant_where_no_setting_is_wrong(tmp_path):
    (tmp_path / "a.yaml").write_text("batch:\n  size: 3\n bad: 4\n")
    for arguments in (("--config", str(tmp_path / "config.yml")), ("--config", str(tmp_path / "a.yaml"))):
        with pytest.raises(UserError) as error:
            parsed(*arguments)
        assert "did you mean" not in str(error.value)


def test_a_wrong_key_in_a_file_is_named(tmp_path):
    (tmp_path / "a.yaml").write_text("batch: {siez: 32}\n")
    with pytest.raises(UserError) as error:
        parsed("--config", str(tmp_path / "a.yaml"))
    assert "did you mean" in str(error.value)
    assert "size" in str(error.value)


def test_yaml_is_read_as_people_mean_it(tmp_path):
    assert load("[no, on, yes, y, off, 1e-5, 2:30, 2020-01-01, true, False, 010, =]") == [
        "no", "on", "yes", "y", "off", 1e-5, "2:30", "2020-01-01", True, False, "010", "=",
    ]  # fmt: skip
    assert load("[True, TRUE, false, FALSE, 0x1F, +7, 1_000, 1e5, .5, 1., 1.5E-3, -.inf, .Inf, ~, Null]") == [
        True, True, False, False, 31, 7, 1000, 1e5, 0.5, 1.0, 1.5e-3, float("-inf"), float("inf"), None, None,
    ]  # fmt: skip
    assert repr(load("[.nan, .NaN, 1e, 0x, 1.2.3, inf, nan, 0o17, 1:30.5]")) == (
        "[nan, nan, '1e', '0x', '1.2.3', 'inf', 'nan', '0o17', '1:30.5']"
    )
    assert load("{a: &a {x: 1}, b: &b {y: 2}, c: {<<: *a, <<: *b, x: 3}}")["c"] == {"x": 3, "y": 2}
    (tmp_path / "a.yaml").write_text(
        "data: {languages: [no, de], sources: [{files: {no: a.txt, de: b.txt}}, {path: x.jsonl, language: no}]}\n"
        "train: {learning_rate: 1e-5}\n"
    )
    config = parsed("--config", str(tmp_path / "a.yaml"))
    assert config.data.languages == ["no", "de"]
    assert config.data.sources[0].files == {"no": "a.txt", "de": "b.txt"}
    assert config.data.sources[1].language == "no"
    assert config.train.learning_rate == 1e-5


def test_without_libyaml_settings_are_read_alike(monkeypatch):
    monkeypatch.delattr("yaml.CSafeLoader", raising=False)
    _loader.cache_clear()
    try:
        assert load("{a: [no, 1e-5, 0x1F, true], b: {c: null}}") == {"a": ["no", 1e-5, 31, True], "b": {"c": None}}
        for text, message in (("{a: 1, a: 2}", "the key a is there twice"), ("[" * 900 + "]" * 900, "nested")):
            with pytest.raises(YAMLError, match=message):
                load(text)
    finally:
        _loader.cache_clear()


def test_a_file_may_be_empty_have_a_byte_order_mark_and_lie_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for text in ("", "# nothing\n", "train:\nmodel: {}\n", "\ufeffbatch: {size: 32}\n"):
        (tmp_path / "a.yaml").write_text(text, encoding="utf-8")
        assert parsed("--config", "~/a.yaml").batch.size == (32 if "size" in text else Config().batch.size)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("null", None),
        ("Null", None),
        ("NULL", None),
        ("~", None),
        ("", ""),
        ("no", "no"),
        ("# ask: ", "# ask: "),
        ("&ask", "&ask"),
    ],
)
def test_only_null_on_the_command_line_is_null(given, meant):
    assert parsed(f"model.query_prompt={given}").model.query_prompt == meant


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train:\n  steps: 3\n  clip: 1\n  steps: 4\n", r"a.yaml:4: .*the key steps is there twice, first in line 2"),
        ("train: {}\nloss: {}\ntrain: {}\n", r"a.yaml:3: .*the key train is there twice"),
        ("train:\n\tsteps: 3\n", r"a.yaml:2: not YAML"),
        ("[1, 2]", r"a.yaml: settings are groups"),
        ("train", r"a.yaml: settings are groups"),
        ("train: 3", r"a.yaml: train is 3, and a group of settings; write train: \{run_dir: \.\.\.\}"),
        ("model: .nan", r"a.yaml: model is nan, and a group"),
        ("a: &a [*a]", r"a.yaml: not YAML of settings: more than"),
        (
            "a: &a [" + "x, " * 100 + "]\nb: &b [" + "*a, " * 100 + "]\nc: [" + "*b, " * 101 + "]",
            r"a.yaml: not YAML of settings: more than 1,000,000 values",
        ),
        ("a: " + "[" * 3000, r"a.yaml.*not YAML of settings"),
        ("a: " + "9" * 5000, r"a.yaml: not YAML of settings"),
        (b"\xff\xfe\x00a", r"a.yaml: not UTF-8"),
        (b"a: 'b\n", r"a.yaml:2: not YAML"),
        ("x" * (16 << 20) + "x", r"a.yaml: larger than 16 MiB"),
        ("train: {steps: many}", r"a.yaml: train.steps is many; write a whole number from 1 on"),
        ("data: {sources: [{path: x, fields: {question: q}}]}", r"a key of data.sources\[0\].fields is 'question'"),
        (
            "data: {sources: [{files: {english: q}}]}",
            r"a key of data.sources\[0\].files is 'english'; write a language",
        ),
    ],
)
def test_a_file_that_is_no_settings_is_one_message(tmp_path, text, message):
    (tmp_path / "a.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=message):
        parsed("--config", str(tmp_path / "a.yaml"))


@pytest.mark.parametrize("path", ["none.yaml", ".", "a\0b", "x" * 5000])
def test_a_file_that_cannot_be_read_is_one_message(path):
    with pytest.raises(UserError, match=r"name a YAML file of settings"):
        parsed("--config", path)


def test_settings_made_in_python_are_checked_before_anything_is_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^train.clip is nan; write a number from 0 to 1e\+09$"):
        train(Config(train=TrainConfig(clip=float("nan"))))
    assert not list(tmp_path.iterdir())


def test_help_names_every_group(capsys):
    with pytest.raises(SystemExit):
        parsed("--help")
    text = capsys.readouterr().out
    for words in ("--batch.strategy", "--train.zero_stage", "--print_config", "monolingual batches"):
        assert words in text


def test_a_deepspeed_file_is_merged_and_conflicts_are_named():
    merged = deepspeed_config(
        1.0, 2, {"zero_optimization": {"stage": 2, "reduce_bucket_size": 5}, "wall_clock_breakdown": True}
    )
    assert merged["zero_optimization"]["reduce_bucket_size"] == 5
    assert merged["gradient_clipping"] == 1.0
    assert merged["wall_clock_breakdown"]
    with pytest.raises(ValueError, match=r"'optimizer' is decided by hbt_fast; set train.learning_rate"):
        deepspeed_config(1.0, 2, {"optimizer": {"type": "Adam"}})
    with pytest.raises(ValueError, match=r"stage 3.*zero_stage says 2"):
        deepspeed_config(1.0, 2, {"zero_optimization": {"stage": 3}})


def test_more_ranks_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SettingError, match=r"more ranks were started here than there are GPUs \(1\)"):
        start(TrainConfig())


@pytest.mark.parametrize(("hardware", "autocast"), [(True, torch.bfloat16), (False, None)])
def test_auto_precision_is_bf16_on_gpus_that_compute_in_it(monkeypatch, hardware, autocast):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.set_device", lambda device: None)
    monkeypatch.setattr(
        "torch.cuda.is_bf16_supported", lambda including_emulation=True: hardware or including_emulation
    )
    for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert start(TrainConfig()).autocast == autocast
