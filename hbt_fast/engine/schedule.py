"""The learning rate as a function of the step, from transformers' schedules."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from hbt_fast.config import TrainConfig


def learning_rates(settings: TrainConfig) -> Callable[[int], float]:
    """The learning rate of every step (counted from 0), without state.

    Args:
        settings: a `TrainConfig` (schedule, warmup, steps, learning_rate).
    """
    from transformers import get_scheduler

    anything = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    warmup = round(settings.warmup * settings.steps)
    schedule = get_scheduler(settings.schedule, anything, warmup, settings.steps)
    factor = schedule.lr_lambdas[0]
    # a warm-up from 0 would make the first update empty: take the middle of each step
    return lambda step: settings.learning_rate * factor(step + 1 if step < warmup else step)
