"""Memory and time of a training step, before training: what this machine needs, from measuring a few micro-batches.

python -m hbt_fast.estimate --config configs/hybrid-e5.yaml
python -m hbt_fast.estimate --config configs/hybrid-e5.yaml --world 8 train.zero_stage=2

The data is prepared and the model loaded as training does it; then some micro-batches of the run's own batches go
forward and backward on this machine. Everything else is arithmetic: who holds which copy of the parameters is known.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from hbt_fast.base.programs import as_process, program
from hbt_fast.config import Config, parse
from hbt_fast.data.feed import RankBatch, rank_batch, rows_of
from hbt_fast.encode import at_least_one
from hbt_fast.engine.backends import SettingError
from hbt_fast.engine.launch import World, leave, start, uses_deepspeed
from hbt_fast.engine.memory import GIB, KeptGraphs, fitted, resident_bytes
from hbt_fast.engine.step import FIRST_TOKENS
from hbt_fast.loss import explain, info_nce_with_grad
from hbt_fast.prepare import prepare, resolve
from hbt_fast.train import build, make_planner, make_rewrite

if TYPE_CHECKING:
    from hbt_fast.encoder.towers import Towers

BATCHES, MICRO_BATCHES = 8, 6  # that are looked at, that are measured
FLOAT = 4
BACKWARD = 0.5  # of a graph's bytes are taken besides while it is gone through


@dataclass
class Estimate:
    """What a step of one rank takes.

    Attributes:
        bytes: of a step by what holds them; they are all there at its peak.
        checkpoint_bytes: while a checkpoint is written.
        seconds: by phase.
        trained: parameters that are trained.
        parameters: all of them.
        micro_batches: per step.
        kept: share of them that is embedded once only.
        pairs: of the global batch.
        tokens: that a step reads on this rank.
    """

    bytes: dict[str, int] = field(default_factory=dict)
    checkpoint_bytes: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    trained: int = 0
    parameters: int = 0
    micro_batches: float = 0.0
    kept: float = 0.0
    pairs: int = 0
    tokens: float = 0.0

    @property
    def peak_bytes(self) -> int:
        """The most that a rank takes."""
        return max(sum(self.bytes.values()), self.checkpoint_bytes)

    def __str__(self) -> str:
        lines = [f"{self.parameters / 1e6:,.1f} M parameters, {self.trained / 1e6:,.1f} M of them trained"]
        lines += [f"a step: {self.pairs:,} pairs; on this rank {self.tokens:,.0f} tokens in {self.micro_batches:.1f} "
                  f"micro-batches, {self.kept:.0%} of which are embedded once only", ""]  # fmt: skip
        lines += [f"{size / GIB:9.2f} GiB  {name}" for name, size in self.bytes.items()]
        lines += [f"{sum(self.bytes.values()) / GIB:9.2f} GiB  per rank, at the peak of a step"]
        lines += [f"{self.checkpoint_bytes / GIB:9.2f} GiB  per rank, while a checkpoint is written", ""]
        lines += [f"{seconds:9.2f} s    {name}" for name, seconds in self.seconds.items()]
        total = sum(self.seconds.values())
        return "\n".join([*lines, f"{total:9.2f} s    per step: {self.pairs / total:,.0f} pairs/s"])


@program("hbt_fast.estimate")
def main(arguments: list[str] | None = None) -> None:
    """Estimate from the command line."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    own = argparse.ArgumentParser("hbt_fast.estimate", add_help=False, allow_abbrev=False, exit_on_error=False)
    own.add_argument("--world", type=at_least_one, default=1)
    try:
        options, arguments = own.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise SettingError(f"{error}; write the number of ranks, such as --world 8") from None
    world = options.world
    config, prompts = resolve(parse("hbt_fast.estimate", __doc__.splitlines()[0], arguments))
    print("\n".join(prompts.lines), flush=True)
    print(estimate(config, world))


def estimate(config: Config, world: int = 1) -> Estimate:
    """The memory and time of a step.

    Args:
        config: the settings of the run.
        world: number of ranks; this machine stands for each of them.
    """
    here = start(config.train)
    if uses_deepspeed(config.train):
        import deepspeed  # noqa: F401  it takes memory too
    config, _ = resolve(config)
    store, tokenizer = prepare(config)
    planner = make_planner(store, config)
    rewrite = make_rewrite(store, tokenizer, config, lambda line: None)
    towers = build(config, tokenizer, here.autocast).to(here.device).train()
    budget = config.train.micro_batch_tokens
    budget = FIRST_TOKENS[here.device.type] if budget == "auto" else budget
    batches = []
    for step in np.unique(np.linspace(0, config.train.steps - 1, BATCHES).astype(int)).tolist():
        plan = planner.plan(step)
        source = store.sources[plan.source]
        options = {"towers": len(towers.encoders), "rewrite": rewrite}
        batches.append(rank_batch(plan, source, rows_of(plan, source, 0, world), budget, **options))
    base = resident_bytes(here.device)
    found = Estimate(pairs=config.batch.size)
    found.tokens = float(np.mean([batch.tokens for batch in batches]))
    found.parameters = sum(p.numel() for p in towers.parameters())
    found.trained = sum(p.numel() for p in towers.parameters() if p.requires_grad)
    found.bytes["program and parameters, as loaded"] = base
    found.bytes |= _held(found, config, world)
    moments = found.bytes["AdamW's moments"]
    found.checkpoint_bytes = base + moments + 3 * FLOAT * found.trained  # whole copies of parameters and moments
    _activations(found, towers, batches, config, here, world)
    return found


