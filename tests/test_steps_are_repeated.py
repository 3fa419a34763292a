"""Where memory runs out, on one rank of several, or fp16 overflows, the step is repeated; the result is the same."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from test_zero_equals_plain_adamw import make_stepper, settings, tiny_towers, update_error

from hbt_fast.data.store import SourceStore, Store
from hbt_fast.engine.backends import SettingError
from hbt_fast.engine.launch import World, start
from hbt_fast.engine.memory import out_of_memory
from hbt_fast.engine.metrics import read_records
from hbt_fast.train import make_feed, make_planner

STEPS = 4
ALONE = World(0, 1, torch.device("cpu"))
ENGINES = {"torch": {"engine": "torch"}, **{f"zero-{n}": {"engine": "deepspeed", "zero_stage": n} for n in (0, 2, 3)}}
CLOSE = 3e-4  # see test_zero_equals_plain_adamw


def steps(config, store, world, *, shortage=None, scale=None, autocast=None, keep="none"):
    """Train; `shortage` says whether memory runs out in this forward pass of this rank, the so many-eth of the attempt.

    Returns the parameters, and what was said.
    """
    said, towers = [], tiny_towers(config)
    for encoder in towers.encoders:
        encoder.autocast = autocast
    stepper = make_stepper(config, world, keep, towers)
    stepper.say = said.append
    if scale:
        stepper.scale.value = scale
    now = {"step": 0, "attempt": 0, "forward": 0, "graphs": 0}
    whole = stepper._attempt

    def attempt(batch):
        now.update(
            attempt=now["attempt"] + 1 if batch.plan.step == now["step"] else 0,
            step=batch.plan.step,
            forward=-1,
            graphs=0,
        )
        return whole(batch)

    def forward(*_):
        now["forward"] += 1
        now["graphs"] += torch.is_grad_enabled()
        if shortage and shortage(**now):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    stepper._attempt = attempt
    towers.queries.model.embeddings.register_forward_pre_hook(forward)
    now["attempt"] = -1
    with make_feed(make_planner(store, config), store, config, world, budget=stepper.tokens) as feed:
        for step, batch in zip(range(STEPS), feed, strict=False):
            assert stepper(batch, 1e-2 * (1 - step / 10)).trouble is None
    return stepper.engine.state()[0], said, stepper


def in_the_first_pass(step, attempt, forward, graphs):
    return step == 1 and attempt == 0 and forward == 1


def at_the_first_gradient(step, attempt, forward, graphs):
    return step == 1 and attempt == 0 and graphs == 1


def later_and_again(step, attempt, forward, graphs):
    return step in (1, 2) and attempt == 0 and graphs == 2


SHORTAGES = {f.__name__: f for f in (in_the_first_pass, at_the_first_gradient, later_and_again)}


@pytest.mark.parametrize("shortage", SHORTAGES)
def test_a_step_that_ran_out_of_memory_is_repeated_and_none_is_lost(store, shortage):
    whole, silent, _ = steps(settings(), store, ALONE)
    result, said, stepper = steps(settings(), store, ALONE, shortage=SHORTAGES[shortage])
    assert silent == []
    halvings = 2 if shortage == "later_and_again" else 1
    assert stepper.tokens == 120 // 2**halvings == stepper.state()["micro_batch_tokens"]
    assert len(said) == halvings
    assert "step 1: memory ran out; the step is repeated with micro-batches of 60 tokens" in said[0]
    assert update_error(result, whole, tiny_towers(settings()).state_dict()) < CLOSE


def test_without_end_it_is_an_error_that_says_what_to_lower(store):
    with pytest.raises(SettingError, match=r"memory runs out with micro-batches of 30 tokens. Lower batch.size"):
        steps(settings(), store, ALONE, shortage=lambda **now: True)


def test_onednn_that_found_no_room_is_not_asked_again(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", True)
    assert not out_of_memory(RuntimeError("shapes do not match"))
    assert torch.backends.mkldnn.enabled
    assert out_of_memory(RuntimeError("could not create a primitive"))
    assert not torch._C._get_mkldnn_enabled()


def worker(rank: int, world: int, folders: list[str], out: str, engines: list[str]) -> None:
    store = Store(tuple(map(SourceStore.open, folders)), (None,) * len(folders))
    for engine in engines:
        config = settings(**ENGINES[engine])
        here = start(config.train)
        states = {"whole": steps(config, store, here)[0]}
        if engine != "zero-3":
            for name, shortage in SHORTAGES.items():
                states[name], said, stepper = steps(config, store, here, shortage=shortage if rank == 1 else None)
                assert stepper.tokens < 120, "this rank is told of the other's"
                assert len(said) == (2 if name == "later_and_again" else 1)
        states["fp16"], *_ = steps(config, store, here, autocast=torch.float16)
        here16 = World(here.rank, here.size, here.device, torch.float16)
        states["fp16 scaled"], said, stepper = steps(config, store, here16, autocast=torch.float16, scale=2.0**40)
        assert said[0].startswith("step 0: fp16 overflowed (the gradient's norm is ")
        assert 1 < stepper.scale.value < 2.0**40
        if rank == 0:
            for name, state in states.items():
                save_file(state, Path(out) / f"{engine} {name}")


@pytest.fixture(scope="module")
def two_ranks(store, tmp_path_factory):
    out = tmp_path_factory.mktemp("repeated")
    engines = list(ENGINES) if shutil.which("c++") else ["torch"]
    run_ranks(worker, 2, [str(source.folder) for source in store.sources], str(out), engines)
    return out


@pytest.mark.parametrize("engine", ENGINES)
def test_one_rank_of_two_that_runs_short_has_both_repeat_the_step(two_ranks, engine):
    if not (two_ranks / f"{engine} whole").exists():
        pytest.skip("DeepSpeed compiles its CPU communication at first use, and there is no C++ compiler")
    whole, begin = load_file(two_ranks / f"{engine} whole"), tiny_towers(settings()).state_dict()
    for name in SHORTAGES if engine != "zero-3" else ():
        assert update_error(load_file(two_ranks / f"{engine} {name}"), whole, begin) < CLOSE
    # fp16 rounds coarsely, and Adam is free with the rounding: scaled, it is as near to float32 as unscaled where that
    # does not underflow
    unscaled, scaled = (load_file(two_ranks / f"{engine} {name}") for name in ("fp16", "fp16 scaled"))
    assert update_error(scaled, whole, begin) < 0.1
    assert update_error(unscaled, whole, begin) < 0.1


def test_the_scale_of_fp16_saves_gradients_that_would_underflow(store):
    from hbt_fast.engine.tuning import LossScale

    layer = torch.nn.Linear(64, 64, bias=False)
    x, weights = torch.randn(8, 64), 1e-7 * torch.randn(8, 64)

    def gradient(scale: float, autocast: bool):
        layer.zero_grad()
        with torch.autocast("cpu", torch.float16, enabled=autocast):
            out = layer(x)
        (out.float() * weights * scale).sum().backward()
        return layer.weight.grad.clone()

    true, lost = gradient(1.0, False), gradient(1.0, True)
    scale = LossScale(layer)
    kept = gradient(scale.value, True)
    assert (lost - true).norm() > 0.1 * true.norm()
    assert (kept - true).norm() < 2e-3 * true.norm()


PROGRAM = """
import resource, sys, torch
torch.set_num_threads(1)
resource.setrlimit(resource.RLIMIT_AS, (2**44, -1))  # as ulimit -v does, before the program begins
from hbt_fast import train
from hbt_fast.engine.loop import train_steps

