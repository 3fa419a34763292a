"""RUN/report.html: a run on one page, from what its folder holds. The file needs no network and no other file."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np
import yaml

from hbt_fast.base.files import write_whole
from hbt_fast.charts import Line, heat_table, line_chart, stacked_chart
from hbt_fast.data.rows import DataError
from hbt_fast.engine.metrics import AFTER, BEFORE, DURING, Metrics, Steps, read_metrics
from hbt_fast.engine.progress import OTHER, PHASES, clock, shares
from hbt_fast.engine.runlog import METRICS
from hbt_fast.evaluation.queries import LOWER_IS_BETTER
from hbt_fast.evaluation.results import NAMES, Results
from hbt_fast.overview import in_words
from hbt_fast.page_style import STYLE

SKIPPED = 20  # that are listed


@dataclass(frozen=True)
class _Run:
    """What a run folder holds.

    Attributes:
        name: of the folder.
        yaml: the settings as they were written.
        settings: the same, read.
        metrics: of metrics.jsonl.
        before, after: evaluations.
        machine: versions and hardware.
        overview: what there was to learn from; see `hbt_fast.overview`.
    """

    name: str
    yaml: str
    settings: dict
    metrics: Metrics
    before: Results | None
    after: Results | None
    machine: dict[str, str]
    overview: dict

    @property
    def steps(self) -> Steps:
        """The steps with an update."""
        return self.metrics.steps

    def setting(self, name: str) -> object:
        """A setting by its dotted name; None where the run's version of hbt_fast had none."""
        group, _, key = name.partition(".")
        return self.settings.get(group, {}).get(key)


def write_page(run: Path) -> Path:
    """Write RUN/report.html, of a run that is finished, was stopped or goes on.

    Args:
        run: its folder.

    Raises:
        DataError: the folder is not that of a run, or a file in it is damaged.
    """
    found = _read(Path(run))
    sections = [
        ("headline", "Evaluation", _headline),
        ("loss", "Loss", _loss),
        ("accuracy", "In-batch accuracy", _accuracy),
        ("during", "Evaluations during training", _during),
        ("maps", "mAP by language pair", _maps),
        ("drawn", "Language pairs that were drawn", _drawn),
        ("phases", "Where the time went", _phases),
        ("throughput", "Throughput", _throughput),
        ("memory", "Memory", _memory),
        ("troubles", "Skipped steps and early end", _troubles),
        ("data", "Data, as the model saw it", _data),
        ("settings", "Settings", _settings),
        ("machine", "Versions and hardware", _machine),
    ]
    body = [_top(found)]
    for name, title, made in sections:
        if content := made(found):
            body.append(f'<section id="{name}"><h2>{title}</h2>\n{content}\n</section>')
    page, path = "\n".join(body), Path(run) / "report.html"
    write_whole(
        path,
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(found.name)}: hbt_fast</title>\n<style>\n{STYLE}\n</style>\n</head>\n"
        f"<body><main>\n{page}\n</main></body>\n</html>\n",
    )
    return path


def _read(run: Path) -> _Run:
    wanted = "name the folder that train.run_dir named"
    if not (run / "config.yaml").is_file() or not (run / "metrics.jsonl").is_file():
        raise DataError(f"{run} is no run folder: config.yaml and metrics.jsonl are not both there; {wanted}")
    metrics = read_metrics(run / "metrics.jsonl")
    finished = any(
        r["evaluation"] == AFTER for r in metrics.evaluations
    )  # else its file is of a run that went on since
    text = (run / "config.yaml").read_text(encoding="utf-8")
    try:
        settings = yaml.safe_load(text)
        before = _optional(run / "evaluation-before.json", Results.from_json)
        after = _optional(run / "evaluation.json", Results.from_json) if finished else None
        machine = _optional(run / "environment.json", json.loads) or {}
        overview = _optional(run / "overview.json", json.loads) or {}
    except (ValueError, yaml.YAMLError) as error:
        raise DataError(f"{run}: a damaged file of the run folder: {error}") from None
    if not isinstance(settings, dict):
        raise DataError(f"{run / 'config.yaml'}: these are no settings of a run")
    return _Run(run.resolve().name, text, settings, metrics, before, after, machine, overview)


