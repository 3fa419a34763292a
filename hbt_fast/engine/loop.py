"""The loop over the steps of a run: batches in, log lines and checkpoints out; signals and bad steps are dealt with."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from hbt_fast.base.errors import StoppedError
from hbt_fast.data.feed import Feed
from hbt_fast.engine.guard import SkippedSteps
from hbt_fast.engine.launch import World
from hbt_fast.engine.runlog import RunLog
from hbt_fast.engine.schedule import learning_rates
from hbt_fast.engine.signals import StopSignals
from hbt_fast.engine.step import Stepper
from hbt_fast.engine.validation import Validation
from hbt_fast.engine.watch import Watch

if TYPE_CHECKING:
    from hbt_fast.config import TrainConfig


def train_steps(
    stepper: Stepper,
    feed: Feed,
    settings: TrainConfig,
    world: World,
    log: RunLog,
    guard: SkippedSteps,
    validation: Validation,
    keep: Callable[[int], None],
    first: int,
) -> int:
    """All steps from `first` on, or until evaluation during training finds that no more are of use.

    Args:
        stepper: takes them.
        feed: this rank's batches.
        settings: of the run.
        world: the ranks.
        log: told of every step.
        guard: is told of steps without a finite gradient.
        validation: evaluates between steps.
        keep: writes the checkpoint after so many steps; all ranks call it.
        first: the step that the feed begins with.

    Returns:
        How many steps the run has done.

    Raises:
        StoppedError: SIGTERM or SIGINT came to a rank; a checkpoint is written.
        DivergedError: too many steps in a row without a finite gradient.
        CheckpointError: a checkpoint could not be written.
        EvaluationError: the vectors of an evaluation could not be ranked.
    """
    rate, done = learning_rates(settings), first
    with StopSignals() as signals, Watch(world, settings.hang_minutes) as watch:
        stepper.watch = watch
        if validation.due(first):  # a signal stopped the run before it was made
            watch.begin("evaluation")
            validation(first)
            watch.begin("checkpoint")
            keep(first)
        for step in range(first, settings.steps):
            if validation.over:
                log.ended_early(validation.why(), done)
                break
            watch.step(step)
            began = time.perf_counter()
            batch = next(feed)
            waited = time.perf_counter() - began
            result = stepper(batch, rate(step))
            watch.begin("log")
            feed.set_budget(stepper.tokens)
            if result.trouble:
                guard.skipped(batch.plan, result.trouble)
            else:
                guard.taken()
                log.step(batch, result, rate=rate(step), seconds=time.perf_counter() - began, waited=waited)
            done, every = step + 1, settings.checkpoint_every
            watch.begin("end")
            stop = world.largest(signals.number)
            better = False
            if not stop and validation.due(done):
                watch.begin("evaluation")
                better = validation(done)
            last = done == settings.steps or validation.over
            if stop or better or last or (every and done % every == 0):
                watch.begin("checkpoint")
                keep(done)
            if stop:
                raise StoppedError(stop, f"after {done} steps; train.resume=true goes on")
    return done
