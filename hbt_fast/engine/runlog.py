"""What a run says and leaves behind: log lines, metrics.jsonl, TensorBoard events, the loss curve, the report."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from hbt_fast.base.files import replacing, write_whole, writing
from hbt_fast.config import Config, dump
from hbt_fast.data.counts import DrawCounts
from hbt_fast.data.plan import BatchPlan, BatchPlanner
from hbt_fast.engine.launch import World
from hbt_fast.engine.machine import describe
from hbt_fast.engine.memory import GIB, used_bytes
from hbt_fast.engine.metrics import AFTER, DURING, read_metrics, read_records
from hbt_fast.engine.progress import log_line, negatives_per_query, phase_shares, tokens_of_all
from hbt_fast.engine.run_folder import RunFolder
from hbt_fast.engine.track import EVALUATION, EXPORTED, TRAINING, Tracker, scalars

if TYPE_CHECKING:
    from hbt_fast.data.feed import RankBatch
    from hbt_fast.engine.step import StepResult
    from hbt_fast.evaluation.metrics import Results

METRICS = ("mo", "cr", "mul", "rank_distance", "ndcg@10", "recall@100", "mrr@10")


class RunLog:
    """The log of one run; only rank 0 prints and writes. Leaving it as a context lets go of the run folder.

    Args:
        run: the run folder. Until `open` nothing is written to it.
        config: the settings.
        world: whose rank decides who speaks.

    Raises:
        SettingError: another process trains in the folder, or it is no run's.
    """

    def __init__(self, run: Path, config: Config, world: World) -> None:
        self.run, self.config, self.world, self.on = run, config, world, world.first
        self.settings = config.train
        self.writer = self.tracker = None
        self.folder = RunFolder(run, config.train.resume) if self.on else None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.folder is not None:
            self.folder.release()

    def open(self) -> None:
        """Make the run folder, now that settings, data and model are known to be good. An earlier run in it is moved
        aside unless this one resumes it.

        Raises:
            SettingError: the tracker that train.track names is not there.
            FileError: the folder cannot be written to.
        """
        if not self.on:
            return
        if aside := self.folder.take():
            self.say(f"the earlier run in {self.run} is now {aside} (train.resume=true would have gone on with it)")
        if self.settings.track != "none":
            self.tracker = Tracker(self.settings.track, self.run, self.config)

    def say(self, line: str) -> None:
        """Print a line at once."""
        if self.on:
            print(line, flush=True)

    def write(self, name: str, content: object) -> None:
        """Write a file of JSON in the run folder."""
        if self.on:
            write_whole(self.run / name, json.dumps(content, indent=1, ensure_ascii=False))

    def start(self, first: int, planner: BatchPlanner) -> None:
        """Training begins at step `first`: write the resolved settings, drop what a dead run logged from there on."""
        self.counts = DrawCounts(planner.store)
        self.first, self.done, self.began = first, first, time.perf_counter()
        self.recent: list[dict] = []
        if self.on:
            self.writer = Scalars(self.run / "tensorboard", first)
            write_whole(self.run / "config.yaml", dump(self.config))
            self.write("environment.json", describe(self.world))
            if self.tracker:
                self.tracker.resume(_last_steps(read_records(self.run / "metrics.jsonl")))
            counted = self._drop_records_from(first)
            if counted:
                self.counts.restore(counted)
            for step in range(counted["drawn_until"] if counted else 0, first):
                self.counts.add(planner.plan(step))

    def _drop_records_from(self, first: int) -> dict | None:
        """Leave in metrics.jsonl what was logged before step `first`; returns the last record of what was drawn."""
        path, counted = self.run / "metrics.jsonl", None
        with replacing(path) as begun, open(begun, "w", encoding="utf-8") as file:
            for record in read_records(path):
                if _is_before(record, first):
                    file.write(json.dumps(record, ensure_ascii=False) + "\n")
                    counted = record if "drawn_until" in record else counted
        return counted

    def step(self, batch: RankBatch, result: StepResult, *, rate: float, seconds: float, waited: float) -> None:
        """One step is done: a line in metrics.jsonl, every `log_every` steps a line for people."""
        if not self.on:
            return
        plan = batch.plan
        source = self.counts.store.sources[plan.source]
        record = {
            "step": plan.step,
            "kind": plan.kind,
            "source": source.name,
            "loss": result.loss,
            "accuracy": result.accuracy,
            "gradient_norm": result.norm,
            "learning_rate": rate,
            "negatives": negatives_per_query(plan),
            "tokens": tokens_of_all(batch, source),
            "seconds": round(seconds, 4),
            "waited": round(waited, 4),
            "phases": {name: round(took, 4) for name, took in result.seconds.items()},
            "kept": round(result.kept, 3),
            "memory_gib": round(used_bytes(self.world.device) / GIB, 3),
        }
        if self.config.loss.learn_temperature:
            record["temperature"] = result.temperature
        if self.settings.micro_batch_tokens == "auto":
            record["micro_batch_tokens"] = result.micro_batch_tokens
        self.counts.add(plan)
        self._append(record)
        for name in ("loss", "accuracy", "gradient_norm", "learning_rate"):
            self.writer.add_scalar(name, record[name], plan.step)
        self.writer.add_scalar(f"loss/{plan.kind}", result.loss, plan.step)
        if self.tracker:
            self.tracker.log(TRAINING, {**scalars(record), f"loss/{plan.kind}": result.loss}, plan.step)
        self.recent.append(record)
        self._report(plan)

    def skipped(self, plan: BatchPlan, why: str) -> None:
        """A step made no update: a line in metrics.jsonl and one for people."""
        if not self.on:
            return
        self.counts.add(plan)
        source = self.counts.store.sources[plan.source].name
        self._append({"step": plan.step, "kind": plan.kind, "source": source, "skipped": why})
        if self.tracker:
            self.tracker.log(TRAINING, {"skipped": 1}, plan.step)
        self.say(f"step {plan.step} is skipped, weights stay as they were: {why}")
        self._report(plan)

    def _report(self, plan: BatchPlan) -> None:
        """Every `log_every` steps a line for people (if any had an update) and what was drawn so far."""
        self.done, total = plan.step + 1, self.settings.steps
        if self.done % self.settings.log_every and self.done != total:
            return
        if self.recent:
            left = (time.perf_counter() - self.began) / (self.done - self.first) * (total - self.done)
            self.say(log_line(self.recent, pairs=len(plan.rows), done=self.done, total=total, left=left))
            for name, value in self._rates(len(plan.rows)).items():
                self.writer.add_scalar(name, value, plan.step)
            self.recent.clear()
        self._append({"drawn_until": self.done, **self.counts.record()})

    def _rates(self, pairs: int) -> dict[str, float]:
        """Throughput, memory and shares of time since the last log line, for TensorBoard."""
        seconds = max(sum(record["seconds"] for record in self.recent), 1e-9)
        return {
            "throughput/pairs_per_second": pairs * len(self.recent) / seconds,
            "throughput/tokens_per_second": sum(record["tokens"] for record in self.recent) / seconds,
            "memory_gib": self.recent[-1]["memory_gib"],
            **{f"share of time/{name}": share for name, share in phase_shares(self.recent).items()},
        }

    def evaluation(self, when: str, results: Results, step: int | None = None) -> None:
        """An evaluation was made, of the weights after `step` steps: a line in metrics.jsonl."""
        if not self.on:
            return
        values = {name: results.value(name) for name in METRICS}
        values = {name: None if math.isnan(value) else value for name, value in values.items()}
        seconds = round(sum(results.seconds.values()), 2)
        at = {} if step is None else {"step": step}
        self._append({"evaluation": when, **at, "task": results.task, **values, "seconds": seconds})
        values = {name: value for name, value in values.items() if value is not None}
        if when == DURING:
            for name, value in values.items():
                self.writer.add_scalar(f"evaluation/{name}", value, step)
        if self.tracker:
            group, at = (EXPORTED, self.done) if when == AFTER else (EVALUATION, step or 0)
            self.tracker.log(group, {f"{group}/{name}": value for name, value in values.items()}, at)

    def ended_early(self, why: str, done: int) -> None:
        """Training ends after so many steps, before the last one."""
        self.say(f"training ends after {done} of {self.settings.steps} steps: {why}")
        if self.on:
            self._append({"ended_early": why, "after": done})

    def _append(self, record: dict) -> None:
        path = self.run / "metrics.jsonl"
        with writing(path, "make room, and go on with train.resume=true"), open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")

    def finish(self, written: dict[str, Path]) -> None:
        """Draw the loss curve, write the report and say what was written where."""
        from hbt_fast.run_page import write_page

        if self.writer is not None:
            self.writer.close()
        if self.tracker is not None:
            self.tracker.finish()
        if curve := draw_loss(self.run):
            pairs, total = self.run / "language-pairs.png", int(self.counts.pairs.sum())
            self.counts.draw(pairs, f"language pairs of {total:,} training pairs")
            written = {**written, "loss curve": curve, "language pairs": pairs}
        written = {"report": write_page(self.run), **written}
        written = {**written, "metrics": self.run / "metrics.jsonl", "TensorBoard": self.run / "tensorboard"}
        width = max(map(len, written))
        self.say("\n" + "\n".join(f"{name:<{width}}  {path}" for name, path in written.items()))


class Scalars:
    """TensorBoard's event files of a run.

    Args:
        folder: where they go.
        first: the step that training begins with; what an earlier part of the run wrote from there on is hidden.
    """

    def __init__(self, folder: Path, first: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.folder = folder
        with self._writing():
            self.writer = SummaryWriter(str(folder), purge_step=first)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        """Write a number; a thread of TensorBoard's does so, and its error comes with a later number."""
        with self._writing():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what is not written yet."""
        with self._writing():
            self.writer.close()

    def _writing(self) -> AbstractContextManager:
        return writing(self.folder, "make room, and go on with train.resume=true")


def _is_before(record: dict, first: int) -> bool:
    """Whether a record of metrics.jsonl stays when a run goes on from step `first`."""
    if "ended_early" in record or record.get("evaluation") == AFTER:
        return False
    if record.get("evaluation") == DURING:
        return record["step"] <= first  # steps done by then; others have the number of the step, from 0
    return record.get("step", -1) < first and record.get("drawn_until", 0) <= first


def _last_steps(written: Iterable[dict]) -> dict[str, int]:
    """The last step of every group of records, as the tracker numbers them."""
    last = {}
    for record in written:
        if "evaluation" in record:
            after = record["evaluation"] == AFTER
            group, step = (EXPORTED, last.get(TRAINING, -1) + 1) if after else (EVALUATION, record.get("step", 0))
        elif "step" in record:
            group, step = TRAINING, record["step"]
        else:
            continue
        last[group] = max(step, last.get(group, -1))
    return last


def draw_loss(run: Path) -> Path | None:
    """The loss of every step by kind of batch, and its running mean, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    steps = read_metrics(run / "metrics.jsonl").steps
    if not len(steps):
        return None
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for kind in sorted(steps.kinds):
        of_kind = steps.of_kind(kind)
        x, y = steps.step[of_kind], steps["loss"][of_kind]
        (line,) = axes.plot(x, y, ".", markersize=3, alpha=0.3)
        window = max(len(y) // 25, 1)
        if len(y) >= 2 * window:
            smooth = np.convolve(y, np.ones(window) / window, "valid")
            axes.plot(x[window - 1 :], smooth, color=line.get_color(), label=f"{kind}, mean of {window}")
        else:
            line.set_label(kind)
    axes.set(xlabel="step", ylabel="InfoNCE loss")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    path = run / "loss.png"
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path
