"""The command line: YAML, overrides in both spellings, and errors that name the nearest right setting."""

import pytest
import torch

from hbt_fast.base.errors import UserError
from hbt_fast.config import TrainConfig, dump, parse
from hbt_fast.engine.backends import SettingError, deepspeed_config
from hbt_fast.engine.launch import start


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
        ("data.sources=[{pth: x}]", "did you mean path"),
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
