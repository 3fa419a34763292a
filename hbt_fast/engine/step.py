"""One training step, repeated until it is done: memory that runs out and fp16 that overflows cost time, not steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch

from hbt_fast.data.pack import repack
from hbt_fast.engine.backends import DeepSpeedEngine, SettingError, TorchEngine
from hbt_fast.engine.cached_step import OutOfMemoryError, cached_backward
from hbt_fast.engine.guard import DivergedError
from hbt_fast.engine.memory import GIB, KeptGraphs, give_back, out_of_memory
from hbt_fast.engine.objective import Objective
from hbt_fast.engine.phases import Phases
from hbt_fast.engine.tuning import FIRST_SCALE, LossScale, TokenSearch
from hbt_fast.loss.ranks import NotFiniteError

if TYPE_CHECKING:
    from hbt_fast.config import Config
    from hbt_fast.data.feed import RankBatch
    from hbt_fast.engine.launch import World
    from hbt_fast.engine.watch import Watch

FIRST_TOKENS = {"cpu": 1024, "cuda": 8192}  # where the search begins
LEAST_TOKENS = 32


class StepResult(NamedTuple):
    """What came of a step.

    Attributes:
        trouble: why no update was made; None: one was.
        loss: of the global batch.
        accuracy: in-batch, see `Objective`.
        norm: of the gradient, before clipping.
        temperature: that was used.
        seconds: by phase, of the attempt that counted.
        kept: share of this rank's micro-batches that were embedded once only.
        micro_batch_tokens: tokens per micro-batch.
        loss_scale: of fp16, else 1.
    """

    trouble: str | None
    loss: float = math.nan
    accuracy: float = math.nan
    norm: float = math.nan
    temperature: float = math.nan
    seconds: dict[str, float] = {}
    kept: float = 0.0
    micro_batch_tokens: int = 0
    loss_scale: float = 1.0


class Stepper:
    """Takes the steps of a run, and holds what is found on the way.

    Args:
        engine: around `hbt_fast.encoder.towers.Towers`.
        config: the settings.
        world: the ranks.
        say: prints a line (rank 0).
        found: what an earlier part of this run found: the `state()` of its checkpoint.

    Attributes:
        tokens: per micro-batch; batches that were packed with another number are packed again.
        watch: told what a step does.
    """

    def __init__(
        self,
        engine: TorchEngine | DeepSpeedEngine,
        config: Config,
        world: World,
        say: Callable[[str], None] = print,
        found: dict | None = None,
    ) -> None:
        self.engine, self.config, self.world, self.say = engine, config, world, say
        self.watch: Watch | None = None
        found, settings = found or {}, config.train
        self.tokens = found.get("micro_batch_tokens", settings.micro_batch_tokens)
        self.search = None
        if self.tokens == "auto":
            self.search = TokenSearch(FIRST_TOKENS[world.device.type])
            self.tokens = self.search.tokens
        limit = None if settings.keep_gib == "auto" else int(settings.keep_gib * GIB)
        self.graphs = KeptGraphs(engine.module, world.device, limit)
        fp16 = engine.module if world.autocast == torch.float16 else None
        self.scale = LossScale(fp16, found.get("loss_scale", FIRST_SCALE))

    def state(self) -> dict:
        """What a checkpoint keeps of it (JSON)."""
        kept = {"micro_batch_tokens": self.tokens}
        return {**kept, "loss_scale": self.scale.value} if self.scale.on else kept

    def __call__(self, batch: RankBatch, learning_rate: float) -> StepResult:
        """Train on a batch; collective over the ranks.

        Raises:
            SettingError: memory runs out however small the micro-batches are, or where a step cannot be repeated.
        """
        self.engine.set_learning_rate(learning_rate)
        while True:
            result, short = self._attempt(batch)
            if result.trouble is None:
                self.scale.taken()
                return result
            if self.world.largest(int(short)):
                self._shrink(batch.plan.step)
            elif self.scale.lowered():
                again = f"repeated at loss scale {self.scale.value:g}"
                self.say(f"step {batch.plan.step}: fp16 overflowed ({result.trouble}), {again}")
            else:
                return result

    def _attempt(self, batch: RankBatch) -> tuple[StepResult, bool]:
        """The step once: what came of it, and whether memory ran out on this rank."""
        device, config = self.world.device, self.config
        packed = batch.micro_batches if batch.budget == self.tokens else repack(batch.micro_batches, self.tokens)
        passage_ids = torch.from_numpy(batch.passage_ids).to(device)
        objective = Objective(config.loss, self.world, len(batch.rows), passage_ids)
        phases = Phases(device, self.watch)
        searching = self.search is not None and not self.search.done
        try:
            done = cached_backward(
                self.engine,
                packed,
                objective,
                device=device,
                seed=(config.train.seed, batch.plan.step, self.world.rank),
                inverse=batch.inverse,
                graphs=self.graphs,
                measure=searching or (self.graphs.limit != 0 and not self.graphs.seen),
                factor=self.scale.value,
                phases=phases,
            )
        except OutOfMemoryError:
            return StepResult("memory ran out"), True
        except NotFiniteError as error:
            return StepResult(f"an embedding is not finite: {error}"), False
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            if self.world.size > 1 or self.engine.zero_stage == 3:  # others wait for this rank in a collective
                raise SettingError(
                    f"step {batch.plan.step}: memory ran out on rank {self.world.rank} ({str(error).splitlines()[0]}), "
                    f"where a step cannot be repeated. Lower train.micro_batch_tokens (now {self.tokens}), "
                    "train.keep_gib or batch.size, and go on with train.resume=true"
                ) from None
            self.engine.forget()
            return StepResult("memory ran out"), True
        phases.begin("optimizer")
        norm = self.engine.step()
        finite = self.engine.finite()
        seconds = phases.end()
        if not math.isfinite(norm):
            return StepResult(f"the gradient's norm is {norm}", norm=norm), done.out_of_memory
        # under ZeRO each rank has other weights, and all must come to the same end
        if self.world.largest(not finite) if self.engine.zero_stage else not finite:
            train = config.train
            raise DivergedError(
                f"step {batch.plan.step}: its update made weights that are NaN, infinite or beyond 1e18. No checkpoint "
                f"has them: lower train.learning_rate ({train.learning_rate:g}) or train.weight_decay "
                f"({train.weight_decay:g}) and begin anew, or go on from the last checkpoint with train.resume=true "
                "and train.resume_changed"
            )
        if searching:
            self._observe(seconds["embed"] / batch.tokens, len(packed) <= len(self.engine.module.encoders))
        return StepResult(
            None,
            float(done.loss),
            objective.accuracy,
            norm,
            objective.temperature,
            seconds,
            done.kept / len(packed),
            self.tokens,
            self.scale.value,
        ), False

    def _observe(self, cost: float, largest: bool) -> None:
        slowest = self.world.largest(int(1e12 * cost)) / 1e12
        self.search.observe(slowest, bool(self.world.largest(int(largest))))
        self.tokens = self.search.tokens
        if self.search.done:
            self.say(f"train.micro_batch_tokens: {self.tokens} were found to be fastest")

    def _shrink(self, step: int) -> None:
        """Memory ran out on a rank: every rank goes on with half the tokens per micro-batch."""
        if self.tokens <= LEAST_TOKENS:
            raise SettingError(
                f"step {step}: memory runs out with micro-batches of {self.tokens} tokens. Lower batch.size or "
                "model.passage_max_length, or turn on model.gradient_checkpointing"
            )
        if self.search and not self.search.done:
            self.search.stop()
        self.graphs.shrink()
        self.tokens //= 2
        give_back(self.world.device)
        self.say(
            f"step {step}: memory ran out; the step is repeated with micro-batches of {self.tokens} tokens, which stay "
            "so small (the batch is what it was)"
        )
