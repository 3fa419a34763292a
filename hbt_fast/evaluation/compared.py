"""What `compare` is given: result files and run folders, with the values of every query where they are there."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hbt_fast.evaluation.bitext_report import BitextResults, averaged_directions
from hbt_fast.evaluation.compare import CONSTANT, CompareError, Comparison, Measured
from hbt_fast.evaluation.made import QUESTIONS
from hbt_fast.evaluation.queries import PerQuery
from hbt_fast.evaluation.results import NAMES, Results
from hbt_fast.evaluation.tables import nanmean

EXACT = ("mo", "mul", "rank_distance", "ndcg@10", "mrr@10")  # whose means of queries are the result file's figures
PAIRED = ("cr", "accuracy")  # that a result file averages over language pairs


@dataclass(frozen=True, eq=False)
class Run:
    """One of the runs to compare.

    Attributes:
        name: in tables and plots.
        file: its result file.
        folder: of the training run, which may have a metrics.jsonl; None for a result file.
        task: name of the task.
        languages: L, sorted; of bitext, directions "source>target".
        queries: number of them.
        candidates: number of them; 0 for bitext.
        figures: of the result file, (1 + L,) by measure: overall, then by language.
        pairs: names of rows and columns and the values by language pair, rows by columns; None where there are none.
        values: of every query; None if they were not written.
        groups: languages by the name of their group, as the result file has them.
        settings: how it was made: prompts, and what else the result file has of encoder, search and data.
    """

    name: str
    file: Path
    folder: Path | None
    task: str
    languages: list[str]
    queries: int
    candidates: int
    figures: dict[str, np.ndarray]
    pairs: tuple[list[str], list[str], np.ndarray] | None
    values: PerQuery | None
    groups: dict[str, list[str]]
    settings: dict[str, str | int]


def read_runs(arguments: Sequence[str]) -> list[Run]:
    """The runs that a command line names.

    Args:
        arguments: each a result file, the folder of a training run, or NAME=PATH of either.

    Raises:
        CompareError: a path is neither, runs are of different tasks or languages, or two have one name.
    """
    paths, names = zip(*map(_named, arguments), strict=True)
    if len(arguments) < 2:
        hint = f"; its own beginning, for one: {paths[0] / 'evaluation-before.json'}" if paths[0].is_dir() else ""
        raise CompareError(f"one run, {paths[0]}: name another to compare it with{hint}")
    runs = [_read(path, name) for path, name in zip(paths, _distinct(paths, names), strict=True)]
    for run in runs[1:]:
        _same_task(runs[0], run)
    return runs


def groups_of(runs: Sequence[Run], given: Mapping[str, Sequence[str]] | None = None) -> dict[str, list[str]]:
    """The groups that means are compared of: languages; of bitext, directions into and out of English, and within (of
    very many directions, source languages).

    Args:
        runs: R.
        given: languages by the name of their group; None: as the first run was evaluated.

    Raises:
        CompareError: a group has a language that the runs have not.
    """
    first = runs[0]
    groups = {name: list(members) for name, members in (first.groups if given is None else given).items()}
    directions = [language.partition(">")[::2] for language in first.languages]
    there = sorted({code for pair in directions for code in pair if code})
    for name, members in groups.items():
        if unknown := sorted(set(members) - set(there)):
            raise CompareError(f"group {name!r}: no language {', '.join(unknown)}; there are {', '.join(there)}")
    if not directions[0][1]:
        return groups
    if all(run.values is not None and set(run.values.languages) <= {f"{code}>*" for code in there} for run in runs):
        # So many directions that values are kept by source.
        return {f"{name}: as source": [f"{code}>*" for code in members] for name, members in groups.items()}
    masks = averaged_directions(*zip(*directions, strict=True), groups)
    named = {name: [first.languages[i] for i in np.flatnonzero(mask)] for name, mask in masks.items()}
    return {name: members for name, members in named.items() if members and name != "all directions"}


def figures_only(runs: Sequence[Run], groups: Mapping[str, Sequence[str]] | None = None) -> Comparison:
    """The figures of result files without intervals and tests, as a `Comparison` of 0 resamples.

    Args:
        runs: R.
        groups: languages by the name of their group, to give means of too.
    """
    first, groups = runs[0], {name: list(members) for name, members in (groups or {}).items()}
    rows = [[1 + first.languages.index(code) for code in members] for members in groups.values()]
    shared = [name for name in first.figures if all(name in run.figures for run in runs)]
    measures = {}
    for name in shared:
        values_RG = np.stack([run.figures[name] for run in runs])
        means_RK = [np.array([nanmean(values[row]) for values in values_RG]) for row in rows]
        measures[name] = _untested(np.column_stack([values_RG[:, 0], *means_RK, values_RG[:, 1:]]))
    return Comparison(
        first.task, [run.name for run in runs], first.languages, first.queries, 0, 0, 0, 0.95, 0, measures, groups
    )  # fmt: skip


def other_settings(runs: Sequence[Run]) -> list[str]:
    """A remark for everything in which runs were evaluated differently: a difference may be its doing.

    Args:
        runs: R.
    """
    remarks = []
    names = [name for name in dict.fromkeys(name for run in runs for name in run.settings) if name != QUESTIONS]
    for name in names:
        said = {run.name: run.settings[name] for run in runs if name in run.settings}
        if len(set(said.values())) > 1:
            shown = (f"{run} {value!r}" if name.endswith("prompt") else f"{run} {value}" for run, value in said.items())
            remarks.append(f"Evaluated with another {name}: {', '.join(shown)}.")
    for run in runs:
        if lacking := [name for name in names or ("settings and data",) if name not in run.settings]:
            remarks.append(
                f"{run.name} does not record its {', '.join(lacking)} (an earlier version): it may be another."
            )
    return remarks


def check_values(runs: Sequence[Run], comparison: Comparison) -> list[str]:
    """That every run's values of queries belong to its result file; returns remarks for the reader.

    Args:
        runs: with values.
        comparison: of those.

    Raises:
        CompareError: they do not: one of the two files is of another evaluation.
    """
    remarks = []
    for number, run in enumerate(runs):
        for measure in (*EXACT, *PAIRED):
            if measure not in comparison.measures or measure not in run.figures:
                continue
            stated, ours = run.figures[measure][0], comparison.measures[measure].values[number, 0]
            if math.isclose(stated, ours, rel_tol=1e-6, abs_tol=1e-9):
                continue
            if measure in EXACT:
                raise CompareError(
                    f"{run.file} says {measure} {stated:.6g}, but {_values_of(run.file).name} beside it has a mean of "
                    f"{ours:.6g}: they are of two evaluations. Evaluate anew with --out {run.file}"
                )
            remarks.append(
                f"{run.name}: {NAMES.get(measure, measure)} is {stated:.4f} as its result file averages, over language "
                "pairs. Here it is averaged question by question, in groups too, and pairs need not weigh alike then."
            )
    return remarks


def without_values(runs: Sequence[Run]) -> str:
    """What is missing for tests, as a sentence; empty if nothing is.

    Args:
        runs: as read.
    """
    lacking = [run for run in runs if run.values is None]
    if not lacking:
        return ""
    files, be = ", ".join(str(_values_of(run.file)) for run in lacking), "is" if len(lacking) == 1 else "are"
    return (
        f"tests and intervals need the values of every query: {files} {be} not there. "
        "hbt_fast.evaluate --out FILE.json writes them beside FILE.json: evaluate anew"
    )


def _named(argument: str) -> tuple[Path, str | None]:
    name, equals, path = argument.partition("=")
    if not equals or Path(argument).exists():
        return Path(argument), None
    if not name or not path:
        raise CompareError(f"{argument!r}: write NAME=PATH, or PATH alone")
    return Path(path), name


def _distinct(paths: Sequence[Path], given: Sequence[str | None]) -> list[str]:
    """A name for every run: the given one, or as much of the end of its path as tells it from the others."""
    parts = [_parts(path) for path in paths]
    depth = 1
    while True:
        names = [name or "/".join(p[-depth:]) for name, p in zip(given, parts, strict=True)]
        if len(set(names)) == len(names):
            return names
        if depth >= max(map(len, parts)):
            twice = next(name for name in names if names.count(name) > 1)
            raise CompareError(f"two runs are called {twice!r}: name them apart, NAME=PATH")
        depth += 1


def _parts(path: Path) -> tuple[str, ...]:
    """Of a/run/evaluation.json and a/run: a, run; of a/file.json: a, file."""
    path = path.absolute()
    if path.name == "evaluation.json":
        return path.parent.parts
    return path.parts if path.is_dir() else path.with_suffix("").parts


def _read(path: Path, name: str) -> Run:
    folder, file = (path, path / "evaluation.json") if path.is_dir() else (None, path)
    if not file.is_file():
        what = "no evaluation.json in it; the run did not end, or eval.task was none" if folder else "no such file"
        raise CompareError(f"{path}: {what}. A run is a FILE.json of hbt_fast.evaluate or a folder of hbt_fast.train")
    try:
        text = file.read_text(encoding="utf-8")
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CompareError(f"{file}: not a result file of hbt_fast.evaluate, not even JSON ({error})") from error
    if not isinstance(content, dict) or not isinstance(content.get("task"), str):
        raise CompareError(f'{file}: not a result file of hbt_fast.evaluate; those name a "task"')
    try:
        about = _of_bitext(text) if "sources" in content else _of_retrieval(text)
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        raise CompareError(f"{file}: not a whole result file of hbt_fast.evaluate ({error})") from error
    try:
        values = PerQuery.read(_values_of(file)) if _values_of(file).is_file() else None
    except ValueError as error:  # names the file
        raise CompareError(str(error)) from error
    if values is not None and values.task != content["task"]:
        raise CompareError(f"{file} is of {content['task']!r}, {_values_of(file)} of {values.task!r}: evaluate anew")
    return Run(name, file, folder, content["task"], **about, values=values)


def _of_retrieval(text: str) -> dict[str, Any]:
    results = Results.from_json(text)
    paper = {name: getattr(results, name) for name in ("mo", "cr", "mul", "rank_distance")}
    cutoffs = results.cutoffs.get("own") or results.cutoffs.get("re-ranking") or {}
    overall = {**paper, **cutoffs, **results.bias}
    nothing = [math.nan] * len(results.languages)
    figures = {
        name: np.array([value, *(results.of_language(name) or nothing)], dtype=np.float64)
        for name, value in overall.items()
        if math.isfinite(value) and name not in CONSTANT
    }
    pairs = None
    if math.isfinite(results.cr):
        whole = np.column_stack([np.array(results.matrix, np.float64), np.array(results.mul_by_language, np.float64)])
        pairs = (results.languages, [*results.languages, "all"], whole)
    return {
        "languages": results.languages, "queries": results.queries, "candidates": results.candidates,
        "figures": figures, "pairs": pairs, "groups": results.group_languages, "settings": _made(results),
    }  # fmt: skip


def _of_bitext(text: str) -> dict[str, Any]:
    results = BitextResults.from_json(text)
    directions = [f"{source}>{target}" for source, target in zip(results.sources, results.targets, strict=True)]
    order = sorted(range(len(directions)), key=directions.__getitem__)
    overall = results.means["all directions"]
    return {
        "languages": [directions[i] for i in order], "queries": sum(results.sentences), "candidates": 0,
        "figures": {name: np.array([overall[name], *np.array(of)[order]]) for name, of in results.measures.items()},
        "pairs": (results.languages, results.languages, results.matrix()), "groups": results.groups,
        "settings": _made(results),
    }  # fmt: skip


def _made(results: Results | BitextResults) -> dict[str, str | int]:
    return {**{f"{kind} prompt": text for kind, text in results.prompts.items()}, **results.settings}


def _values_of(file: Path) -> Path:
    return file.with_suffix(".queries.npz")


def _same_task(first: Run, run: Run) -> None:
    if first.task != run.task:
        raise CompareError(f"different tasks: {first.file} is of {first.task!r}, {run.file} of {run.task!r}")
    for what, a, b in (
        ("languages", first.languages, run.languages),
        ("numbers of queries", first.queries, run.queries),
        ("numbers of candidates", first.candidates, run.candidates),
    ):
        if a != b:
            raise CompareError(f"different {what}: {first.file} has {_said(a)}, {run.file} {_said(b)}")
    asked = {run.settings[QUESTIONS] for run in (first, run) if QUESTIONS in run.settings}
    if len(asked) > 1:
        raise CompareError(
            f"different questions: {first.file} and {run.file} are of one task, {first.task!r}, but its questions were "
            "others; evaluate both anew on the same data"
        )


def _said(value: list[str] | int) -> str:
    return f"{value:,}" if isinstance(value, int) else ", ".join(value)


def _untested(values: np.ndarray) -> Measured:
    differences = values[1:] - values[:1]
    nothing = np.full_like(differences, np.nan)
    return Measured(
        values, np.full((*values.shape, 2), np.nan), differences, np.full((*differences.shape, 2), np.nan),
        nothing, nothing,
    )  # fmt: skip