def _held(found: Estimate, config: Config, world: int) -> dict[str, int]:
    """Bytes of gradients and the optimizer on one rank, and what ZeRO adds or takes away."""
    one, stage = FLOAT * found.trained, config.train.zero_stage if uses_deepspeed(config.train) else 0
    held = {"gradients": one, "AdamW's moments": 2 * one // (world if stage else 1)}
    if world > 1 and not stage:
        held["gradients, flat, on their way"] = one if uses_deepspeed(config.train) else 2 * one
    if stage in (1, 2):
        held["ZeRO: parameters and gradients of this rank's share, flat"] = one + 2 * one // world
    if stage == 3:
        held["ZeRO: this rank's share of the gradients"] = one // world
    return held


def _activations(
    found: Estimate, towers: Towers, batches: list[RankBatch], config: Config, here: World, world: int
) -> None:
    """Measure micro-batches; add what activations and the loss take, and the seconds of every phase."""
    limit = None if config.train.keep_gib == "auto" else int(config.train.keep_gib * GIB)
    graphs = KeptGraphs(towers, here.device, limit)
    every = [micro for batch in batches for micro in batch.micro_batches]
    every.sort(key=lambda micro: (micro.cost, micro.longest))
    chosen = [every[k] for k in np.unique(np.linspace(0, len(every) - 1, MICRO_BATCHES).astype(int))]
    shapes, without, both = [], [], []
    dimension = towers.queries.dimension
    for micro in [chosen[-1], *chosen]:  # the first is for warming up
        arrays = [torch.from_numpy(x).to(here.device) for x in (micro.tokens, micro.cu_seqlens)]
        with torch.no_grad():
            without.append(_seconds(lambda arrays=arrays, micro=micro: towers(*arrays, micro.tower), here))

        def forward_and_backward(arrays: list = arrays, micro: object = micro) -> None:
            with graphs.measured(micro):
                out, _ = towers(*arrays, micro.tower)
            out.sum().backward()

        both.append(_seconds(forward_and_backward, here))
        shapes.append((micro.cost, micro.longest))
    towers.zero_grad(set_to_none=True)
    seen = np.array(shapes[1:], float)
    first, second = (fitted(seen, np.array(times[1:])) for times in (without, both))

    largest = widest = kept_bytes = 0
    sums = dict.fromkeys(("embed", "loss", "re-embed", "optimizer"), 0.0)
    reserve = sum(found.bytes.values()) - found.bytes["program and parameters, as loaded"]
    for batch in batches:
        needs = graphs.expected(batch.micro_batches)
        if graphs.limit is None:
            graphs.limit = graphs.automatic(needs.max(), reserve)
        keep = np.array(graphs.choose(batch.micro_batches))
        shape = np.array([(micro.cost, micro.longest) for micro in batch.micro_batches], float)
        forward, whole = first(shape), second(shape)
        sums["embed"] += forward.sum()
        sums["re-embed"] += np.maximum(whole - forward * keep, 0).sum()  # of little, noise is more
        largest = max(largest, needs[0], needs[~keep].max(initial=0))  # the first is gone when others are made
        kept_bytes, widest = max(kept_bytes, needs[1:][keep[1:]].sum()), max(widest, needs.max())
        found.kept += keep.mean() / len(batches)
        found.micro_batches += len(keep) / len(batches)
    found.seconds = {name: seconds / len(batches) for name, seconds in sums.items()}

    rows = [len(batch.rows) for batch in batches]
    texts = max(len(batch.texts) for batch in batches)
    plan = explain(max(rows), world * (texts - max(rows)), symmetric=config.loss.symmetric, d=dimension)
    found.bytes["graphs that are kept"] = int(kept_bytes)
    found.bytes["a micro-batch on its way through, and backward"] = int(largest + BACKWARD * widest)
    found.bytes["embeddings and the loss"] = 4 * FLOAT * texts * dimension * max(world, 1) + plan.extra_bytes
    made = [torch.nn.functional.normalize(torch.randn(n, dimension, device=here.device), dim=1)
            for n in (max(rows), world * (texts - max(rows)))]  # fmt: skip
    options = {"positives": torch.arange(max(rows), device=here.device), "symmetric": config.loss.symmetric}
    found.seconds["loss"] = min(_seconds(lambda: info_nce_with_grad(*made, **options), here) for _ in range(3))
    found.seconds["optimizer"] = _update_seconds(found, here) / (world if config.train.zero_stage else 1)


def _update_seconds(found: Estimate, here: World) -> float:
    """AdamW's time for all trained parameters, from an update of a few million."""
    count = min(found.trained, 4_000_000)
    parameter = torch.nn.Parameter(torch.zeros(count, device=here.device))
    parameter.grad = torch.ones_like(parameter)
    optimizer = torch.optim.AdamW([parameter], fused=True)
    optimizer.step()
    return min(_seconds(optimizer.step, here) for _ in range(3)) * found.trained / count


def _seconds(function: object, here: World) -> float:
    began = time.perf_counter()
    function()
    if here.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def run() -> None:
    """The program as a process of its own."""
    as_process(main, leave)


if __name__ == "__main__":
    run()
