"""Gradients are reduced once per step, however many micro-batches it has: collective calls are counted."""

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from test_zero_equals_plain_adamw import make_stepper, settings

from hbt_fast.data.store import SourceStore, Store
from hbt_fast.engine.launch import start
from hbt_fast.train import make_feed, make_planner

ENGINES = {"torch": {"engine": "torch"}, **{f"zero-{n}": {"engine": "deepspeed", "zero_stage": n} for n in range(4)}}
BUDGETS = (10_000, 60)  # one micro-batch, many


def calls(engine: str, budget: int, store: Store) -> dict:
    """Collective calls of one step, the second, by kind; and how many micro-batches it had."""
    config = settings(micro_batch_tokens=budget, **ENGINES[engine])
    world = start(config.train)
    stepper = make_stepper(config, world, "none")
    with make_feed(make_planner(store, config), store, config, world, budget=budget) as feed:
        stepper(next(feed), 1e-3)
        batch = next(feed)
        with torch.autograd.profiler.profile() as profile:
            stepper(batch, 1e-3)
    names = Counter(event.name for event in profile.function_events if event.name.startswith("gloo:"))
    return {"micro-batches": len(batch.micro_batches), **names}


def worker(rank: int, world: int, folders: list[str], out: str, engines: list[str]) -> None:
    store = Store(tuple(map(SourceStore.open, folders)), (None,) * len(folders))
    counted = {engine: [calls(engine, budget, store) for budget in BUDGETS] for engine in engines}
    if rank == 0:
        (Path(out) / "calls.json").write_text(json.dumps(counted))


@pytest.fixture(scope="module")
def counted(store, tmp_path_factory):
    out = tmp_path_factory.mktemp("calls")
    engines = list(ENGINES) if shutil.which("c++") else ["torch"]
    run_ranks(worker, 2, [str(source.folder) for source in store.sources], str(out), engines)
    return json.loads((out / "calls.json").read_text())


@pytest.mark.parametrize("engine", ENGINES)
def test_many_micro_batches_make_no_more_reductions_than_one(counted, engine):
    if engine not in counted:
        pytest.skip("DeepSpeed compiles its CPU communication at first use, and there is no C++ compiler")
    one, many = counted[engine]
    assert one.pop("micro-batches") == 1
    assert many.pop("micro-batches") >= 5
    assert sum(one.values()) > 3, "collectives were seen"
    if engine == "zero-3":  # its forward passes fetch parameters
        one, many = ({k: n for k, n in made.items() if "reduce" in k} for made in (one, many))
    assert many == one
