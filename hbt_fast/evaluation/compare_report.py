"""A comparison as Markdown, JSON and LaTeX."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from hbt_fast.evaluation.compare import Comparison, Measured
from hbt_fast.evaluation.queries import LOWER_IS_BETTER
from hbt_fast.evaluation.results import NAMES
from hbt_fast.evaluation.tables import markdown_table

PARALLEL = ("mo", "cr", "mul", "rank_distance")
CUTOFFS = ("ndcg@10", "recall@100", "mrr@10")
NAMED = 40  # languages of a group that are named
STARS = ((0.001, "***"), (0.01, "**"), (0.05, "*"))
METHOD = (
    "Intervals: percentiles of a bootstrap over questions, each drawn with its queries in all languages (Efron 1979; "
    "Koehn 2004). p: two-sided randomisation test that exchanges two runs question by question (Smucker et al. 2007), "
    "corrected after Holm (1979) within a measure: over the runs, by group over runs and groups, by language over runs "
    "and languages. {exchanges} exchanges: no p is below one in as many."
)
_SPECIAL = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", '"': "''",
}  # fmt: skip


def main_measures(comparison: Comparison) -> list[str]:
    """The measures by which such a task is reported: the paper's four for parallel answers, else the cut-off ones.

    Args:
        comparison: of any task.
    """
    there = comparison.measures
    if "cr" in there or "rank_distance" in there:
        return [name for name in PARALLEL if name in there]
    return [name for name in (*CUTOFFS, "map", "accuracy") if name in there] or list(there)


def to_markdown(comparison: Comparison, remarks: Sequence[str] = ()) -> str:
    """Figures with intervals, differences to the first run with their p-values, and the same by language.

    Args:
        comparison: what was compared.
        remarks: lines for the reader.
    """
    c, main = comparison, main_measures(comparison)
    rest = [name for name in c.measures if name not in main]
    parts = [f"# {len(c.names)} runs on {c.task}", _counts(c) + (" " + _legend(c) if c.resamples else "")]
    parts.append(_overall_table(c, main))
    if rest:
        parts.append(_overall_table(c, rest))
    if c.resamples:
        parts += [f"## Differences to {_cell(c.names[0])}", _difference_table(c, [*main, *rest])]
    if c.groups:
        parts.append("## By group")
        for name in main:
            parts += [label(name), _part_table(c, name, "group", c.group_columns)]
        parts.append("; ".join(f"{_cell(name)}: {_some(members)}" for name, members in c.groups.items()) + ".")
    if len(c.languages) > 1:
        parts.append("## By language" if any(">" in language for language in c.languages) else "## By query language")
        for name in main:
            parts += [label(name), _part_table(c, name, "language", c.language_columns)]
    return "\n\n".join([*parts, *remarks, *([_method(c)] if c.resamples else [])]) + "\n"


def to_json(comparison: Comparison, files: Sequence[str], remarks: Sequence[str] = ()) -> str:
    """Everything, as strict JSON: null stands for what a language or run does not have.

    Args:
        comparison: what was compared.
        files: R, where the runs were read.
        remarks: lines for the reader.
    """
    c = comparison
    content = {
        "task": c.task,
        "runs": [{"name": name, "file": file} for name, file in zip(c.names, files, strict=True)],
        "languages": c.languages,
        "groups": c.groups,
        "queries": c.queries,
        "questions": c.questions or None,
        "resamples": c.resamples,
        "exchanges": c.exchanges,
        "level": c.level,
        "seed": c.seed,
        "method": _method(c) if c.resamples else "figures only",
        "remarks": list(remarks),
        "measures": {
            name: {
                "lower_is_better": name in LOWER_IS_BETTER,
                "overall": _entries(c, measured, 0),
                "by_group": {name: _entries(c, measured, column) for name, column in c.group_columns.items()},
                "by_language": {code: _entries(c, measured, column) for code, column in c.language_columns.items()},
            }
            for name, measured in c.measures.items()
        },
    }
    return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def to_latex(comparison: Comparison) -> str:
    """Tables with booktabs rules: the main figures of the runs, and of each its values by language.

    Args:
        comparison: what was compared.
    """
    c, main = comparison, main_measures(comparison)
    head = "% \\usepackage{booktabs}"
    if not "".join([*c.names, c.task]).isascii():
        head += "\n% Names are not all in Latin script: compile with XeLaTeX or LuaLaTeX and a font that has them."
    rows = []
    for run, name in enumerate(c.names):
        rows.append([latex(name), *(_latex_cell(c, c.measures[m], run, 0, m) for m in main)])
        if c.resamples:
            ends = [_interval(m, c.measures[m].intervals[run, 0]).strip() for m in main]
            rows.append(["", *(f"{{\\scriptsize {interval}}}" if interval else "" for interval in ends)])
    tables = [_latex_table(["", *map(_latex_label, main)], rows, _caption(c), "tab:comparison")]
    for what, columns in (("group", c.group_columns), ("language", c.language_columns)):
        if len(columns) < (2 if what == "language" else 1):
            continue
        for m in main:
            rows = [
                [latex(name), *(_latex_cell(c, c.measures[m], run, column, m) for run in range(len(c.names)))]
                for name, column in columns.items()
            ]
            caption = f"{_latex_label(m)} on {latex(c.task)} by {what}. {_star_words(c, latex, what)}"
            tag = f"tab:comparison-{_slug(m)}" + ("-groups" if what == "group" else "")
            tables.append(_latex_table(["", *map(latex, c.names)], rows, caption, tag))
    return "\n\n".join([head, *tables]) + "\n"


def latex(text: str) -> str:
    """The text with LaTeX's special characters escaped.

    Args:
        text: such as the name of a run.
    """
    return "".join(_SPECIAL.get(character, character) for character in " ".join(text.split()))


def label(measure: str) -> str:
    """A measure's name for readers.

    Args:
        measure: its key.
    """
    return NAMES.get(measure, measure)


def number(measure: str, value: float, sign: str = "") -> str:
    """A value of the measure as it is written in tables.

    Args:
        measure: its key.
        value: NaN is a dash.
        sign: "+" for differences.
    """
    if math.isnan(value):
        return "-"
    return format(value, f"{sign},.1f" if measure == "rank_distance" else f"{sign}.4f")


def stars(p: float) -> str:
    """Marks of significance.

    Args:
        p: corrected; NaN has none.
    """
    return next((mark for bound, mark in STARS if p <= bound), "")


def _method(c: Comparison) -> str:
    return METHOD.format(exchanges=f"{c.exchanges:,}")


def _counts(c: Comparison) -> str:
    asked = f" of {c.questions:,} questions" if c.questions and c.questions != c.queries else ""
    several = "directions" if any(">" in language for language in c.languages) else "languages"
    return f"{c.queries:,} queries{asked}, {len(c.languages)} {several if len(c.languages) > 1 else 'language'}."


def _legend(c: Comparison) -> str:
    return (
        f"In brackets {100 * c.level:g}% intervals from {c.resamples:,} resamples of the questions (seed {c.seed}). "
        + _star_words(c, _cell)
    )


def _star_words(c: Comparison, escape: Callable[[str], str], what: str = "") -> str:
    if not c.resamples:
        return ""
    over = f"runs and {what}s" if what else "the runs compared"
    return (
        f"One, two and three stars: differs from {escape(c.names[0])} at p at most 0.05, 0.01 and 0.001 "
        f"(randomisation test over questions, corrected after Holm over {over})."
    )


def _overall_table(c: Comparison, measures: Sequence[str]) -> str:
    rows = []
    for run, name in enumerate(c.names):
        cells = [_value(c.measures[m], run, 0, m) + _interval(m, c.measures[m].intervals[run, 0]) for m in measures]
        rows.append([_cell(name), *cells])
    return markdown_table(["run", *map(label, measures)], rows)


def _difference_table(c: Comparison, measures: Sequence[str]) -> str:
    rows = []
    for m in measures:
        for run in range(len(c.names) - 1):
            row = [label(m), _cell(c.names[run + 1]), *_difference(c.measures[m], run, 0, m)]
            rows.append([*row[:-1], _p(c.measures[m].p[run, 0]), row[-1]])
    return markdown_table(["measure", "run", "difference", "interval", "p", "p (Holm)"], rows, words=2)


def _part_table(c: Comparison, m: str, what: str, columns: Mapping[str, int]) -> str:
    measured, two = c.measures[m], len(c.names) == 2 and c.resamples
    rows = []
    for name, column in columns.items():
        row = [_cell(name), *(_value(measured, run, column, m) for run in range(len(c.names)))]
        rows.append([*row, *_difference(measured, 0, column, m)] if two else row)
    head = [what, *map(_cell, c.names)]
    return markdown_table([*head, "difference", "interval", "p (Holm)"] if two else head, rows)


def _value(measured: Measured, run: int, column: int, m: str) -> str:
    mark = stars(measured.p_holm[run - 1, column]) if run else ""
    return number(m, measured.values[run, column]) + mark


def _interval(m: str, ends: np.ndarray, sign: str = "") -> str:
    return "" if np.isnan(ends).any() else f" [{number(m, ends[0], sign)}, {number(m, ends[1], sign)}]"


def _difference(measured: Measured, run: int, column: int, m: str) -> tuple[str, str, str]:
    p = measured.p_holm[run, column]
    return (
        number(m, measured.differences[run, column], "+") + stars(p),
        _interval(m, measured.difference_intervals[run, column], "+").strip(),
        _p(p),
    )


def _p(p: float) -> str:
    if math.isnan(p):
        return "-"
    return f"{p:.4f}" if p >= 0.0001 else "<0.0001"


def _entries(c: Comparison, measured: Measured, column: int) -> list[dict]:
    entries = []
    for run, name in enumerate(c.names):
        entry = {
            "run": name,
            "value": _null(measured.values[run, column]),
            "interval": _null(measured.intervals[run, column]),
        }
        if run:
            entry |= {
                "difference": _null(measured.differences[run - 1, column]),
                "difference_interval": _null(measured.difference_intervals[run - 1, column]),
                "p": _null(measured.p[run - 1, column]),
                "p_holm": _null(measured.p_holm[run - 1, column]),
            }
        entries.append(entry)
    return entries


def _null(value: np.ndarray | float) -> list[float] | float | None:
    return None if np.isnan(value).any() else np.asarray(value).tolist()


def _caption(c: Comparison) -> str:
    said = f"Runs on {latex(c.task)}: {_counts(c).rstrip('.')}. The best value of each column is bold."
    if c.resamples:
        said += f" In brackets {100 * c.level:g}\\% bootstrap intervals. {_star_words(c, latex)}"
    return said


def _latex_label(m: str) -> str:
    return latex(label(m)) + (r" $\downarrow$" if m in LOWER_IS_BETTER else "")


def _latex_cell(c: Comparison, measured: Measured, run: int, column: int, m: str) -> str:
    value, column_values = measured.values[run, column], measured.values[:, column]
    if math.isnan(value):
        return "--"
    best = np.nanmin(column_values) if m in LOWER_IS_BETTER else np.nanmax(column_values)
    written = f"\\textbf{{{number(m, value)}}}" if value == best else number(m, value)
    mark = stars(measured.p_holm[run - 1, column]) if run else ""
    return written + (f"$^{{{mark}}}$" if mark else "")


def _latex_table(header: list[str], rows: list[list[str]], caption: str, tag: str) -> str:
    body = "\n".join("  " + " & ".join(row) + r" \\" for row in rows)
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            f"\\caption{{{caption}}}",
            f"\\label{{{tag}}}",
            f"\\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}",
            r"  \toprule",
            "  " + " & ".join(header) + r" \\",
            r"  \midrule",
            body,
            r"  \bottomrule",
            r"\end{tabular}",
            r"\end{table}",
        ]
    )


def _some(members: Sequence[str]) -> str:
    return ", ".join(members) if len(members) <= NAMED else f"{len(members):,} directions"


def _slug(m: str) -> str:
    return "".join(character if character.isalnum() else "-" for character in m)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
