"""A run folder has one process that writes to it, what is no run is left alone, and kills and bad lines cost little."""

import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from hbt_fast.base.errors import FileError
from hbt_fast.config import Config, TrainConfig
from hbt_fast.engine import run_folder
from hbt_fast.engine.backends import SettingError
from hbt_fast.engine.launch import World
from hbt_fast.engine.metrics import read_metrics, read_records
from hbt_fast.engine.run_folder import RunFolder
from hbt_fast.engine.runlog import RunLog

HOLD = """
import sys
from pathlib import Path
from hbt_fast.engine.run_folder import RunFolder
held = RunFolder(Path(sys.argv[1]), False)
held.take()
print("held", flush=True)
sys.stdin.readline()
"""


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("resume", [False, True])
def test_a_second_run_in_a_live_folder_is_refused_and_touches_nothing(tmp_path, resume):
    run = tmp_path / "run"
    command = [sys.executable, "-c", HOLD, str(run)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as live:
        assert live.stdout.readline() == "held\n"
        (run / "metrics.jsonl").write_text("{}\n")
        before = names(tmp_path)
        with pytest.raises(
            SettingError, match=rf"train.run_dir is .*run, in which process {live.pid} on .* trains now"
        ):
            RunFolder(run, resume)
        assert names(tmp_path) == before
        live.kill()
    taken = RunFolder(run, resume)  # a killed process holds nothing
    assert (taken.take() is None) == resume
    taken.release()
    assert not [name for name in names(tmp_path) if name.endswith(".lock")]


def test_a_folder_that_is_no_run_is_never_renamed(tmp_path, monkeypatch):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "config.yaml").touch()
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path / "thesis")
    for path, message in (
        (tmp_path / "thesis", "which this program runs in"),
        (tmp_path, "which this program runs in"),
        (tmp_path / "file", "which is a file"),
    ):
        with pytest.raises(SettingError, match=message):
            RunFolder(path, False)
    monkeypatch.chdir(tmp_path)
    for resume in (False, True):
        with pytest.raises(SettingError, match=r"holds config.yaml and is no folder of a run; write another"):
            RunFolder(tmp_path / "thesis", resume)
    assert names(tmp_path) == ["file", "thesis", "thesis/config.yaml"]


def test_an_earlier_run_stays_in_place_until_the_new_one_begins(tmp_path):
    (tmp_path / "run" / "checkpoint-000003").mkdir(parents=True)
    folder = RunFolder(tmp_path / "run", False)
    assert (tmp_path / "run" / "checkpoint-000003").is_dir()
    assert folder.take() == tmp_path / "run-1"
    assert (tmp_path / "run-1" / "checkpoint-000003").is_dir()
    assert names(tmp_path / "run") == []
    folder.release()


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    wanted = r"file/run could not be written: .*/file is a file, and a .* move it away, or write another train.run_dir"
    with pytest.raises(FileError, match=wanted):
        RunFolder(tmp_path / "file" / "run", False)


def test_the_lock_is_not_that_of_a_process_that_has_just_left(tmp_path, monkeypatch):
    """Between opening the lock and locking it, who had it may remove it: another process would then take a new one."""
    real, left = run_folder.fcntl.flock, []

    def flock(handle, how):
        if not left:
            left.append(os.unlink(tmp_path / ".run.lock"))
        real(handle, how)

    monkeypatch.setattr(run_folder.fcntl, "flock", flock)
    folder = RunFolder(tmp_path / "run", False)
    monkeypatch.undo()
    with pytest.raises(SettingError, match="trains now"):
        RunFolder(tmp_path / "run", False)
    folder.release()


