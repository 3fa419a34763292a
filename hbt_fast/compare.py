"""Compare runs: ``python -m hbt_fast.compare RUN_A RUN_B ... [--out DIR]``.

A run is a FILE.json that hbt_fast.evaluate --out wrote, or the folder of a training run. Prints one table with
intervals, differences to the first run and tests over questions; with --out writes it as Markdown, JSON and LaTeX,
with plots.

    python -m hbt_fast.compare before.json after.json
    python -m hbt_fast.compare mono=runs/mono cross=runs/cross hybrid=runs/hybrid --out runs/comparison
    python -m hbt_fast.compare runs/demo/evaluation-before.json runs/demo
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hbt_fast.base.programs import program

if TYPE_CHECKING:
    from hbt_fast.evaluation.compare_plots import Curve


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line as a namespace; exits with 2 and a message where it is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m hbt_fast.compare",
        description="Compare evaluated runs: paired tests over questions, intervals, tables, plots.",
    )
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="FILE.json of hbt_fast.evaluate, a run folder, or NAME=PATH of either"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="write table.md, table.json, table.tex and plots here")
    groups = 'compare means over groups of languages: "low=sw,yo;high=en,de", or a YAML or JSON file of such lists; '
    parser.add_argument("--groups", help=groups + "default: those that the first run was evaluated with")
    parser.add_argument("--resamples", type=int, default=10_000, metavar="N", help="of the questions (10,000)")
    parser.add_argument("--level", type=float, default=0.95, metavar="P", help="of the intervals (0.95)")
    parser.add_argument("--seed", type=int, default=0, help="of the resamples (0)")
    args = parser.parse_args(argv)
    if args.resamples < 100:
        parser.error(f"--resamples {args.resamples}: at least 100, for p-values and intervals to mean something")
    if not 0.5 <= args.level < 1:
        parser.error(f"--level {args.level}: from 0.5 to below 1, such as 0.95")
    if args.seed < 0:
        parser.error(f"--seed {args.seed}: 0 or more")
    if args.out is not None and args.out.exists() and not args.out.is_dir():
        parser.error(f"--out {args.out}: a folder is needed, and this is a file")
    return args


@program("hbt_fast.compare")
def main(argv: Sequence[str] | None = None) -> None:
    """Compare from the command line.

    Without the values of every query the figures are shown all the same, and the status is 2.
    """
    args = parse(argv)
    from hbt_fast.evaluation.compare import CompareError, compare_runs
    from hbt_fast.evaluation.compare_report import to_markdown
    from hbt_fast.evaluation.compared import (
        check_values,
        figures_only,
        groups_of,
        other_settings,
        read_runs,
        without_values,
    )
    from hbt_fast.evaluation.load import parse_groups

    runs = read_runs(args.runs)
    groups = groups_of(runs, parse_groups(args.groups) if args.groups else None)
    missing = without_values(runs)
    if missing:
        comparison, remarks = figures_only(runs, groups), [f"Figures only: {missing}."]
    else:
        names, values = [run.name for run in runs], [run.values for run in runs]
        options = {"resamples": args.resamples, "level": args.level, "seed": args.seed, "groups": groups}
        comparison = compare_runs(names, values, **options)
        remarks = check_values(runs, comparison)
    remarks += other_settings(runs)
    print(to_markdown(comparison, remarks))
    if args.out:
        print("wrote " + ", ".join(map(str, write(args.out, comparison, runs, remarks))))
    if missing:
        raise CompareError(missing)


def write(folder: Path, comparison, runs: Sequence, remarks: Sequence[str]) -> list[Path]:  # noqa: ANN001
    """Writes the tables and the plots; returns their paths.

    Args:
        folder: made if need be.
        comparison: a `Comparison`.
        runs: its `Run`s.
        remarks: lines for the reader.
    """
    from hbt_fast.evaluation.compare_plots import draw_all
    from hbt_fast.evaluation.compare_report import to_json, to_latex, to_markdown

    folder.mkdir(parents=True, exist_ok=True)
    texts = {
        "table.json": to_json(comparison, [str(run.file) for run in runs], remarks),
        "table.tex": to_latex(comparison),
        "table.md": to_markdown(comparison, remarks),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        plots = draw_all(comparison, runs, [learning_curve(run.folder) for run in runs], folder)
    for text in dict.fromkeys(str(warning.message) for warning in caught):
        print(f"warning: {text}", file=sys.stderr)
    with open(folder / "table.md", "a", encoding="utf-8") as page:
        page.write("".join(f"\n![{plot.stem}]({plot.name})\n" for plot in plots))
    return [*(folder / name for name in texts), *plots]


def learning_curve(folder: Path | None) -> Curve:
    """The evaluations of a training run: (steps done, measures) in order, by task.

    The first is the task during training. With eval.queries that is a smaller one than before and after training, whose
    figures compare with each other only. The last evaluation is at the step of the weights that were exported.

    Args:
        folder: of the run, which may have a metrics.jsonl; None: no training run.
    """
    if folder is None:
        return {}
    from hbt_fast.engine.metrics import BEFORE, DURING, read_metrics
    from hbt_fast.engine.runlog import METRICS

    metrics = read_metrics(folder / "metrics.jsonl")
    found: dict[str, dict[int, dict[str, float]]] = {}
    for record in sorted(metrics.evaluations, key=lambda record: record["evaluation"] != DURING):
        at = record.get("step", 0 if record["evaluation"] == BEFORE else metrics.done)
        values = {name: record[name] for name in METRICS if record.get(name) is not None}
        found.setdefault(record.get("task", ""), {}).setdefault(at, values)
    return {task: sorted(points.items()) for task, points in found.items()}


if __name__ == "__main__":
    main()
