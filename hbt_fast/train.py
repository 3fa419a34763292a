"""The program: train, evaluate and export a multilingual retriever.

python -m hbt_fast.train --config configs/demo.yaml
deepspeed --num_gpus 2 hbt_fast/train.py --config configs/hybrid-e5.yaml train.zero_stage=2
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__" and Path(sys.path[0] or ".").resolve() == Path(__file__).resolve().parent:
    sys.path.pop(0)  # run as a file: hbt_fast/evaluate.py must not stand in for the package `evaluate`

import math
import time
from collections.abc import Callable
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
from hbt_fast.engine.guard import DivergedError, SkippedSteps
from hbt_fast.engine.launch import World, lost_a_rank, make_engine, start
from hbt_fast.engine.runlog import AFTER, RunLog
from hbt_fast.engine.schedule import learning_rates
from hbt_fast.engine.signals import StoppedError, StopSignals
from hbt_fast.evaluation.run import EvaluationError
from hbt_fast.loss import info_nce_with_grad, negative_variance
from hbt_fast.loss.ranks import NotFiniteError
from hbt_fast.prepare import prepare, roles
from hbt_fast.report import before_and_after, evaluate_before, evaluate_model, write_model_card

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


USER_ERRORS = (DataError, EncoderError, CheckpointError, SettingError, DivergedError, EvaluationError)


def main(arguments: list[str] | None = None) -> None:
    """Train from the command line; errors that a user can mend end the program with one message and status 2.

    A signal ends it with status 128 + its number, a rank that is gone with status 1.
    """
    config = parse("hbt_fast.train", __doc__.splitlines()[0], arguments)
    try:
        train(config)
    except USER_ERRORS as error:
        _end(str(error), 2)
    except StoppedError as stopped:
        _end(str(stopped), 128 + stopped.number)
    except RuntimeError as error:
        if not lost_a_rank(error):
            raise
        reason = str(error).splitlines()[0]
        _end(f"another rank is gone, its own output says why ({reason}); train.resume=true goes on", 1)


def _end(message: str, status: int) -> None:
    print(f"hbt_fast.train: {message}", file=sys.stderr, flush=True)
    sys.exit(status)


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
    first, parameters, moments, skipped = 0, None, None, 0
    if config.train.resume and (checkpoint := newest_checkpoint(run)):
        first, parameters, moments, skipped = load_checkpoint(checkpoint, identity)
        log.say(f"resuming from {checkpoint}: {first} of {config.train.steps} steps are done")
    before = evaluate_before(encoder, config, world, log)  # of the untrained encoder, or as a stopped run wrote it
    world.barrier()
    if parameters:
        encoder.load_state_dict(parameters)  # before the engine shards them
    engine = make_engine(encoder, config.train, world)
    if moments:
        engine.restore(moments, first - skipped)

    def keep(done: int) -> None:
        """Write a checkpoint; where rank 0 cannot, all ranks end."""
        state, failed = engine.state(), None
        try:
            if world.first:
                options = {"skipped": done - engine.updates}
                save_checkpoint(run, done, *state, identity, config.train.keep_checkpoints, **options)
        except CheckpointError as error:
            failed = error
        if world.largest(failed is not None):
            raise failed or CheckpointError("rank 0 could not write a checkpoint; its own message says why")

    log.start(first, planner)
    encoder.train()
    guard = SkippedSteps(log, store, config.train.max_skipped_steps)
    with make_feed(planner, store, config, world, first=first, rewrite=rewrite) as feed:
        train_steps(engine, feed, config, world, log, guard, keep, first)

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


def train_steps(
    engine: TorchEngine | DeepSpeedEngine,
    feed: Feed,
    config: Config,
    world: World,
    log: RunLog,
    guard: SkippedSteps,
    keep: Callable[[int], None],
    first: int,
) -> None:
    """All steps from `first` on.

    Args:
        engine: has the parameters.
        feed: this rank's batches.
        config: the settings.
        world: the ranks.
        log: told of every step.
        guard: is told of steps without a finite gradient.
        keep: writes the checkpoint after so many steps; all ranks call it.
        first: the step that the feed begins with.

    Raises:
        StoppedError: SIGTERM or SIGINT came to a rank; a checkpoint is written.
        DivergedError: too many steps in a row without a finite gradient.
        CheckpointError: a checkpoint could not be written.
    """
    rate = learning_rates(config.train)
    with StopSignals() as signals:
        for step in range(first, config.train.steps):
            began = time.perf_counter()
            batch = next(feed)
            waited = time.perf_counter() - began
            engine.set_learning_rate(rate(step))
            try:
                loss, accuracy = run_step(engine, batch, config, world)
                norm = engine.step()
                trouble = None if math.isfinite(norm) else f"the gradient's norm is {norm}"
            except NotFiniteError as error:  # raised on all ranks
                trouble = f"an embedding is not finite: {error}"
            if trouble:
                guard.skipped(batch.plan, trouble)
            else:
                guard.taken()
                took = {"tokens": batch.tokens, "seconds": time.perf_counter() - began, "waited": waited}
                log.step(step, batch.plan, loss, accuracy, norm=norm, rate=rate(step), **took)
            done, every = step + 1, config.train.checkpoint_every
            stop = world.largest(signals.number)
            if stop or done == config.train.steps or (every and done % every == 0):
                keep(done)
            if stop:
                raise StoppedError(stop, done)


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
