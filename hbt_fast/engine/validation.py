"""Evaluation during training: when it is due, which step was the best, and whether to go on."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from hbt_fast.base.ranges import check
from hbt_fast.engine.backends import SettingError
from hbt_fast.evaluation.queries import LOWER_IS_BETTER

if TYPE_CHECKING:
    from hbt_fast.config import EvalConfig
    from hbt_fast.engine.runlog import RunLog
    from hbt_fast.evaluation.metrics import Results

ONLY = {"context": ("xquad-r", "mlqa-r"), "split": ("beir", "miracl", "mr-tydi", "rerank")}


def check_evaluation(settings: EvalConfig) -> None:
    """See that the settings go together.

    Raises:
        SettingError: they do not.
    """
    check(settings, "eval.", SettingError)
    if settings.data is None and settings.task not in ("none", "cldr"):
        raise SettingError(f"eval.task is {settings.task}, but eval.data is not set; write the folder of its files")
    for name, tasks in ONLY.items():
        if getattr(settings, name) and settings.task not in tasks:
            raise SettingError(
                f"eval.{name} is set, which task {settings.task} has no use for; leave it out (it is for "
                f"{', '.join(tasks)})"
            )
    if settings.every and settings.task == "none":
        raise SettingError(f"eval.every is {settings.every}, but eval.task is none; write a task, or eval.every=0")
    if settings.candidates is not None and settings.queries is None:
        raise SettingError("eval.candidates is set, but eval.queries is not; write how many questions to draw")
    if settings.patience is not None and not settings.every:
        raise SettingError(f"eval.patience is {settings.patience}, but eval.every is 0; write the steps between two")


class Validation:
    """Decides by the evaluations during training; every rank comes to the same decisions.

    Args:
        settings: `every`, `metric` and `patience`.
        steps: of the run; the last one is evaluated too.
        evaluate: makes the evaluation after so many steps; collective.
        log: told of every decision.
        found: what an earlier part of this run found: the `state()` of its checkpoint.

    Attributes:
        best_step: steps done at the best evaluation; None: there was none yet.
        best: its value.
        since: evaluations since then.

    Raises:
        SettingError: `found` is by another metric.
    """

    def __init__(
        self,
        settings: EvalConfig,
        steps: int,
        evaluate: Callable[[int], Results],
        log: RunLog,
        found: dict | None = None,
    ) -> None:
        self.settings, self.steps, self.evaluate, self.log = settings, steps, evaluate, log
        self.best_step: int | None = None
        self.best, self.since, self.task = math.nan, 0, None
        self._last = -1
        found = (found or {}).get("validation")
        if not settings.every or found is None:
            return
        if found["metric"] != settings.metric:
            raise SettingError(
                f"the best step of this run was chosen by eval.metric {found['metric']}, now it is {settings.metric}; "
                f"write eval.metric={found['metric']}"
            )
        self.best_step, self.best, self.since = found["best_step"], found["best"], found["since"]
        self.task, self._last = found["task"], found["last"]

    def state(self) -> dict:
        """What a checkpoint keeps of it (JSON)."""
        if self.best_step is None:
            return {}
        return {
            "validation": {
                "metric": self.settings.metric,
                "task": self.task,
                "best_step": self.best_step,
                "best": self.best,
                "since": self.since,
                "last": self._last,
            }
        }

    def due(self, done: int) -> bool:
        """Whether to evaluate after so many steps (where that was not done already)."""
        every = self.settings.every
        return bool(every) and done > 0 and (done % every == 0 or done == self.steps) and done != self._last

    @property
    def over(self) -> bool:
        """Whether training ends here, for want of a better evaluation."""
        return self.settings.patience is not None and self.since >= self.settings.patience

    def __call__(self, done: int) -> bool:
        """Evaluate after so many steps; whether it was the best so far. All ranks call.

        Raises:
            SettingError: the task has no such metric, or is another than that of the earlier part of the run.
            EvaluationError: the encoder's vectors cannot be ranked.
        """
        results, metric = self.evaluate(done), self.settings.metric
        value = results.value(metric)
        task = f"{results.task}: {results.queries:,} queries, {results.candidates:,} candidates"
        if math.isnan(value):
            raise SettingError(
                f"eval.metric is {metric}, which {task} in {', '.join(results.languages)} do not have; write another"
            )
        if self.task not in (None, task):
            raise SettingError(
                f"the best step of this run was chosen on {self.task}; now there are {task}. Set eval back as it was"
            )
        better = self.best_step is None or (value < self.best if metric in LOWER_IS_BETTER else value > self.best)
        if better:
            self.best_step, self.best, self.since = done, value, 0
        else:
            self.since += 1
        self.task, self._last = task, done
        what = "the best so far" if better else f"{metric} was {self.best:.4f} after step {self.best_step}"
        self.log.say(f"evaluation after step {done}: {results.headline().splitlines()[0]}; {what}")
        return better

    def why(self) -> str:
        """Why training is over."""
        return (
            f"{self.since} evaluations brought nothing better than {self.settings.metric} {self.best:.4f}, which step "
            f"{self.best_step} had (eval.patience)"
        )
