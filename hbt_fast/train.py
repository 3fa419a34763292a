"""The program: train, evaluate and export a multilingual retriever.

python -m hbt_fast.train --config configs/demo.yaml
deepspeed --num_gpus 2 hbt_fast/train.py --config configs/hybrid-e5.yaml train.zero_stage=2
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__" and Path(sys.path[0] or ".").resolve() == Path(__file__).resolve().parent:
    sys.path.pop(0)  # run as a file: hbt_fast/evaluate.py must not stand in for the package `evaluate`

import time
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from hbt_fast.config import Config, parse
from hbt_fast.data.feed import Feed, RankBatch
from hbt_fast.data.plan import BatchPlanner
from hbt_fast.data.rows import DataError
from hbt_fast.data.store import Store
from hbt_fast.data.switching import Switching
from hbt_fast.encoder import Encoder, EncoderError
from hbt_fast.encoder.export import export
from hbt_fast.encoder.scratch import encoder_from_scratch
from hbt_fast.engine.backends import DeepSpeedEngine, SettingError, TorchEngine
from hbt_fast.engine.cached_step import cached_backward
from hbt_fast.engine.checkpoint import CheckpointError, load_checkpoint, newest_checkpoint, save_checkpoint
from hbt_fast.engine.launch import World, make_engine, start
from hbt_fast.engine.runlog import AFTER, RunLog
from hbt_fast.engine.schedule import learning_rates
from hbt_fast.loss import info_nce_with_grad, negative_variance
from hbt_fast.prepare import prepare, roles
from hbt_fast.report import before_and_after, evaluate_before, evaluate_model, write_model_card

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def main(arguments: list[str] | None = None) -> None:
    """Train from the command line; errors that a user can mend end the program with one message and status 2."""
    config = parse("hbt_fast.train", __doc__.splitlines()[0], arguments)
    try:
        train(config)
    except (DataError, EncoderError, CheckpointError, SettingError) as error:
        print(f"hbt_fast.train: {error}", file=sys.stderr, flush=True)
        sys.exit(2)


def train(config: Config) -> Path:
    """A whole run: data, training, evaluation, export. Returns the run folder."""
    world = start(config.train)
    run = Path(config.train.run_dir)
    log = RunLog(run, config, world)
    log.say(f"{world.size} x {world.device}, {config.batch.strategy} batches of {config.batch.size} pairs -> {run}")

    store, tokenizer = prepare(config, world)
    planner = make_planner(store, config)
    rewrite = make_rewrite(store, tokenizer, config, log)
    encoder = make_encoder(config, tokenizer, world)
    identity = {**planner.identity, **(rewrite.identity if rewrite else {}), "steps": config.train.steps}
    first, parameters, moments = 0, None, None
    if config.train.resume and (checkpoint := newest_checkpoint(run)):
        first, parameters, moments, _ = load_checkpoint(checkpoint, identity)
        log.say(f"resuming from {checkpoint}: {first} of {config.train.steps} steps are done")
    before = evaluate_before(encoder, config, world, log)  # of the untrained encoder, or as a stopped run wrote it
    world.barrier()
    if parameters:
        encoder.load_state_dict(parameters)  # before the engine shards them
    engine = make_engine(encoder, config.train, world)
    if moments:
        engine.restore(moments, first)

    rate = learning_rates(config.train)
    log.start(first, planner)
    encoder.train()
    with make_feed(planner, store, config, world, first=first, rewrite=rewrite) as feed:
        for step in range(first, config.train.steps):
            began = time.perf_counter()
            batch = next(feed)
            waited = time.perf_counter() - began
            engine.set_learning_rate(rate(step))
            loss, accuracy = run_step(engine, batch, config, world)
            norm = engine.step()
            took = {"tokens": batch.tokens, "seconds": time.perf_counter() - began, "waited": waited}
            log.step(step, batch.plan, loss, accuracy, norm=norm, rate=rate(step), **took)
            done, every = step + 1, config.train.checkpoint_every
            if done == config.train.steps or (every and done % every == 0):
                state = engine.state()
                if world.first:
                    save_checkpoint(run, done, *state, identity, config.train.keep_checkpoints)
                world.barrier()

    parameters, _ = engine.state()
    if world.first:
        folder = export(encoder, run / "model", parameters)
        exported = Encoder.from_pretrained(folder, autocast=world.autocast).to(world.device)
        after = evaluate_model(exported, config, world, log, AFTER)
        plots = before_and_after(before, after, run)
        write_model_card(folder, config, store, before, after)
        log.finish({"exported model": folder, "settings": run / "config.yaml", **plots})
    world.barrier()
    return run


def make_planner(store: Store, config: Config) -> BatchPlanner:
    """The batch planner of a run."""
    return BatchPlanner(store, config.batch, seed=config.train.seed, steps=config.train.steps)


def make_rewrite(store: Store, tokenizer: PreTrainedTokenizerFast, config: Config, log: RunLog) -> Switching | None:
    """What replaces words of the batches' texts, where code-switching is on."""
    if not config.batch.code_switch.lexicons and config.batch.strategy != "code-switched":
        return None
    switching = Switching(config.batch.code_switch, store, tokenizer, *roles(config.model), seed=config.train.seed)
    if switching.unswitched:
        codes = ", ".join(switching.unswitched)
        log.say(f"code switching: the lexicons have no word of {codes}; texts in these languages stay as they are")
    return switching


