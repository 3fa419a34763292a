"""What a GPU does otherwise than a CPU: its own arithmetic, its allocator's measures, running out of its memory.

Where there is none the first claim is tested on the CPU.
"""

import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from test_zero_equals_plain_adamw import reference, run, settings, tiny_towers, update_error

from hbt_fast.config import BatchConfig, Config, LossConfig, TrainConfig
from hbt_fast.data.store import SourceStore, Store
from hbt_fast.encoder.scratch import ScratchConfig, encoder_from_scratch
from hbt_fast.encoder.towers import Towers
from hbt_fast.engine.launch import World, make_engine, start
from hbt_fast.engine.memory import KeptGraphs
from hbt_fast.engine.step import Stepper
from hbt_fast.train import make_feed, make_planner

GPU = torch.cuda.is_available()
needs_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU")
ENGINES = {"torch": {"engine": "torch"}, **{f"zero-{n}": {"engine": "deepspeed", "zero_stage": n} for n in range(4)}}
CLOSE = {
    "fp32": 1e-3,
    "bf16": 0.3,
    "fp16": 0.1,
}  # of an update; Adam makes full-sized steps of small gradients' rounding


def train_all(rank: int, ranks: int, folders: list[str], out: str) -> None:
    store = Store(tuple(map(SourceStore.open, folders)), (None,) * len(folders))
    for engine, options in ENGINES.items():
        for precision in CLOSE:
            config = settings(**options, precision=precision)
            parameters, _ = run(config, store, start(config.train))
            save_file(parameters, f"{out}/{engine}-{precision}")


@pytest.fixture(scope="module")
def trained(store, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained")
    run_ranks(train_all, 1, [str(source.folder) for source in store.sources], str(out), gpu=True)
    return out


@pytest.mark.parametrize("engine", ENGINES)
def test_every_precision_under_every_engine_makes_the_update_of_float64(store, trained, engine):
    truth, _ = reference(store, settings())
    begin = tiny_towers(settings()).state_dict()
    for precision, most in CLOSE.items():
        assert update_error(load_file(trained / f"{engine}-{precision}"), truth, begin) < most, precision


def larger() -> Towers:
    class Tokenizer:
        pad_token_id, bos_token_id, eos_token_id = 1, 0, 2

        def __len__(self):
            return 300

    return Towers(
        [encoder_from_scratch(Tokenizer(), ScratchConfig(300, 512, 6, 8), max_length=32, dropout=0.0, seed=1)]
    )


def steps(store, count=4, *, fraction=None, **train):
    """Train a larger encoder; (parameters, shares that were kept, what was said)."""
    options = {"engine": "torch", "precision": "fp32", "learning_rate": 1e-3, **train}
    config = Config(batch=BatchConfig(size=48, source_gamma=1.0), loss=LossConfig(), train=TrainConfig(**options))
    world, said = World(0, 1, torch.device("cuda", 0)), []
    stepper = Stepper(make_engine(larger().to(world.device).train(), config.train, world), config, world, said.append)
    with make_feed(make_planner(store, config), store, config, world, budget=stepper.tokens) as feed:
        batches = [next(feed) for _ in range(count)]
    kept = [stepper(batches[0], 1e-3).kept]
    if fraction:
        torch.cuda.empty_cache()
        held = torch.cuda.memory_allocated() / torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(held + fraction)
    try:
        kept += [stepper(batch, 1e-3).kept for batch in batches[1:]]
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    return stepper.engine.state()[0], kept, said


@needs_gpu
def test_what_a_graph_takes_is_what_the_allocator_gives(store):
    towers = larger().cuda().train()
    graphs = KeptGraphs(towers, torch.device("cuda", 0))
    config = settings(micro_batch_tokens=500)
    with make_feed(
        make_planner(store, config), store, config, World(0, 1, torch.device("cuda", 0)), budget=500
    ) as feed:
        micro = next(feed).micro_batches[0]
    arrays = [torch.from_numpy(x).cuda() for x in (micro.tokens, micro.cu_seqlens)]
    towers(*arrays)[0].sum().backward()  # libraries take their workspaces
    before = torch.cuda.memory_allocated()
    with graphs.measured(micro):
        out, _ = towers(*arrays)
    true = torch.cuda.memory_allocated() - before
    assert out.requires_grad
    assert graphs.seen[0][2] == pytest.approx(true, rel=0.02)
    assert true > 2**20


@needs_gpu
def test_graphs_that_are_kept_change_nothing_but_the_order_of_sums(store):
    begin = dict(larger().named_parameters())
    none, shares, _ = steps(store, micro_batch_tokens=100, keep_gib=0)
    assert max(shares) < 1
    every, shares, _ = steps(store, micro_batch_tokens=100, keep_gib="auto")
    assert shares[1:] == [1.0] * 3
    assert update_error(every, none, begin) < 1e-3


@needs_gpu
def test_a_step_that_does_not_fit_the_gpu_is_repeated_with_smaller_micro_batches(store):
    begin = dict(larger().named_parameters())
    small, _, _ = steps(store, micro_batch_tokens=64, keep_gib=0)
    room = 96 * 2**20 / torch.cuda.get_device_properties(0).total_memory
    short, _, said = steps(store, micro_batch_tokens=1 << 14, keep_gib=0, fraction=room)
    assert any("memory ran out; the step is repeated" in line for line in said)
    assert update_error(short, small, begin) < 1e-2
