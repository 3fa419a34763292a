"""A billion rows: the plan's memory and time go with the batch, not with the data."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import synthetic

from hbt_fast.data.plan import BatchPlanner
from hbt_fast.data.shares import BatchConfig

BILLION = """
import numpy as np
from hbt_fast.data.plan import BatchPlanner
from hbt_fast.data.shares import BatchConfig
import synthetic

bitext = synthetic.source(10**9, ["de", "en"], name="bitext", bitext=True, huge=True)
pairs = synthetic.source(10**9, ["en", "fr", "sw"], name="pairs", huge=True)
for strategy in ("hybrid", "cross"):
    planner = BatchPlanner(synthetic.store(bitext, pairs), BatchConfig(8192, strategy=strategy, alpha=0.5), seed=1)
    seen = []
    for step in [*range(60), 10**6, 10**9]:
        plan = planner.plan(step)
        assert len(np.unique(plan.contents)) == 8192 and plan.contents.max() < 10**9
        seen.append(plan.contents)
    assert max(map(np.max, seen)) > 9e8
status = open("/proc/self/status").read()  # not getrusage: that counts the parent before exec
print(int(status.split("VmHWM:")[1].split()[0]) // 1024)
"""


def test_a_billion_rows_are_planned_within_a_gibibyte():
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, "-c", BILLION], cwd=root / "tests", capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) < 1024  # MiB, with Python, NumPy and Numba in it


@pytest.mark.parametrize("threshold", [10, 10**9])
def test_long_lists_of_rows_in_a_file_give_the_same_plan_as_in_memory(monkeypatch, threshold):
    monkeypatch.setattr("hbt_fast.data.strata.IN_MEMORY", threshold)
    rng = np.random.default_rng(0)
    has, contents = rng.random((900, 3)) < 0.6, rng.integers(0, 300, 900)
    contents = np.unique(contents, return_inverse=True)[1]
    store = synthetic.store(synthetic.source(900, ["aa", "bb", "cc"], has=has, contents=contents))
    plans = BatchPlanner(store, BatchConfig(64), seed=2)
    digest = [int(plans.plan(t).queries.sum()) for t in range(40)]
    monkeypatch.setattr("hbt_fast.data.strata.IN_MEMORY", 1 << 23)
    again = BatchPlanner(store, BatchConfig(64), seed=2)
    assert digest == [int(again.plan(t).queries.sum()) for t in range(40)]
    for number, stratum in enumerate(plans.strata):
        language = stratum.wanted.query_language
        fits = has[:, language] if language >= 0 else has.sum(1) > 1
        rows = stratum.rows if len(stratum.rows) else np.arange(900)
        assert np.sort(rows).tolist() == np.flatnonzero(fits).tolist(), plans.name(number)
        assert stratum.contents == len(np.unique(contents[fits]))