def limited(*arguments):
    size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + int(sys.argv[1]) * 2**20, -1))
    done = train_steps(*arguments)
    resource.setrlimit(resource.RLIMIT_AS, (2**44, -1))
    return done

# first a run without a limit: libraries and threads that cannot be had later would not be missed by a step alone
train.main([*sys.argv[2:], "train.run_dir=warm", "train.micro_batch_tokens=512", "train.steps=1"])
train.train_steps = limited
train.main(sys.argv[2:])
"""
RUNS = ["small", "short"]
SMALL = [
    "data.sources=[{format: cldr, name: cldr, limit: 800}]", "data.languages=[en, de]", "data.store_dir=stores",
    "batch.size=384", "model.scratch={vocabulary: 400, hidden: 256, layers: 4, heads: 2}", "model.dropout=0",
    "train.steps=3", "train.engine=torch", "train.keep_gib=0", "train.learning_rate=0.001",
]  # fmt: skip


def test_a_process_that_really_runs_out_of_memory_ends_where_one_with_small_micro_batches_does(tmp_path):
    def program(mebibytes: int, run: str, tokens: int):
        more = [f"train.run_dir={run}", f"train.micro_batch_tokens={tokens}"]
        command = [sys.executable, "-c", PROGRAM, str(mebibytes), *SMALL, *more]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout, load_file(tmp_path / run / "model" / "model.safetensors")

    _, small = program(20_000, RUNS[0], 512)
    said, result = program(400, RUNS[1], 32_768)
    assert "memory ran out; the step is repeated with micro-batches of 16384 tokens" in said
    losses = [[r["loss"] for r in read_records(tmp_path / run / "metrics.jsonl") if "loss" in r] for run in RUNS]
    assert len(losses[1]) == 3
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    worst = max(float((result[name] - small[name]).abs().max()) for name in small if not name.endswith("key.bias"))
    assert worst < 1e-3
