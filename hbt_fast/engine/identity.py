"""What a run is: a checkpoint names it, and a run that goes on from the checkpoint has to be the same.

An identity is a flat dictionary (JSON): settings by their dotted names, and what came of data and model. Left out is
what changes speed, memory, places or what is said, and evaluation: these may change between the parts of a run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING

from hbt_fast.encoder.encoding import weights_checksum

if TYPE_CHECKING:
    from hbt_fast.config import Config
    from hbt_fast.data.plan import BatchPlanner
    from hbt_fast.data.switching import Switching
    from hbt_fast.encoder.model import Encoder
    from hbt_fast.encoder.towers import Towers

OF_THE_MODEL = (  # path is a place; what lies there is in "architecture", "frozen weights" and the checkpoint itself
    "pooling", "query_prompt", "passage_prompt", "query_max_length", "passage_max_length", "max_length", "dropout",
    "separate_towers", "lora",
)  # fmt: skip
NOT_OF_THE_LOSS = ("backend",)
OF_TRAINING = ("steps", "learning_rate", "weight_decay", "warmup", "schedule", "clip", "seed", "precision")
NO_ARCHITECTURE = ("_name_or_path", "architectures", "transformers_version", "dtype", "torch_dtype")


def run_identity(config: Config, planner: BatchPlanner, rewrite: Switching | None, towers: Towers) -> dict:
    """The identity of a run.

    Args:
        config: the settings, prompts resolved.
        planner: of its batches.
        rewrite: what replaces words in them; None: nothing does.
        towers: what is trained, as it starts.
    """
    model, loss, train = asdict(config.model), asdict(config.loss), asdict(config.train)
    identity = {
        **planner.store.identity,
        **{f"model.{name}": model[name] for name in OF_THE_MODEL},
        **{f"batch.{name}": value for name, value in asdict(config.batch).items()},
        **{f"loss.{name}": value for name, value in loss.items() if name not in NOT_OF_THE_LOSS},
        **{f"train.{name}": train[name] for name in OF_TRAINING},
        "architecture": _architecture(towers.queries),
    }
    if rewrite is not None:
        identity |= rewrite.identity
    if frozen := towers.frozen():
        identity["frozen weights"] = weights_checksum(frozen)
    return identity


def _architecture(encoder: Encoder) -> dict:
    """What else vectors are a function of, besides weights and settings."""
    described = encoder.model.config.to_diff_dict()
    described = {name: value for name, value in described.items() if name not in NO_ARCHITECTURE}
    layers = None if encoder.dense is None else str(encoder.dense)
    return {**described, "pooling": encoder.pooling, "dense": layers}


def may_change(config: Config) -> Callable[[dict, int], set[str]]:
    """Which names of an identity may be others when a run goes on.

    Those that train.resume_changed lists; and the number of steps, where no step from there on has another learning
    rate or other batches for it.

    Returns:
        a function of the identity that the run had and of the steps that it had done.
    """
    train, batch = config.train, config.batch

    def names(before: dict, done: int) -> set[str]:
        warmed_up = max(before.get("train.warmup", 1) * before.get("train.steps", done), train.warmup * train.steps)
        constant = train.schedule == before.get("train.schedule") == "constant_with_warmup" and done >= warmed_up
        return {*train.resume_changed, *({"train.steps"} if constant and batch.alpha_end is None else ())}

    return names
