"""Gradient caching under DeepSpeed ZeRO 0-3 on one and two ranks equals plain AdamW on the whole batch at once."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from safetensors.torch import load_file, save_file

from hbt_fast.config import BatchConfig, Config, LossConfig, ModelConfig, TrainConfig
from hbt_fast.data.store import SourceStore, Store
from hbt_fast.encoder.scratch import ScratchConfig, encoder_from_scratch
from hbt_fast.encoder.towers import Towers
from hbt_fast.engine.backends import DeepSpeedEngine
from hbt_fast.engine.checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint
from hbt_fast.engine.guard import DivergedError
from hbt_fast.engine.launch import World, make_engine, start
from hbt_fast.engine.step import Stepper
from hbt_fast.train import make_feed, make_planner

STEPS = 4
GRADIENT = 1e-5
# Adam divides by the root of second moments, tiny ones too, and makes 1e-4 (measured) of a rounding error of 1e-6.
# The recipes that are silently wrong are off by 1.5.
UPDATE = 3e-4


def settings(two_towers=False, **train) -> Config:
    """Of one encoder, or of two and a learned temperature."""
    options = {"learning_rate": 1e-2, "clip": 0.5, "micro_batch_tokens": 120, "engine": "torch", "precision": "fp32"}
    return Config(
        model=ModelConfig(separate_towers=two_towers),
        batch=BatchConfig(size=15, source_gamma=1.0),
        loss=LossConfig(learn_temperature=two_towers),
        train=TrainConfig(**{**options, **train}),
    )


def tiny_encoder(dropout=0.0):
    shape = ScratchConfig(300, 32, 2, 4)
    return encoder_from_scratch(_Tokenizer(), shape, max_length=32, dropout=dropout, seed=3)


class _Tokenizer:  # as much of one as a model's config needs
    pad_token_id, bos_token_id, eos_token_id = 1, 0, 2

    def __len__(self):
        return 300


def tiny_towers(config: Config, dropout=0.0):
    if not config.model.separate_towers:
        return Towers([tiny_encoder(dropout)])
    return Towers([tiny_encoder(dropout), tiny_encoder(dropout)], config.loss.temperature)


def make_stepper(config: Config, world: World, keep="some", towers=None) -> Stepper:
    """A stepper that keeps no graphs, those of every third micro-batch, or all."""
    stepper = Stepper(make_engine((towers or tiny_towers(config)).train(), config.train, world), config, world)
    kept = {"none": lambda k: False, "some": lambda k: k % 3 == 1, "all": lambda k: True}[keep]
    stepper.graphs.choose = lambda micro_batches: [kept(k) for k in range(len(micro_batches))]
    stepper.graphs.seen = [(1, 1, 1)]  # nothing is to be measured
    return stepper


def run(config: Config, store: Store, world: World, first: int = 0, last: int = STEPS, restored=None, keep="some"):
    """Train some steps; returns the engine's state (parameters, moments)."""
    towers = tiny_towers(config).to(world.device)
    for encoder in towers.encoders:
        encoder.autocast = world.autocast
    if restored:
        towers.load_trained(restored[0])
    stepper = make_stepper(config, world, keep, towers)
    if stepper.engine.zero_stage == 3:
        fill_padding(stepper.engine)
    if restored:
        stepper.engine.restore(restored[1], first)
    with make_feed(make_planner(store, config), store, config, world, first=first, budget=stepper.tokens) as feed:
        for step in range(first, last):
            assert stepper(next(feed), config.train.learning_rate * (1 - step / 10)).trouble is None
    return stepper.engine.state()


def fill_padding(engine: DeepSpeedEngine) -> None:
    """NaN at the ends of ZeRO-3's partitions, which belong to no weight and are whatever memory held before."""
    zero = engine.engine.optimizer
    for p in engine.module.parameters():
        begin = p.ds_tensor.ds_numel * dist.get_rank()
        p.ds_tensor.data[max(0, p.ds_numel - begin) :] = torch.nan
    for whole, kept in zip(zero.fp32_partitioned_groups_flat, zero.fp16_partitioned_groups_flat, strict=True):
        whole.data.copy_(kept)
    padded = any(p.ds_numel % 2 for p in engine.module.parameters()) and dist.get_rank() == 1
    assert any(flat.isnan().any() for flat in zero.fp32_partitioned_groups_flat) == padded


