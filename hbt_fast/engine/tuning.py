"""Numbers that a run finds for itself: the loss scale of fp16, and how many tokens go through the encoder at once."""

from __future__ import annotations

from torch import Tensor, nn

FIRST_SCALE, LARGEST_SCALE, STEPS_TO_GROW = 2.0**16, 2.0**24, 2000  # torch.amp.GradScaler's, but for the largest


class LossScale:
    """The loss scale of fp16 (Micikevicius et al., arXiv 1710.03740): gradients go backward times a power of two.

    It is taken out again, exactly, before a gradient reaches its parameter: engines and checkpoints see none of it.
    A step whose gradients overflow is repeated with half the scale; after 2,000 good steps the scale doubles.

    Args:
        module: its trained parameters get a hook; None: the scale is 1 and stays so.
        value: the first one.
    """

    def __init__(self, module: nn.Module | None, value: float = FIRST_SCALE) -> None:
        self.value, self.good, self.on = (1.0 if module is None else value), 0, module is not None
        for p in module.parameters() if module else ():
            if p.requires_grad:
                p.register_hook(self._unscaled)

    def _unscaled(self, gradient: Tensor) -> Tensor:
        return gradient / self.value

    def taken(self) -> None:
        """A step's gradients were finite."""
        self.good += 1
        if self.on and self.good % STEPS_TO_GROW == 0:
            self.value = min(2 * self.value, LARGEST_SCALE)

    def lowered(self) -> bool:
        """Halve it, if it can be halved: gradients were not finite."""
        if self.value <= 1:
            return False
        self.value, self.good = self.value / 2, 0
        return True


class TokenSearch:
    """Finds how many tokens go through the encoder at once: doubled, or halved, as long as it gets faster.

    Too few leave the machine idle, too many pad (and, on CPUs, leave the caches). Every number is used for two steps
    of training, the better of which counts; the very first step is not counted.

    Args:
        start: the first number.

    Attributes:
        tokens: what to use now.
        done: whether it is found.
    """

    GAIN, LEAST, MOST = 1.03, 128, 1 << 18

    def __init__(self, start: int) -> None:
        self.tokens, self.done = start, False
        self._start, self._best, self._up, self._seen, self._warm = start, None, True, [], False

    def observe(self, cost: float, largest: bool) -> None:
        """A step was taken with `tokens`.

        Args:
            cost: seconds per token, the same number on every rank.
            largest: all texts of the step were in one micro-batch: more tokens change nothing.
        """
        if not self._warm:
            self._warm = True
            return
        self._seen.append(cost)
        if len(self._seen) < 2:
            return
        cost, self._seen = min(self._seen), []
        better = self._best is None or cost * self.GAIN < self._best[0]
        if better:
            self._best = cost, self.tokens
        if self._up and not (better and not largest and self.tokens < self.MOST):
            tried_one = self._best[1] == self._start
            self._up = False
            if not tried_one:
                return self.stop()
            self.tokens = self._start
            better = True
        if not self._up and not (better and self.tokens // 2 >= self.LEAST):
            return self.stop()
        self.tokens = 2 * self.tokens if self._up else self.tokens // 2

    def stop(self) -> None:
        """Take the best so far (memory ran out, or nothing is gained any more)."""
        self.tokens, self.done = (self._best[1] if self._best else self.tokens), True
