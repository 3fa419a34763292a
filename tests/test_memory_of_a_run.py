"""A run's memory is what `estimate` says, and a thousand steps take no more than the first hundred."""

import gc
import re
import subprocess
import sys

import pytest
import torch
from test_adaptive_caching import ALONE, CPU
from test_zero_equals_plain_adamw import settings, tiny_towers

from hbt_fast.engine.launch import make_engine
from hbt_fast.engine.memory import resident_bytes
from hbt_fast.engine.step import Stepper
from hbt_fast.train import make_feed, make_planner

TRAIN = """
import sys, torch
from hbt_fast import train
from hbt_fast.engine.memory import used_bytes
train.main(sys.argv[1:])
print("peak", used_bytes(torch.device("cpu")) / 2**30)
"""
RUN = [
    "data.sources=[{format: cldr, name: cldr, limit: 1000}]", "data.languages=[en, de]", "data.store_dir=stores",
    "model.scratch={vocabulary: 1000, hidden: 384, layers: 4, heads: 6}", "batch.size=128",
    "train.steps=2", "train.micro_batch_tokens=1024", "train.run_dir=run",
]  # fmt: skip


@pytest.mark.parametrize(
    "more",
    [
        ["train.keep_gib=0"],
        ["train.keep_gib=4", "train.zero_stage=1"],
        ["model.separate_towers=true", "model.gradient_checkpointing=true"],
    ],
)
def test_the_estimate_is_within_15_percent_of_the_peak(tmp_path, more):
    def said(*command: str) -> str:
        done = subprocess.run(
            [sys.executable, *command, *RUN, *more], cwd=tmp_path, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    estimated = said("-m", "hbt_fast.estimate")
    step, checkpoint = (float(x) for x in re.findall(r"([\d.]+) GiB  per rank", estimated))
    peak = float(re.search(r"peak ([\d.]+)", said("-c", TRAIN))[1])
    assert max(step, checkpoint) == pytest.approx(peak, rel=0.15)
    assert re.search(r"[\d.]+ s    per step: [\d,]+ pairs/s", estimated)


def test_a_thousand_steps_take_no_more_memory_than_a_hundred(store):
    def tensors() -> tuple[int, int]:
        gc.collect()
        found = [x for x in gc.get_objects() if type(x) is torch.Tensor or type(x) is torch.nn.Parameter]
        return len(found), sum(x.nbytes for x in found)

    config = settings(steps=10**6, micro_batch_tokens=10**4)
    stepper = Stepper(make_engine(tiny_towers(config, dropout=0.1).train(), config.train, ALONE), config, ALONE)
    with make_feed(make_planner(store, config), store, config, ALONE, budget=10**4) as feed:
        for step in range(1000):
            assert stepper(next(feed), 1e-3).trouble is None
            if step == 100:
                early, resident = tensors(), resident_bytes(CPU)
    assert tensors() == early
    assert resident_bytes(CPU) < resident + 16 * 2**20