def reference(store: Store, config: Config) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The same steps in plain torch and float64: the whole batch in one graph, torch's own cross entropy."""
    towers = tiny_towers(config).train().double()
    decay = [p for p in towers.parameters() if p.ndim > 1], [p for p in towers.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay[0], "weight_decay": 0.01}, {"params": decay[1], "weight_decay": 0.0}]
    )
    planner = make_planner(store, config)
    for step in range(STEPS):
        plan = planner.plan(step)
        source = store.sources[plan.source]
        q, p = embed_all(towers.queries, source, plan.queries), embed_all(towers.passages, source, plan.passages)
        scale = 1 / config.loss.temperature if towers.log_scale is None else towers.log_scale.exp()
        loss = torch.nn.functional.cross_entropy(q @ p.T * scale, torch.arange(len(q)))
        loss.backward()
        if step == 0:
            first = {name: 0.1 * p.grad for name, p in towers.named_parameters()}  # what Adam's first moment becomes
        assert torch.nn.utils.clip_grad_norm_(towers.parameters(), config.train.clip) > config.train.clip
        for group in optimizer.param_groups:
            group["lr"] = config.train.learning_rate * (1 - step / 10)
        optimizer.step()
        optimizer.zero_grad()
    return towers.state_dict(), first


def embed_all(encoder, source, texts):
    tokens = [torch.from_numpy(source.text_tokens(t).copy()) for t in texts]
    cu_seqlens = torch.tensor([0, *map(len, tokens)]).cumsum(0)
    return encoder(torch.cat(tokens), cu_seqlens)


def gradient_error(moments, truth):
    """Relative error of the first step's gradient, which Adam's first moment holds if nothing clips it."""
    off = sum((moments[f"{n}.exp_avg"].double() - truth[n]).pow(2).sum() for n in truth)
    return float((off / sum(t.pow(2).sum() for t in truth.values())).sqrt())


def update_error(result, truth, start):
    """Relative error of the whole update of the parameters.

    Without the biases of attention keys: softmax does not see them, so that their gradient is zero but for rounding,
    and Adam makes full-sized steps of the rounding.
    """
    truth = {name: value for name, value in truth.items() if not name.endswith("key.bias")}
    off = sum((result[n].double() - truth[n]).pow(2).sum() for n in truth)
    size = sum((start[n].double() - truth[n]).pow(2).sum() for n in truth)
    return float((off / size).sqrt())


