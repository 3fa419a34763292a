"""The end of a run: evaluation before and after as table and heat map, the report.

python -m hbt_fast.report runs/demo      writes runs/demo/report.html again, of a run that was stopped too
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from hbt_fast.base.programs import program
from hbt_fast.evaluation.metrics import Results
from hbt_fast.evaluation.report import comparison, write_report
from hbt_fast.run_page import write_page


@program("hbt_fast.report")
def main(arguments: Sequence[str] | None = None) -> None:
    """Write the report of a run folder from the command line."""
    made = argparse.ArgumentParser("hbt_fast.report", description="Write RUN/report.html from what a run left behind.")
    made.add_argument("run", type=Path, help="the run folder (train.run_dir); the run may have been stopped")
    print(write_page(made.parse_args(arguments).run))


def before_and_after(before: Results | None, after: Results | None, run: Path) -> dict[str, Path]:
    """Write evaluation.json, .md and .png, print the table; returns the paths by what they are."""
    if after is None:
        return {}
    if before is not None:
        print(f"\n{after.task}\n\n{comparison(before, after)}", flush=True)
    paths = write_report(after, run / "evaluation.json", before)
    return dict(zip(("results (JSON)", "results (table)", "heat map"), paths, strict=True))


if __name__ == "__main__":
    main()
