"""Machines that share neither disk nor launcher train together as the ranks of one launcher do.

A machine is a folder with a launcher of its own, and a network of its own where the system permits that.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_faults_of_processes import SMALL, begin, finish, free_port, wait_for_step

REPOSITORY = Path(__file__).resolve().parents[1]
STEPS = 30
FEW = [*SMALL, f"train.steps={STEPS}", "train.checkpoint_every=10", "train.run_dir=run"]
ADDRESSES = ["10.231.7.1", "10.231.7.2"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run of two ranks that were started directly."""
    folder = tmp_path_factory.mktemp("whole")
    assert [status for status, _ in finish(begin(folder, "run", 2, *FEW))] == [0, 0]
    return folder


@pytest.fixture
def machines(tmp_path):
    """The folders of two machines."""
    folders = [tmp_path / "0", tmp_path / "1"]
    for folder in folders:
        folder.mkdir()
    return folders


@pytest.fixture
def networks():
    """Per machine, how to start a command in a network of its own, and the name of the interface there."""
    names = [f"hbt{os.getpid()}{end}" for end in "ab"]

    def ip(*words: str) -> int:
        return subprocess.run(["ip", *words], capture_output=True).returncode

    if shutil.which("ip") is None or any(ip("netns", "add", name) for name in names):
        pytest.skip("only root may make networks")
    try:
        made = ip(
            "link", "add", names[0], "netns", names[0], "type", "veth", "peer", "name", names[1], "netns", names[1]
        )
        for name, address in zip(names, ADDRESSES, strict=True):
            made += ip("-n", name, "addr", "add", f"{address}/24", "dev", name)
            made += ip("-n", name, "link", "set", name, "up") + ip("-n", name, "link", "set", "lo", "up")
        assert made == 0
        yield [["ip", "netns", "exec", name] for name in names], [{"GLOO_SOCKET_IFNAME": name} for name in names]
    finally:
        for name in names:
            ip("netns", "del", name)


def launch(folder: Path, command: list[str], **variables: str) -> subprocess.Popen:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(REPOSITORY),
        **variables,
    }
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": folder}
    return subprocess.Popen(command, env=environment, **pipes)


def torchrun(
    folders: list[Path], *more: str, address: str = "127.0.0.1", inside=([], []), variables=({}, {})
) -> list[subprocess.Popen]:
    """The launchers of two machines with one rank each."""
    port = free_port()
    started = []
    for number, folder in enumerate(folders):
        command = [
            *inside[number], sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node_rank", str(number),
            "--nproc_per_node", "1", "--master_addr", address, "--master_port", port,
            str(REPOSITORY / "hbt_fast" / "train.py"), *FEW, *more,
        ]  # fmt: skip
        started.append(launch(folder, command, **variables[number]))
    return started


def assert_same_weights(folder: Path, whole: Path) -> None:
    for name in ("model/model.safetensors", f"checkpoint-{STEPS:06d}/optimizer.safetensors"):
        a, b = (load_file(which / "run" / name) for which in (folder, whole))
        assert a.keys() == b.keys()
        assert [key for key in a if not torch.equal(a[key], b[key])] == []


def test_a_signal_to_one_launcher_is_a_checkpoint_and_all_go_on_to_the_end_of_one_machine(machines, whole):
    launchers = torchrun(machines)
    wait_for_step(launchers[0], 4)
    launchers[1].send_signal(signal.SIGTERM)
    ended = finish(launchers)
    assert all(status for status, _ in ended), ended
    done = {re.search(r"stopped by SIGTERM after (\d+) steps; train.resume=true", said)[1] for _, said in ended}
    (newest,) = done
    assert 4 <= int(newest) < STEPS
    assert (machines[0] / "run" / f"checkpoint-{int(newest):06d}" / "state.json").is_file()
    assert not (machines[1] / "run").exists()
    assert (machines[1] / "stores").is_dir()  # made there: the disk is another

    swapped = finish(torchrun(machines[::-1], "train.resume=true"))
    assert all(status for status, _ in swapped), swapped
    assert f"has checkpoint-{int(newest):06d} in run, rank 0's has none" in swapped[0][1]
    assert "Start rank 0 on the machine that wrote it" in swapped[0][1]

    again = torchrun(machines, "train.resume=true")
    assert [status for status, _ in finish(again)] == [0, 0]
    assert_same_weights(machines[0], whole)


def test_machines_with_networks_of_their_own_end_like_one_machine(machines, whole, networks):
    inside, variables = networks
    launchers = torchrun(machines, address=ADDRESSES[0], inside=inside, variables=variables)
    assert [status for status, _ in finish(launchers)] == [0, 0]
    assert_same_weights(machines[0], whole)


@pytest.mark.skipif(shutil.which("c++") is None, reason="DeepSpeed compiles its CPU communication at first use")
def test_the_deepspeed_launcher_with_a_hostfile_on_every_machine(machines, whole):
    port, program = free_port(), str(REPOSITORY / "hbt_fast" / "train.py")
    launchers = []
    for number, folder in enumerate(machines):
        (folder / "hostfile").write_text("first slots=1\nsecond slots=1\n")
        command = [
            str(Path(sys.executable).with_name("deepspeed")), "--hostfile", "hostfile", "--no_ssh",
            "--node_rank", str(number), "--master_addr", "127.0.0.1", "--master_port", port,
            program, *FEW, "train.engine=deepspeed", "train.zero_stage=1",
        ]  # fmt: skip
        launchers.append(launch(folder, command))
    ended = finish(launchers, timeout=300)
    assert [status for status, _ in ended] == [0, 0], ended
    runs = [[json.loads(line) for line in (which / "run" / "metrics.jsonl").open()] for which in (machines[0], whole)]
    ours, theirs = ([record["loss"] for record in run if "loss" in record] for run in runs)
    assert ours == pytest.approx(theirs, rel=1e-3)
    assert len(ours) == STEPS


def test_a_machine_with_other_settings_is_named_before_anything_is_trained(machines):
    port = free_port()
    begun = [
        begin(folder, "run", 2, *FEW, f"train.learning_rate={rate}", only=number, port=port)[0]
        for number, (folder, rate) in enumerate(zip(machines, (0.01, 0.02), strict=True))
    ]
    (first, said), (second, also) = finish(begun)
    assert (first, second) == (2, 2)
    assert "the ranks are not alike; the message of another rank says in what" in said
    assert "rank 1 is not like rank 0: train.learning_rate is 0.01 on rank 0, 0.02 here" in also
