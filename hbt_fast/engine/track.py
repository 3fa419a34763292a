"""Run trackers: what metrics.jsonl has also goes to trackio or wandb, where `train.track` asks for it."""

from __future__ import annotations

import importlib
import json
import os
import re
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

from hbt_fast.base.files import write_whole
from hbt_fast.config import Config, dump
from hbt_fast.engine.backends import SettingError

if TYPE_CHECKING:
    from types import ModuleType

PROJECT = "hbt_fast"
TRAINING, EVALUATION, EXPORTED = "training", "evaluation", "exported"  # what a record is of


class Tracker:
    """A run of trackio or wandb. Its name lies in RUN/tracker.json, so that a resumed run goes on in it.

    Args:
        kind: the package, "trackio" or "wandb".
        run: the run folder.
        config: the settings, which the tracker shows.

    Raises:
        SettingError: the package is not installed, or does not start.
    """

    def __init__(self, kind: str, run: Path, config: Config) -> None:
        module = _imported(kind)
        self.path = run / "tracker.json"
        kept = json.loads(self.path.read_text(encoding="utf-8")) if self.path.is_file() else {}
        self.resumed = kept.get("kind") == kind
        if not self.resumed:
            name = re.sub(r"[^\w-]", "-", run.name)
            kept = {"kind": kind, "id": f"{name}-{uuid.uuid4().hex[:8]}", "sent": {}}
        self.kept, self.sent = kept, kept["sent"]
        try:
            self.run = _init(module, kind, kept["id"], run, config)
        except Exception as error:
            offline = "; WANDB_MODE=offline needs no account" if kind == "wandb" else ""
            raise SettingError(
                f"train.track is {kind}, which does not start ({error}){offline}; train.track=none goes without it"
            ) from error
        self._keep()

    def resume(self, logged: dict[str, int]) -> None:
        """An earlier part of the run logged so much, which is not sent a second time.

        Args:
            logged: the last step by group.
        """
        if self.resumed:
            for group, step in logged.items():
                self.sent[group] = max(step, self.sent.get(group, -1))
            self._keep()

    def log(self, group: str, values: dict[str, float], step: int) -> None:
        """Send values of one step, unless the earlier part of the run did.

        Args:
            group: TRAINING, EVALUATION or EXPORTED.
            values: by name.
            step: the number of the step, from 0; of evaluations, the steps done.
        """
        if step > self.sent.get(group, -1):
            self.run.log(values, step=step)

    def finish(self) -> None:
        """The run is over: all that was logged is written, or sent."""
        self.run.finish()

    def _keep(self) -> None:
        write_whole(self.path, json.dumps(self.kept))


def scalars(record: dict) -> dict[str, float]:
    """The numbers of a record of metrics.jsonl by name, those inside another by "outer/inner", without the step."""
    found = {}
    for name, value in record.items():
        if isinstance(value, dict):
            found |= {f"{name}/{inner}": number for inner, number in value.items()}
        elif name != "step" and isinstance(value, int | float):
            found[name] = value
    return found


def _imported(kind: str) -> ModuleType:
    try:
        return importlib.import_module(kind)
    except ImportError as error:
        raise SettingError(
            f'train.track is {kind}, which cannot be imported ({error}); pip install {kind} (or the extra "track"), or '
            "write train.track=none"
        ) from None


def _init(module: ModuleType, kind: str, name: str, run: Path, config: Config) -> object:
    """Begin the tracker's run of this name, or go on in it."""
    import yaml

    settings = {"name": name, "config": yaml.safe_load(dump(config)), "resume": "allow"}
    if kind == "wandb":
        project = os.environ.get("WANDB_PROJECT", PROJECT)
        return module.init(project=project, id=name, dir=str(run), **settings)
    # it would watch the machine from threads of its own
    return module.init(project=PROJECT, embed=False, auto_log_cpu=False, auto_log_gpu=False, **settings)
