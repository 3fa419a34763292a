"""A checkpoint is whole or not there: full disks, kill -9 at any moment, what such a process leaves behind."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from hbt_fast.engine.checkpoint import CheckpointError, load_checkpoint, newest_checkpoint, save_checkpoint

MEGABYTE = 2**20


def save(run: Path, step: int, size: int = 1000, keep: int = 2, **options) -> Path:
    tensors = {"weight": torch.full((size,), float(step)), "bias": torch.arange(7.0)}
    return save_checkpoint(run, step, tensors, {"weight.exp_avg": tensors["weight"] / 2}, {"seed": 1}, keep, **options)


def whole_step(run: Path) -> int:
    """The step of the newest checkpoint, which loads and holds what was saved."""
    step, parameters, moments, *_ = load_checkpoint(newest_checkpoint(run), {"seed": 1})
    assert (parameters["weight"] == step).all()
    assert (moments["weight.exp_avg"] == step / 2).all()
    return step


def names(run: Path) -> list[str]:
    return sorted(path.name for path in run.iterdir())


@pytest.fixture
def small_disk(tmp_path):
    """A file system of one megabyte."""
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path], capture_output=True).returncode:
        pytest.skip("only root may mount a small disk")
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True)


@pytest.mark.parametrize("size", [MEGABYTE // 4, MEGABYTE // 8 - 2000])  # in the parameters, or in the moments
def test_a_full_disk_leaves_the_earlier_checkpoints_whole_and_says_what_to_do(small_disk, size):
    run = small_disk / "run"
    for step in (1, 2):
        save(run, step, 20_000)
    with pytest.raises(CheckpointError) as failed:
        save(run, 3, size)
    for words in ("checkpoint-000003 could not be written", "MiB free", "Make room", f"{run}/checkpoint-000002"):
        assert words in str(failed.value)
    assert names(run) == ["checkpoint-000001", "checkpoint-000002"]
    assert whole_step(run) == 2
    save(run, 3)
    assert whole_step(run) == 3


LIMITED = """
import resource, sys
from pathlib import Path
sys.path[:0] = [sys.argv[2]]
from test_faults_of_checkpoints import CheckpointError, save
run = Path(sys.argv[1])
save(run, 1)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    save(run, 2, 100_000)
except CheckpointError as error:
    print(error)
"""


def test_a_file_that_may_not_grow_is_an_error_and_not_half_a_checkpoint(tmp_path):
    command = [sys.executable, "-c", LIMITED, tmp_path / "run", Path(__file__).parent]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "checkpoint-000002 could not be written" in done.stdout
    assert names(tmp_path / "run") == ["checkpoint-000001"]
    assert whole_step(tmp_path / "run") == 1


FORKS = """
import os, sys, torch
from itertools import count
from pathlib import Path
sys.path[:0] = [sys.argv[2]]
from test_faults_of_checkpoints import newest_checkpoint, save, whole_step
torch.set_num_threads(1)
run = Path(sys.argv[1])
for _ in range(20):
    pid = os.fork()
    if not pid:
        first = whole_step(run) if newest_checkpoint(run) else 0
        for step in count(first + 1):
            save(run, step, keep=1)
            save(run, step, keep=1)  # in the place of one that is there
    print(pid, flush=True)
    sys.stdin.readline()
    print("killed", os.waitpid(pid, 0)[1], flush=True)
"""


def test_kill_9_at_any_moment_leaves_a_whole_checkpoint(tmp_path):
    draws, run, last = random.Random(0), tmp_path / "run", 0
    # one import of torch serves all twenty: each writer is a fork
    (tmp_path / "forks.py").write_text(FORKS)
    command = [sys.executable, tmp_path / "forks.py", run, Path(__file__).parent]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        for _ in range(20):
            pid = int(server.stdout.readline())
            time.sleep(draws.uniform(0.02, 0.2))
            os.kill(pid, 9)
            server.stdin.write("next\n")
            server.stdin.flush()
            reached = server.stdout.readline().split()
            if newest_checkpoint(run) is not None:
                now = whole_step(run)
                assert now >= last
                last = now
            assert reached == ["killed", "9"]
        server.stdin.close()
    assert last > 5
    save(run, last + 1)
    assert [name for name in names(run) if name.startswith(".")] == []


def test_a_checkpoint_moved_aside_by_a_killed_process_is_found(tmp_path):
    save(tmp_path, 5).rename(tmp_path / ".checkpoint-000005.replaced")
    (tmp_path / ".checkpoint-000005.partial").mkdir()
    assert whole_step(tmp_path) == 5


def test_what_a_killed_process_left_is_cleaned_up(tmp_path):
    (tmp_path / ".checkpoint-000007.partial").mkdir(parents=True)
    (tmp_path / ".checkpoint-000007.partial" / "model.safetensors").write_bytes(b"half")
    (tmp_path / "checkpoint-of-mine").mkdir()  # not ours
    save(tmp_path, 9)
    assert names(tmp_path) == ["checkpoint-000009", "checkpoint-of-mine"]


def test_the_checkpoint_just_written_stays_where_a_later_one_is_damaged(tmp_path):
    for step in (4, 8):
        save(tmp_path, step)
    (tmp_path / "checkpoint-000008" / "state.json").write_text("{")
    save(tmp_path, 6, keep=1)
    assert whole_step(tmp_path) == 6


def test_the_best_checkpoint_stays_beside_the_newest(tmp_path):
    for step in range(1, 7):
        save(tmp_path, step, best=2)
    assert names(tmp_path) == ["checkpoint-000002", "checkpoint-000005", "checkpoint-000006"]