def _optional(path: Path, read: Callable[[str], object]) -> object:
    return read(path.read_text(encoding="utf-8")) if path.is_file() else None


def _top(run: _Run) -> str:
    """Title, state, and the figures that one looks for first."""
    total = run.setting("train.steps")
    model = run.setting("model.path") or "an encoder from nothing"
    names = [source.get("name") or source.get("path") or source.get("format", "") for source in _sources(run)]
    about = f"{run.setting('batch.strategy')} batches of {run.setting('batch.size')} pairs from {', '.join(names)}"
    done = run.metrics.done
    state, stopped = f"finished: {done:,} of {total:,} steps", ""
    if run.metrics.ended_early:
        state = f"ended early: {done:,} of {total:,} steps"
    elif done < total:
        state, stopped = f"not finished: {done:,} of {total:,} steps are done", " stopped"
    facts = []
    if len(steps := run.steps):
        last = slice(-max(len(steps) // 20, 1), None)
        seconds = float(np.median(steps["seconds"]))
        facts = [
            ("loss, last 5% of the steps", f"{np.mean(steps['loss'][last], dtype=float):.4f}"),
            ("in-batch accuracy there", f"{np.mean(steps['accuracy'][last], dtype=float):.3f}"),
            ("pairs per second, median step", f"{run.setting('batch.size') / seconds:,.0f}"),
            ("a step, median", f"{seconds:.3g} s"),
            ("in steps, altogether", clock(steps["seconds"].sum(dtype=float))),
        ]
        if np.isfinite(memory := steps["memory_gib"]).any():
            facts.append(("memory, peak", f"{np.nanmax(memory):.1f} GiB"))
    tiles = "".join(f"<div><b>{escape(value)}</b><span>{escape(name)}</span></div>" for name, value in facts)
    return (
        f"<header><h1>{escape(run.name)}</h1>\n"
        f'<p class="soft">{escape(str(model))}, trained on {escape(about)}</p>\n'
        f'<p class="status{stopped}">{escape(state)}</p>\n<div class="facts">{tiles}</div></header>'
    )


def _sources(run: _Run) -> list[dict]:
    return [source for source in run.setting("data.sources") or [] if isinstance(source, dict)]


def _headline(run: _Run) -> str:
    """Before and after, as a table."""
    rows = [(name, r) for name, r in (("before", run.before), ("after", run.after)) if r is not None]
    if not rows:
        return '<p class="soft">No evaluation was made before or after training.</p>'
    keys = _keys(rows[-1][1].parallel)
    body = [[name, *(_metric(key, r.value(key)) for key in keys)] for name, r in rows]
    if len(rows) == 2:
        change = [run.after.value(key) - run.before.value(key) for key in keys]
        body.append(["change", *(_metric(key, value, "+") for key, value in zip(keys, change, strict=True))])
    task = rows[-1][1]
    what = f"{task.task}: {task.queries:,} queries, {task.candidates:,} candidates, {len(task.languages)} languages."
    missing = "" if run.after else '<p class="soft">There is no evaluation after training (yet).</p>'
    meaning = "In the pool of the question's language."
    if rows[-1][1].parallel:
        meaning = (
            "mAP where question and pool are in one language (Mo), the pool is in one other language (Cr), in all "
            "languages (Mul); rank distance: how far apart the parallel answers of a question stand in that pool."
        )
    table = _table(["", *(NAMES[key] for key in keys)], body)
    return f'{table}{missing}<p class="soft">{escape(what)} {meaning}</p>'


def _keys(parallel: bool) -> tuple[str, ...]:
    """What a task is reported by, with parallel answers or without."""
    return METRICS[:4] if parallel else METRICS[4:]


def _metric(name: str, value: float, sign: str = "") -> str:
    if math.isnan(value):
        return "-"
    return format(value, f"{sign},.1f" if name == "rank_distance" else f"{sign}.4f")


def _by_kind(run: _Run, name: str, label: str, *, zero: bool) -> str:
    steps, lines = run.steps, []
    for kind in sorted(steps.kinds):
        of_kind = steps.of_kind(kind)
        lines.append(Line(kind, steps.step[of_kind] + 1, steps[name][of_kind]))
    return line_chart(lines, label, zero=zero) if lines else ""


def _loss(run: _Run) -> str:
    return _by_kind(run, "loss", "InfoNCE loss", zero=True)


def _accuracy(run: _Run) -> str:
    return _by_kind(run, "accuracy", "share of queries", zero=True)


def _during(run: _Run) -> str:
    """Evaluations over the steps, the best of them marked."""
    made = [r for r in run.metrics.evaluations if r["evaluation"] == DURING]
    if not made:
        return ""
    metric = run.setting("eval.metric") or "mul"
    measured = [r for r in made if r.get(metric) is not None]
    keys = _keys(any(r["cr"] is not None or r["rank_distance"] is not None for r in made))
    pick = min if metric in LOWER_IS_BETTER else max
    best = pick(measured, key=lambda r: r[metric])["step"] if measured else None
    before = [{**r, "step": 0} for r in run.metrics.evaluations if r["evaluation"] == BEFORE][-1:]
    start = [r for r in before if r.get("task") == made[0].get("task")]  # eval.queries makes the task a smaller one
    curve = start + made
    lines = [
        Line(NAMES[key], *zip(*((r["step"], r[key]) for r in curve if r.get(key) is not None), strict=True), dots=True)
        for key in keys
        if key not in LOWER_IS_BETTER and any(r.get(key) is not None for r in curve)
    ]
    mark = None if best is None else (best, f"best {NAMES[metric]}: step {best:,}")
    rows = [
        [f"{r['step']:,}{' (best)' if r['step'] == best else ''}",
         *(_metric(key, math.nan if r.get(key) is None else r[key]) for key in keys)]
        for r in curve
    ]  # fmt: skip
    marked = [r["step"] == best for r in curve]
    label = "mAP" if "mul" in keys else "own pool"
    return line_chart(lines, label, mark=mark) + _table(["step", *(NAMES[key] for key in keys)], rows, marked)


def _maps(run: _Run) -> str:
    """mAP by query and passage language, before and after on one scale of colours."""
    panels = [(name, r) for name, r in (("before", run.before), ("after", run.after)) if r is not None]
    cells = [np.column_stack([np.array(r.matrix, float), np.array(r.mul_by_language, float)]) for _, r in panels]
    finite = np.concatenate([c[np.isfinite(c)] for c in cells]) if cells else np.empty(0)
    if not len(finite):
        return ""
    maps = []
    for (name, r), values in zip(panels, cells, strict=True):
        options = {"low": float(finite.min()), "high": float(finite.max()), "corner": "query ↓ passage →"}
        maps.append(f"<div><h3>{name}</h3>{heat_table(r.languages, [*r.languages, 'all'], values, **options)}</div>")
    note = '<p class="soft">Column "all": the pool of all languages.</p>'
    return f'<div class="maps">{"".join(maps)}</div>{note}'


def _drawn(run: _Run) -> str:
    """Language pairs and batches of the steps so far."""
    drawn = run.metrics.drawn
    if drawn is None or not drawn["pairs"]:
        return ""
    pairs = {tuple(name.split(">")): count for name, count in drawn["pairs"].items()}
    total = sum(pairs.values())
    codes = sorted({code for pair in pairs for code in pair})
    values = np.array([[100 * pairs.get((a, b), math.nan) / total for b in codes] for a in codes])
    table = heat_table(
        codes, codes, values, low=0.0, high=float(np.nanmax(values)), corner="query ↓ passage →", form=".1f", unit="%"
    )
    batches = _table(["batches", ""], [[name, f"{count:,}"] for name, count in sorted(drawn["batches"].items())])
    said = f"{total:,} pairs of {drawn['drawn_until']:,} steps; cells in percent of them."
    if drawn["excluded_negatives"]:
        said += f" {drawn['excluded_negatives']:,} hard negatives were passed over: their content was in the batch."
    return f'<p class="soft">{said}</p>{table}<h3>Batches by kind and source</h3>{batches}'


def _phases(run: _Run) -> str:
    """Share of every step's time by phase, and of all steps together."""
    steps, phases = run.steps, run.steps.phases
    if not phases:
        return ""
    by_step = shares(steps["seconds"], steps["waited"], phases)
    totals = (steps[name].sum(dtype=float) for name in ("seconds", "waited"))
    whole = shares(*totals, {name: spent.sum(dtype=float) for name, spent in phases.items()})
    names = (*PHASES, OTHER)
    said = ", ".join(f"{name} {whole[name]:.1%}" for name in names)
    chart = stacked_chart(steps.step + 1, {name: by_step[name] for name in names}, "share of a step's time")
    return chart + f'<p class="soft">All steps: {said}.</p>'


def _throughput(run: _Run) -> str:
    steps = run.steps
    if not len(steps):
        return ""
    seconds, x = np.maximum(steps["seconds"], 1e-9), steps.step + 1
    charts = [
        line_chart([Line("pairs", x, run.setting("batch.size") / seconds)], "pairs per second"),
        line_chart([Line("tokens", x, steps["tokens"] / seconds)], "tokens per second"),
    ]
    return "".join(charts) + '<p class="soft">Of all ranks. Evaluations and checkpoints lie between steps.</p>'


def _memory(run: _Run) -> str:
    memory = run.steps["memory_gib"]
    if not np.isfinite(memory).any():
        return ""
    note = '<p class="soft">The most that rank 0 has held since it began: of its GPU, or of main memory.</p>'
    return line_chart([Line("memory", run.steps.step + 1, memory)], "GiB, peak so far") + note


def _troubles(run: _Run) -> str:
    """Skipped steps, and why training ended early."""
    skipped = run.metrics.skipped
    parts = []
    if ended := run.metrics.ended_early:
        parts.append(f"<p>Training ended after {ended['after']:,} steps: {escape(ended['ended_early'])}.</p>")
    if skipped:
        rows = [[f"{r['step']:,}", r["source"], r["skipped"]] for r in skipped[:SKIPPED]]
        parts.append(_table(["step, from 0", "source", "why it was skipped"], rows, words=True))
    if len(skipped) > SKIPPED:
        parts.append(f"<p>And {len(skipped) - SKIPPED:,} more; bad-batches.jsonl lists all.</p>")
    return "".join(parts)


def _data(run: _Run) -> str:
    """The overview of data, prompts and tokenizer that the log began with."""
    return f"<pre>{escape(in_words(run.overview))}</pre>" if run.overview else ""


def _settings(run: _Run) -> str:
    return f"<details><summary>config.yaml</summary><pre>{escape(run.yaml.strip())}</pre></details>"


def _machine(run: _Run) -> str:
    return _table(["", ""], [[name, value] for name, value in run.machine.items()], words=True) if run.machine else ""


def _table(
    header: Sequence[str], rows: Sequence[Sequence[str]], best: Sequence[bool] = (), *, words: bool = False
) -> str:
    """A table of escaped cells; rows that are `best` stand out."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in header)
    head = f"<thead><tr>{head}</tr></thead>" if any(header) else ""
    body = []
    for number, row in enumerate(rows):
        cells = "".join(f"<td>{escape(str(cell))}</td>" for cell in row)
        marked = ' class="best"' if number < len(best) and best[number] else ""
        body.append(f"<tr{marked}>{cells}</tr>")
    kind = "plain words" if words else "plain"
    return f'<div class="wide"><table class="{kind}">{head}<tbody>{"".join(body)}</tbody></table></div>'