def worker(rank: int, world: int, folders: list[str], out: str, train: dict) -> None:
    """A whole run, and one that is stopped halfway, written to disk and resumed."""
    config, out = settings(**train), Path(out)
    store = Store(tuple(map(SourceStore.open, folders)), (None,) * len(folders))
    here = start(config.train)
    first = run(settings(**train, clip=1e9), store, here, 0, 1)  # clipping would hide a factor
    towers_first = run(settings(True, **train, clip=1e9), store, here, 0, 1)
    towers = run(settings(True, **train), store, here)
    whole = run(config, store, here)
    half = run(config, store, here, 0, STEPS // 2)
    if rank == 0:
        save_checkpoint(out, STEPS // 2, *half, {"test": 1}, keep=1)
    here.barrier()
    step, *restored, _ = load_checkpoint(newest_checkpoint(out), {"test": 1})
    resumed = run(config, store, here, step, STEPS, restored)
    with pytest.raises(DivergedError, match="step 0: its update made weights"):
        run(settings(**train, learning_rate=1e25), store, here, 0, 1)
    states = {"first": first, "whole": whole, "resumed": resumed, "towers first": towers_first, "towers": towers}
    if rank == 0:
        for name, (parameters, moments) in states.items():
            save_file(parameters, out / f"{name}.parameters")
            save_file(moments, out / f"{name}.moments")


RECIPES = sorted((Path(__file__).resolve().parents[1] / "configs" / "deepspeed").glob("*.json"))
ENGINES = {
    "torch": {"engine": "torch"},
    **{f"zero-{stage}": {"engine": "deepspeed", "zero_stage": stage} for stage in range(4)},
    **{path.name: {"engine": "deepspeed", "deepspeed": str(path), "zero_stage": int(path.name[4])} for path in RECIPES},
}


@pytest.fixture(scope="module", params=ENGINES)
def two_ranks(request, store, tmp_path_factory):
    """The folder that two ranks wrote under one engine."""
    out = tmp_path_factory.mktemp("two_ranks")
    engine = ENGINES[request.param]
    if request.param != "torch" and shutil.which("c++") is None:
        pytest.skip("DeepSpeed compiles its CPU communication at first use, and there is no C++ compiler")
    folders = [str(source.folder) for source in store.sources]
    run_ranks(worker, 2, folders, str(out), engine)
    return out


@pytest.fixture(scope="module")
def truth(store):
    return {two: reference(store, settings(two)) for two in (False, True)}


@pytest.fixture(scope="module")
def begin(store):
    return {two: tiny_towers(settings(two)).state_dict() for two in (False, True)}


def test_one_process_with_caching_equals_the_whole_batch_at_once(store, truth, begin):
    for keep in ("none", "some", "all"):
        _, first = run(settings(clip=1e9), store, World(0, 1, torch.device("cpu")), 0, 1, keep=keep)
        assert gradient_error(first, truth[False][1]) < GRADIENT
        result, _ = run(settings(), store, World(0, 1, torch.device("cpu")), keep=keep)
        assert update_error(result, truth[False][0], begin[False]) < UPDATE


def test_two_ranks_under_any_engine_equal_plain_adamw(two_ranks, truth, begin):
    for two, first, whole in ((False, "first", "whole"), (True, "towers first", "towers")):
        assert gradient_error(load_file(two_ranks / f"{first}.moments"), truth[two][1]) < GRADIENT
        assert update_error(load_file(two_ranks / f"{whole}.parameters"), truth[two][0], begin[two]) < UPDATE


def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(two_ranks):
    for part in ("parameters", "moments"):
        whole, resumed = load_file(two_ranks / f"whole.{part}"), load_file(two_ranks / f"resumed.{part}")
        assert whole.keys() == resumed.keys()
        assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_checkpoint_goes_on_at_another_world_size_and_engine(two_ranks, store, truth, begin):
    step, *restored, _ = load_checkpoint(newest_checkpoint(two_ranks), {"test": 1})
    result, _ = run(settings(), store, World(0, 1, torch.device("cpu")), step, STEPS, restored)
    assert update_error(result, truth[False][0], begin[False]) < UPDATE


def test_dropout_masks_are_replayed(store):
    def gradient(keep):
        config = settings(clip=0.0)
        world = World(0, 1, torch.device("cpu"))
        stepper = make_stepper(config, world, keep, tiny_towers(config, dropout=0.3))
        gradients = []
        stepper.engine.step = lambda: gradients.extend(p.grad for p in stepper.engine.module.parameters()) or 1.0
        with make_feed(make_planner(store, config), store, config, world, first=1, budget=stepper.tokens) as feed:
            result = stepper(next(feed), 1e-3)
        return result.loss, result.kept, torch.cat([gradient.flatten() for gradient in gradients])

    (loss, all_, whole), (same_loss, none, cached) = gradient("all"), gradient("none")
    assert (all_, none) == (1, 0)
    assert loss == same_loss
    assert torch.equal(whole, cached)


def test_every_loss_setting_trains(store):
    for loss in (
        LossConfig(symmetric=True),
        LossConfig(duplicates="positive"),
        LossConfig(false_negative_margin=0.1),
        LossConfig(variance_weight=30.0),
        LossConfig(matryoshka_dimensions=[16, 8]),
        LossConfig(temperature=0.01, backend="torch-chunked"),
    ):
        config = replace(settings(learning_rate=1e-3), loss=loss)
        parameters, _ = run(config, store, World(0, 1, torch.device("cpu")))
        assert all(p.isfinite().all() for p in parameters.values())