def make_feed(
    planner: BatchPlanner,
    store: Store,
    config: Config,
    world: World,
    *,
    first: int = 0,
    rewrite: Switching | None = None,
) -> Feed:
    """This rank's batches from step `first` to the last."""
    return Feed(
        planner,
        store,
        rank=world.rank,
        world=world.size,
        budget=config.train.micro_batch_tokens,
        first=first,
        steps=config.train.steps,
        pin=world.device.type == "cuda",
        rewrite=rewrite,
    )


def make_encoder(config: Config, tokenizer: PreTrainedTokenizerFast, world: World) -> Encoder:
    """The encoder to train: a checkpoint, or one from nothing."""
    model = config.model
    if model.path is None:
        dropout = 0.1 if model.dropout is None else model.dropout
        encoder = encoder_from_scratch(
            tokenizer, model.scratch, max_length=model.max_length, dropout=dropout, seed=config.train.seed
        )
        encoder.pooling = model.pooling or "mean"
    else:
        encoder = Encoder.from_pretrained(
            model.path, pooling=model.pooling, max_length=model.max_length, dropout=model.dropout
        )
    encoder.prompts = {"query": model.query_prompt, "passage": model.passage_prompt}
    encoder.autocast = world.autocast
    return encoder.to(world.device)


def run_step(
    engine: TorchEngine | DeepSpeedEngine, batch: RankBatch, config: Config, world: World
) -> tuple[float, float]:
    """Accumulate the gradient of one global batch; returns its loss and in-batch accuracy."""
    passage_ids = torch.from_numpy(batch.passage_ids).to(world.device)
    n = len(batch.rows)
    accuracy = 0.0

    def loss_and_gradient(embeddings_nd: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        nonlocal accuracy
        q_Nd, p_Md = embeddings_nd[:n], embeddings_nd[n:]
        result = info_nce_with_grad(
            q_Nd,
            p_Md,
            scale=1 / config.loss.temperature,
            passage_ids=passage_ids,
            duplicates=config.loss.duplicates,
            symmetric=config.loss.symmetric,
            false_negative_margin=config.loss.false_negative_margin,
            group=world.group,
            backend=config.loss.backend,
        )
        loss, gradient_nd = result.loss, torch.cat([result.queries, result.passages])
        if weight := config.loss.variance_weight:
            with torch.enable_grad():
                leaf_nd = embeddings_nd.detach().requires_grad_()
                extra = negative_variance(leaf_nd[:n], leaf_nd[n : 2 * n], group=world.group)
            loss = loss + weight * extra.detach()
            gradient_nd = gradient_nd + weight * torch.autograd.grad(extra, leaf_nd)[0]
        accuracy = in_batch_accuracy(q_Nd, p_Md, world)
        return loss, gradient_nd

    loss = cached_backward(
        engine,
        batch.micro_batches,
        loss_and_gradient,
        device=world.device,
        seed=(config.train.seed, batch.plan.step, world.rank),
        inverse=batch.inverse,
        keep_tokens=config.train.keep_tokens,
    )
    return float(loss), accuracy


def in_batch_accuracy(q_Nd: torch.Tensor, p_Md: torch.Tensor, world: World) -> float:
    """Share of queries whose positive is the most similar passage of this rank, averaged over ranks."""
    hits = torch.zeros((), device=q_Nd.device)
    for rows in torch.arange(len(q_Nd), device=q_Nd.device).split(1024):
        hits += ((q_Nd[rows] @ p_Md.T).argmax(1) == rows).sum()
    counts = torch.stack([hits, torch.tensor(float(len(q_Nd)), device=hits.device)])
    if world.group is not None:
        dist.all_reduce(counts, group=world.group)
    return float(counts[0] / counts[1])


if __name__ == "__main__":
    main()
