"""The evaluation of a run, before, during and after training: one task, encoded by all ranks, ranked by the first."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from hbt_fast.base.files import write_whole
from hbt_fast.encoder.model import EncoderError
from hbt_fast.engine.backends import SettingError
from hbt_fast.engine.encode import SharedEncoder
from hbt_fast.engine.metrics import BEFORE, DURING
from hbt_fast.engine.share import parameters_of_all
from hbt_fast.evaluation.load import load_retrieval
from hbt_fast.evaluation.made import made_with
from hbt_fast.evaluation.metrics import Results
from hbt_fast.evaluation.run import EvaluationError, measure
from hbt_fast.evaluation.tasks import RetrievalTask, task_from_rows

if TYPE_CHECKING:
    from hbt_fast.config import Config
    from hbt_fast.encoder.towers import Towers
    from hbt_fast.engine.backends import DeepSpeedEngine, TorchEngine
    from hbt_fast.engine.launch import World
    from hbt_fast.engine.runlog import RunLog

PRECISIONS = {None: "fp32", torch.bfloat16: "bf16 autocast", torch.float16: "fp16 autocast"}


def load_task(config: Config) -> RetrievalTask | None:
    """The evaluation task that the settings name."""
    settings = config.eval
    if settings.task == "none":
        return None
    if settings.task == "cldr":
        from hbt_fast.data.cldr import cldr_rows

        languages = settings.languages or config.data.languages
        return task_from_rows("held-out CLDR concepts", cldr_rows("test", tuple(languages) if languages else None))
    if settings.data is None:
        raise SettingError(f"eval.task is {settings.task}, but eval.data is not set; write the folder of its files")
    options = {"split": settings.split, "context": settings.context, "languages": settings.languages}
    return load_retrieval(settings.task, settings.data, **options)


def spread(trained: Towers, world: World) -> Towers:
    """Give every rank the weights that rank 0 has, whole, on its device; all call.

    Args:
        trained: on the CPU, of one shape on all ranks; adapters are merged in.
        world: the ranks.
    """
    for encoder in trained.encoders:
        if hasattr(encoder.model, "merge_and_unload"):
            encoder.model = encoder.model.merge_and_unload()
    own = {name: p.detach() for name, p in trained.named_parameters()}
    trained.load_state_dict(parameters_of_all(world, own), strict=False)
    return trained.to(world.device)


class Evaluator:
    """Evaluates what is trained.

    Args:
        config: the settings. Rank 0 alone needs the task's data.
        world: the ranks.
        log: told of every evaluation.

    Raises:
        SettingError: the task's data are not named.
        DataError: they cannot be read.
    """

    def __init__(self, config: Config, world: World, log: RunLog) -> None:
        self.config, self.world, self.log = config, world, log
        self.on = config.eval.task != "none"
        self.task = load_task(config) if world.first else None
        self.part = self.task  # what is evaluated during training
        settings = config.eval
        if self.task is not None and settings.queries is not None:
            self.part = self.task.subset(settings.queries, config.train.seed, settings.candidates)

    def __call__(
        self, trained: Towers | TorchEngine | DeepSpeedEngine, when: str, step: int | None = None
    ) -> Results | None:
        """The results, on every rank; None if there is no task. All ranks call.

        Args:
            trained: towers that every rank has whole and alike, or an engine around them.
            when: BEFORE, DURING or AFTER training.
            step: steps done; after training, those of the weights that are exported.

        Raises:
            EvaluationError: the encoder's vectors cannot be ranked.
        """
        if not self.on:
            return None
        shared = SharedEncoder(trained, self.world)
        if not self.world.first:
            written = shared.help()
            if written is None:
                raise EvaluationError("rank 0 could not evaluate; its own message says why")
            return Results.from_json(written)
        if when != DURING:
            self.log.say(f"\nevaluating {when}")
        model = self.config.model
        try:
            results, per_query = measure(
                shared.queries,
                self.part if when == DURING else self.task,
                model.query_prompt,
                model.passage_prompt,
                passage_encoder=shared.passages,
                model=when,
                made=made_with(shared.module.encoders[0], PRECISIONS[self.world.autocast]),
                progress=when != DURING,
                log=None if when == DURING else self.log.say,
            )
        except (EvaluationError, EncoderError):
            shared.end(None)  # or the other ranks would wait
            raise
        shared.end(results.to_json())
        self.log.evaluation(when, results, step)
        if when != DURING:
            self.log.say(f"{results.headline()}\n")
            per_query.write(self.log.run / f"evaluation{'-before' if when == BEFORE else ''}.queries.npz")
        return results

    def before(self, towers: Towers) -> Results | None:
        """The evaluation of the untrained model; a resumed run takes it from where it was written, if that is of the
        same task. All ranks call.

        Args:
            towers: as they start.
        """
        written = self.log.run / "evaluation-before.json"
        if not self.config.eval.before or not self.on:
            return None
        found = None
        if self.world.first and self.config.train.resume and written.is_file():
            found = Results.from_json(written.read_text(encoding="utf-8"))
            if (found.task, found.languages) != (self.task.name, self.task.languages):
                found = None
        if self.world.largest(found is not None):
            return found
        results = self(towers, BEFORE)
        if self.world.first:
            write_whole(written, results.to_json())
        return results
