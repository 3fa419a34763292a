"""The program: train, evaluate and export a multilingual retriever.

python -m hbt_fast.train --config configs/demo.yaml
deepspeed --num_gpus 2 hbt_fast/train.py --config configs/hybrid-e5.yaml train.zero_stage=2
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

if __name__ == "__main__" and Path(sys.path[0] or ".").resolve() == Path(__file__).resolve().parent:
    sys.path.pop(0)  # run as a file: hbt_fast/evaluate.py must not stand in for the package `evaluate`

from typing import TYPE_CHECKING

from hbt_fast.base.programs import as_process, end, program
from hbt_fast.config import Config, parse
from hbt_fast.data.feed import Feed
from hbt_fast.data.plan import BatchPlanner
from hbt_fast.data.store import Store
from hbt_fast.data.switching import Switching
from hbt_fast.encoder.towers import Towers, make_towers
from hbt_fast.engine.backends import SettingError
from hbt_fast.engine.checkpoint import (
    Checkpoint,
    CheckpointError,
    checkpoint_folder,
    load_checkpoint,
    save_checkpoint,
)
from hbt_fast.engine.evaluator import Evaluator, spread
from hbt_fast.engine.guard import SkippedSteps
from hbt_fast.engine.identity import may_change, run_identity
from hbt_fast.engine.launch import World, leave, lost_a_rank, make_engine, start
from hbt_fast.engine.loop import train_steps
from hbt_fast.engine.metrics import AFTER, DURING
from hbt_fast.engine.objective import check_loss
from hbt_fast.engine.runlog import RunLog
from hbt_fast.engine.share import checkpoint_of_all, make_alike
from hbt_fast.engine.step import Stepper
from hbt_fast.engine.validation import Validation
from hbt_fast.model_card import write_model_card
from hbt_fast.overview import in_words, overview
from hbt_fast.prepare import prepare, resolve
from hbt_fast.report import before_and_after
from hbt_fast.settings import check_config

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

    from hbt_fast.encoder.prompts import Prompts
    from hbt_fast.evaluation.metrics import Results


@program("hbt_fast.train")
def main(arguments: list[str] | None = None) -> None:
    """Train from the command line; errors that a user can mend end the program with one message and status 2.

    A signal ends it with status 128 + its number, a rank that is gone with status 1.
    """
    config = parse("hbt_fast.train", __doc__.splitlines()[0], arguments)
    try:
        train(config)
    except RuntimeError as error:
        if not lost_a_rank(error):
            raise
        reason = str(error).splitlines()[0]
        end("hbt_fast.train", f"another rank is gone, its own output says why ({reason}); train.resume=true goes on", 1)


def train(config: Config) -> Path:
    """A whole run: data, training, evaluation, export. Returns the run folder."""
    check_config(config)
    config, prompts = resolve(config)
    world = start(config.train)
    run = Path(config.train.run_dir)
    with RunLog(run, config, world) as log:
        _train(config, prompts, world, run, log)
    return run


def _train(config: Config, prompts: Prompts, world: World, run: Path, log: RunLog) -> None:
    log.say(f"{world.size} x {world.device}, {config.batch.strategy} batches of {config.batch.size} pairs -> {run}")

    evaluator = Evaluator(config, world, log)
    store, tokenizer = prepare(config, world)
    config = evaluator.config = with_prompts_of_all(config, store, log)
    planner = make_planner(store, config)
    rewrite = make_rewrite(store, tokenizer, config, log)
    towers = build(config, tokenizer, world.autocast)
    check_loss(config.loss, towers.queries.dimension)
    identity = run_identity(config, planner, rewrite, towers)
    make_alike(world, config, identity, towers)
    known = overview(prompts, store, tokenizer, planner) if world.first else {}
    log.say(in_words(known))
    towers.to(world.device)
    resumed = Checkpoint(0, {}, {}, {})
    if config.train.resume:
        folder, resumed = checkpoint_of_all(world, run, identity, may_change(config))
        if resumed.step > config.train.steps:
            raise SettingError(
                f"{folder} is of step {resumed.step}, and train.steps is {config.train.steps}; write as many or more"
            )
        if folder:
            log.say(f"resuming from {folder}: {resumed.step} of {config.train.steps} steps are done")
            for change in resumed.changed:
                log.say(f"from here on another run than before: {change}")
        else:
            log.say(f"no checkpoint in {run} to go on from: training begins at its first step")
    log.open()
    log.write("overview.json", known)
    before = evaluator.before(towers)  # of the untrained encoder, or as a stopped run wrote it
    world.barrier()
    first, skipped = resumed.step, resumed.progress.get("skipped", 0)
    if resumed.parameters:
        towers.load_trained(resumed.parameters)  # before the engine shards them
    engine = make_engine(towers, config.train, world)
    if resumed.moments:
        engine.restore(resumed.moments, first - skipped)
    stepper = Stepper(engine, config, world, log.say, resumed.progress)

    def evaluate(done: int) -> Results:
        return evaluator(engine, DURING, done)

    validation = Validation(config.eval, config.train.steps, evaluate, log, resumed.progress)

    def keep(done: int) -> None:
        """Write a checkpoint; where rank 0 cannot, all ranks end."""
        state, failed = engine.state(), None
        try:
            if world.first:
                progress = {"skipped": done - engine.updates, **stepper.state(), **validation.state()}
                stay = {"keep": config.train.keep_checkpoints, "best": validation.best_step}
                save_checkpoint(run, done, *state, identity, progress=progress, **stay)
        except CheckpointError as error:
            failed = error
        if world.largest(failed is not None):
            raise failed or CheckpointError("rank 0 could not write a checkpoint; its own message says why")

    log.start(first, planner)
    towers.train()
    guard = SkippedSteps(log, store, config.train.max_skipped_steps)
    with make_feed(planner, store, config, world, first=first, rewrite=rewrite, budget=stepper.tokens) as feed:
        done = train_steps(stepper, feed, config.train, world, log, guard, validation, keep, first)

    parameters, _ = engine.state()
    trained = build(replace(config, model=replace(config.model, compile=False)), tokenizer, world.autocast)
    if world.first:
        if validation.best_step not in (None, done):
            log.say(f"step {validation.best_step} was the best and is exported")
            parameters = load_checkpoint(checkpoint_folder(run, validation.best_step), None).parameters
        trained.load_trained(parameters)
        for source in store.sources:
            trained.record_prompts(source.name, [role.prompt for role in source.roles])
        trained.export(run / "model")
    after = evaluator(spread(trained, world), AFTER, done if validation.best_step is None else validation.best_step)
    if world.first:
        plots = before_and_after(before, after, run)
        write_model_card(run / "model", config, store, before, after)
        log.finish({"exported model": run / "model", "settings": run / "config.yaml", **plots})
    world.barrier()


def with_prompts_of_all(config: Config, store: Store, log: RunLog) -> Config:
    """The settings, whose prompts are those of the sources where all have the same: no other was ever trained with."""
    (query, passage), *others = {tuple(role.prompt for role in source.roles) for source in store.sources}
    if others or (query, passage) == (config.model.query_prompt, config.model.passage_prompt):
        return config
    log.say(f"all sources have query prompt {query!r} and passage prompt {passage!r}, which are the model's")
    return replace(config, model=replace(config.model, query_prompt=query, passage_prompt=passage))


def build(config: Config, tokenizer: PreTrainedTokenizerFast, autocast: torch.dtype | None = None) -> Towers:
    """What is to be trained, as it starts, on the CPU."""
    temperature = config.loss.temperature if config.loss.learn_temperature else None
    return make_towers(config.model, tokenizer, seed=config.train.seed, temperature=temperature, autocast=autocast)


def make_planner(store: Store, config: Config) -> BatchPlanner:
    """The batch planner of a run."""
    return BatchPlanner(store, config.batch, seed=config.train.seed, steps=config.train.steps)


def make_rewrite(store: Store, tokenizer: PreTrainedTokenizerFast, config: Config, log: RunLog) -> Switching | None:
    """What replaces words of the batches' texts, where code-switching is on."""
    if not config.batch.code_switch.lexicons and config.batch.strategy != "code-switched":
        return None
    switching = Switching(config.batch.code_switch, store, tokenizer, seed=config.train.seed)
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
    budget: int,
    first: int = 0,
    rewrite: Switching | None = None,
) -> Feed:
    """This rank's batches from step `first` to the last, in micro-batches of `budget` tokens."""
    return Feed(
        planner,
        store,
        rank=world.rank,
        world=world.size,
        budget=budget,
        towers=2 if config.model.separate_towers else 1,
        first=first,
        steps=config.train.steps,
        pin=world.device.type == "cuda",
        rewrite=rewrite,
    )


def run() -> None:
    """The program as a process of its own."""
    as_process(main, leave)


if __name__ == "__main__":
    run()
