"""Runs that are told to stop, or of which a rank dies, go on to the bits of the run that nothing stopped."""

import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

STEPS = 100
PROGRAM = [sys.executable, "-m", "hbt_fast.train"]
SMALL = [
    "data.sources=[{format: cldr, name: cldr, limit: 200}]", "data.languages=[en, de]", "data.store_dir=stores",
    "batch.size=16", "model.scratch={vocabulary: 400, hidden: 32, layers: 1, heads: 2}", "model.dropout=0.1",
    "train.learning_rate=0.001", f"train.steps={STEPS}", "train.checkpoint_every=20", "train.log_every=1",
    "train.engine=torch", "train.micro_batch_tokens=256",
]  # fmt: skip


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def begin(
    folder: Path,
    run: str,
    ranks: int,
    *more: str,
    only: int | None = None,
    port: str | None = None,
    program: list[str] = PROGRAM,
) -> list[subprocess.Popen]:
    """The program on so many ranks (or only one of them), each a process that the test can signal."""
    port = port or free_port()
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    if ranks > 1:
        environment["WORLD_SIZE"] = str(ranks)
    own = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {} for rank in range(ranks)]
    own = own if only is None else [own[only]]
    command = [*program, *SMALL, f"train.run_dir={run}", *more]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": folder}
    return [subprocess.Popen(command, env={**environment, **mine}, **pipes) for mine in own]


def wait_for_step(process: subprocess.Popen, step: int) -> None:
    for line in process.stdout:
        if (found := re.match(r"step +(\d+)/", line)) and int(found[1]) >= step:
            return
    pytest.fail(f"the run ended before step {step}: {process.stderr.read()[-2000:]}")


def finish(processes: list[subprocess.Popen], timeout: float = 300) -> list[tuple[int, str]]:
    """(exit status, what it said on stderr) of each."""
    end = time.monotonic() + timeout
    try:
        said = [process.communicate(timeout=max(end - time.monotonic(), 1))[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, text) for process, text in zip(processes, said, strict=True)]


def assert_same_end(folder: Path, run: str, whole: str) -> None:
    for name in ("model/model.safetensors", f"checkpoint-{STEPS:06d}/optimizer.safetensors"):
        a, b = (load_file(folder / which / name) for which in (run, whole))
        assert a.keys() == b.keys()
        assert [key for key in a if not torch.equal(a[key], b[key])] == []
    steps = [[line for line in (folder / which / "metrics.jsonl").open() if '"loss"' in line] for which in (run, whole)]
    assert len(steps[0]) == len(steps[1]) == STEPS


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the stores and a whole run of one rank."""
    folder = tmp_path_factory.mktemp("processes")
    assert [status for status, _ in finish(begin(folder, "one", 1))] == [0]
    return folder


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_keeps_the_running_step_and_the_resumed_run_ends_alike(folder, number, status):
    run = f"stopped-{status}"
    (process,) = begin(folder, run, 1)
    wait_for_step(process, 7)
    process.send_signal(number)
    ((ended, said),) = finish([process])
    assert ended == status, said[-2000:]
    done = int(re.search(rf"stopped by {number.name} after (\d+) steps; train.resume=true goes on", said)[1])
    assert 7 <= done < STEPS
    assert (folder / run / f"checkpoint-{done:06d}" / "state.json").is_file()
    assert not (folder / run / "model").exists()
    if number == signal.SIGINT:
        return  # resumes as the other does
    (process,) = begin(folder, run, 1, "train.resume=true")
    for line in process.stdout:
        if "resuming from" in line:
            assert f"{done} of {STEPS} steps are done" in line
            break
    assert finish([process])[0][0] == 0
    assert_same_end(folder, run, "one")


def test_two_ranks_of_which_one_is_stopped_or_killed_go_on_to_the_same_end(folder):
    whole = begin(folder, "two", 2)
    assert [status for status, _ in finish(whole)] == [0, 0]

    ranks = begin(folder, "hit", 2)
    wait_for_step(ranks[0], 5)
    ranks[1].send_signal(signal.SIGTERM)  # rank 1 alone
    ended = finish(ranks)
    assert [status for status, _ in ended] == [143, 143], ended
    done = {re.search(r"stopped by SIGTERM after (\d+) steps", said)[1] for _, said in ended}
    assert len(done) == 1

    ranks = begin(folder, "hit", 2, "train.resume=true")
    wait_for_step(ranks[0], int(done.pop()) + random.Random(1).randrange(25, 50))
    ranks[1].kill()
    began = time.monotonic()
    (status, said), _ = finish(ranks)
    assert time.monotonic() - began < 30
    assert status == 1
    assert "hbt_fast.train: another rank is gone" in said
    assert "train.resume=true goes on" in said
    assert "Traceback" not in said

    assert [status for status, _ in finish(begin(folder, "hit", 2, "train.resume=true"))] == [0, 0]
    assert_same_end(folder, "hit", "two")


WAITING = """
import time
from hbt_fast.engine.signals import StopSignals
with StopSignals() as signals:
    print("ready", flush=True)
    while True:
        time.sleep(0.02)
        if signals.number:
            print("noted", signals.number, flush=True)
            while True:
                time.sleep(0.02)
"""


def test_a_second_signal_stops_at_once_unless_a_launcher_only_passed_on_the_first():
    with subprocess.Popen([sys.executable, "-c", WAITING], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "noted 2\n"
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        assert process.poll() is None
        time.sleep(2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=5) == -signal.SIGTERM