def test_a_run_that_goes_on_replaces_its_metrics_as_a_whole(tmp_path, monkeypatch):
    path, config = tmp_path / "metrics.jsonl", Config(train=TrainConfig(run_dir=str(tmp_path), resume=True))
    lines = [json.dumps({"step": step, "kind": "mono", "loss": 1.0}) for step in range(20)]
    path.write_text(
        "\n".join([*lines[:5], "x" * 40, '{"drawn_until": 7, "pairs": {}}', *lines[5:], '{"step": 20, "lo'])
    )
    whole = path.read_bytes()
    with RunLog(tmp_path, config, World(0, 1, torch.device("cpu"))) as log:

        def killed(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr("hbt_fast.base.files.sync", killed)
        with pytest.raises(KeyboardInterrupt):
            log._drop_records_from(12)
        assert path.read_bytes() == whole
        monkeypatch.undo()
        assert log._drop_records_from(12)["drawn_until"] == 7
    assert [record["step"] for record in read_records(path) if "step" in record] == list(range(12))


def test_a_line_that_cannot_be_read_costs_that_line(tmp_path):
    good = {"kind": "mono", "loss": 1.0, "accuracy": 0.5, "seconds": 1, "waited": 0, "tokens": 3}
    lines = [json.dumps({"step": step, **good}) for step in range(4)]
    more = ('{"loss": []}', '{"loss": ' + "9" * 400 + "}", '{"phases": 3}', '{"phases": {"data": "x"}}')
    damaged = [json.dumps({"step": 9, **good} | json.loads(part)) for part in more]
    damaged += ['{"step": 9, "loss": 1}', '{"step": 9.5, "kind": "mono"}', '{"step": "9", "kind": "mono"}']
    damaged += [
        "[" * 100_000,
        "3",
        '{"step": 9, "loss": "x", "kind": "mono"}',
        '{"loss": 1}',
        "\x00\x00",
        lines[2][:20],
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join([lines[0], *damaged, *lines[1:]]))
    steps = read_metrics(tmp_path / "metrics.jsonl").steps
    assert steps.step.tolist() == [0, 1, 2, 3]
    assert steps["loss"].tolist() == [1.0] * 4


def test_what_steps_lack_is_nan_and_no_time_and_the_order_of_lines_is_kept(tmp_path):
    lines = [
        {"step": 5, "kind": "mono", "loss": 1.0},
        {"step": 6, "kind": "cross", "loss": 2.0, "tokens": 7, "phases": {"embed": 0.5}},
        {"step": 7, "kind": "mono", "skipped": "NaN"},
        {"step": 8, "kind": "mono", "loss": 3.0, "phases": {"data": 0.25}},
        {"ended_early": "first", "after": 9},
        {"ended_early": "second", "after": 9},
        {"step": 2, "kind": "mono", "loss": 4.0, "phases": {"embed": 1.0, "data": 2.0}},
        {"drawn_until": 5},
        {"drawn_until": 9},
        {"evaluation": "during training", "step": 20},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = read_metrics(tmp_path / "metrics.jsonl")
    steps = found.steps
    assert (len(steps), steps.step.tolist(), steps.kinds) == (4, [5, 6, 8, 2], ["mono", "cross"])
    assert steps.of_kind("mono").tolist() == [True, False, True, True]
    np.testing.assert_array_equal(steps["tokens"], np.array([np.nan, 7, np.nan, np.nan], np.float32))
    assert {name: spent.tolist() for name, spent in steps.phases.items()} == {
        "embed": [0, 0.5, 0, 1],
        "data": [0, 0, 0.25, 2],
    }
    assert (found.done, found.skipped, found.evaluations) == (9, [lines[2]], [lines[-1]])
    assert (found.ended_early["ended_early"], found.drawn) == ("first", {"drawn_until": 9})


def test_many_steps_take_little_memory(tmp_path):
    phases = {"data": 0.1, "embed": 0.2, "loss": 0.1, "re-embed": 0.3, "optimizer": 0.1}
    one = {"kind": "mono", "loss": 1.0, "accuracy": 0.5, "seconds": 1.0, "waited": 0.1, "tokens": 99, "phases": phases}
    with open(tmp_path / "metrics.jsonl", "w") as file:
        for step in range(20_000):
            file.write(json.dumps({"step": step, **one}) + "\n")
            if step % 10 == 9:
                file.write(json.dumps({"drawn_until": step + 1, "pairs": {f"x{n}>y": n for n in range(50)}}) + "\n")
    tracemalloc.start()
    found = read_metrics(tmp_path / "metrics.jsonl")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.drawn["drawn_until"] == found.done == len(found.steps) == 20_000
    assert peak / 20_000 < 150  # bytes per step; with a dictionary each it is over 1,000


@pytest.mark.parametrize("mark", ["metrics.jsonl", "evaluation-before.json", "checkpoint-000003", "checkpoint-1000000"])
def test_each_of_what_a_run_leaves_first_makes_a_folder_a_run(tmp_path, mark):
    (tmp_path / "run").mkdir()
    for name in (mark, "config.yaml"):
        (tmp_path / "run" / name).touch()
    folder = RunFolder(tmp_path / "run", False)
    assert folder.take() == tmp_path / "run-1"
    folder.release()
    assert names(tmp_path / "run-1") == sorted([mark, "config.yaml"])


@pytest.mark.parametrize("name", ["metrics.jsonl.bak", "old-metrics.jsonl", "checkpoint-best", "checkpoint-3-old"])
def test_names_like_those_of_a_run_make_no_run(tmp_path, name):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).touch()
    with pytest.raises(SettingError, match=f"holds {name} and is no folder of a run"):
        RunFolder(tmp_path / "run", False)
    assert names(tmp_path) == ["run", f"run/{name}"]


def test_the_folder_that_the_program_runs_in_is_known_by_any_name(tmp_path, monkeypatch):
    (tmp_path / "here" / "below").mkdir(parents=True)
    (tmp_path / "here" / "metrics.jsonl").touch()
    (tmp_path / "link").symlink_to("here")
    monkeypatch.chdir(tmp_path / "here" / "below")
    for path in (".", "..", "../../link", "../below"):
        with pytest.raises(SettingError, match="which this program runs in"):
            RunFolder(Path(path), False)


def test_an_empty_folder_is_taken_as_it_is_and_no_earlier_run_is_written_over(tmp_path):
    (tmp_path / "run").mkdir()
    for aside in (None, tmp_path / "run-1", tmp_path / "run-3"):
        if aside == tmp_path / "run-3":
            (tmp_path / "run-2").touch()
        folder = RunFolder(tmp_path / "run", False)
        assert folder.take() == aside
        folder.release()
        (tmp_path / "run" / "metrics.jsonl").touch()


def test_who_trains_is_said_whatever_an_earlier_process_left_in_the_lock(tmp_path):
    lock = tmp_path / ".run.lock"
    lock.write_text("x" * 500)
    folder = RunFolder(tmp_path / "run", False)
    assert json.loads(lock.read_text())["process"] == os.getpid()
    for content, who in (
        (lock.read_text(), f"process {os.getpid()} on"),
        ('{"proc', "another process"),
        ("[]", "another"),
    ):
        lock.write_text(content)
        with pytest.raises(SettingError, match=f"in which {who}.* trains now"):
            RunFolder(tmp_path / "run", False)
    folder.release()
