"""Settings are checked once, before anything is read: each in its range, and all that must go together."""

from __future__ import annotations

import os
from collections.abc import Collection
from typing import TYPE_CHECKING

from hbt_fast.base.errors import UserError
from hbt_fast.base.ranges import check
from hbt_fast.data.code_switch import check_switching
from hbt_fast.data.shares import check_settings
from hbt_fast.data.sources import refuse_unheeded

if TYPE_CHECKING:
    from hbt_fast.config import Config, LossConfig, ModelConfig
    from hbt_fast.data.sources import Source


def check_config(config: Config) -> None:
    """See that every setting is in range and that they go together, without reading anything.

    Raises:
        UserError: names the setting, and what to write.
    """
    from hbt_fast.engine.launch import uses_deepspeed
    from hbt_fast.engine.objective import check_loss
    from hbt_fast.engine.validation import check_evaluation

    check(config)
    for number, source in enumerate(config.data.sources):
        _check_source(source, f"data.sources[{number}]")
    check_settings(config.batch, config.train.steps)
    if config.batch.strategy == "code-switched" or config.batch.code_switch.lexicons:
        check_switching(config.batch.code_switch)
    _check_temperature(config.loss)
    if config.model.path is None:
        _check_shape(config.model)
        check_loss(config.loss, config.model.scratch.hidden)
    uses_deepspeed(config.train)
    if (file := config.train.deepspeed) is not None and not os.path.isfile(file):
        raise UserError(f"train.deepspeed is {file!r}, and there is no such file; name a DeepSpeed JSON file")
    check_evaluation(config.eval)


def _check_source(source: Source, name: str) -> None:
    if source.format != "cldr" and (source.path is None) == (not source.files):
        raise UserError(f"{name}: give either path or files (one file per language)")
    refuse_unheeded(source, source.format, name)


def _check_temperature(loss: LossConfig) -> None:
    if loss.learn_temperature and 1 / loss.temperature > loss.max_scale * (1 + 1e-6):
        raise UserError(
            f"loss.max_scale is {loss.max_scale:g}, below 1/loss.temperature, {1 / loss.temperature:g}; write a larger "
            "max_scale or a larger temperature"
        )


def _check_shape(model: ModelConfig) -> None:
    hidden, heads = model.scratch.hidden, model.scratch.heads
    if hidden % heads:
        near = [n for n in range(1, hidden + 1) if hidden % n == 0]
        near = sorted(near, key=lambda n: abs(n - heads))[:2]
        raise UserError(
            f"model.scratch.heads is {heads}, which does not divide model.scratch.hidden, {hidden}; write "
            f"{_listed(sorted(near))} heads, or another width"
        )


def _listed(names: Collection) -> str:
    return " or ".join(str(name) for name in names)
