"""Steps whose gradient is NaN or infinite: skipped, said aloud, listed; too many in a row end the run."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from hbt_fast.base.errors import UserError
from hbt_fast.base.files import writing
from hbt_fast.engine.backends import SettingError

if TYPE_CHECKING:
    from hbt_fast.data.plan import BatchPlan
    from hbt_fast.data.store import Store
    from hbt_fast.engine.runlog import RunLog


class DivergedError(UserError):
    """Too many steps in a row without a finite gradient, or an update that made a weight NaN or infinite."""


class SkippedSteps:
    """Counts skipped steps and writes their batches to bad-batches.jsonl.

    Args:
        log: of the run.
        store: what the batches' source and row numbers refer to.
        most: so many in a row end the run.

    Raises:
        SettingError: most is below 1.
    """

    def __init__(self, log: RunLog, store: Store, most: int) -> None:
        if most < 1:
            raise SettingError(f"train.max_skipped_steps is {most}; write 1 to stop at the first, or more")
        self.log, self.store, self.most, self.in_a_row = log, store, most, 0

    def taken(self) -> None:
        """A step had a finite gradient."""
        self.in_a_row = 0

    def skipped(self, plan: BatchPlan, why: str) -> None:
        """The step of this batch made no update.

        Raises:
            DivergedError: it is one too many in a row.
        """
        self.in_a_row += 1
        source = self.store.sources[plan.source].name
        path = self.log.run / "bad-batches.jsonl"
        if self.log.on:
            record = {"step": plan.step, "why": why, "kind": plan.kind, "source": source, "rows": plan.rows.tolist()}
            with writing(path), open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
        self.log.skipped(plan, why)
        if self.in_a_row >= self.most:
            raise DivergedError(
                f"step {plan.step}: {why}; that makes {self.in_a_row} steps in a row without a finite gradient "
                f"(train.max_skipped_steps). Their batches are in {path}. The usual causes are a learning rate or a "
                "temperature that is out of proportion, half precision that overflows, or broken weights"
            )
