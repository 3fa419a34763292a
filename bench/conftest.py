"""Each benchmark's time in units of its floor, as a table at the end of `pytest bench/`; --results=FILE.md keeps it.

The floor is what must happen at the least. Every timed call lies between two calls of it and is divided by their mean,
so that a slow spell of a shared machine falls on both; the figure is the median of these ratios.

Extra memory is measured, in one call of its own: on a GPU the allocator's peak, on a CPU the growth of the process's
peak resident set (everything counts, whoever allocated it), less the results that the call returns.
"""

from __future__ import annotations

import ctypes
import platform
import re
import statistics
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

LINES = pytest.StashKey[list]()
COLUMNS = ("benchmark", "median ms", "floor ms", "ratio", "quartiles", "GFLOP/s", "passes", "extra MiB")


def pytest_addoption(parser):
    group = parser.getgroup("hbt-fast")
    group.addoption("--results", metavar="FILE.md", help="write the table to this file, with hardware and versions")
    group.addoption("--slow", action="store_true", help="also benchmarks of minutes: rivals at 8192 x 768, and 65,536")


def pytest_configure(config):
    config.stash[LINES] = []
    config.addinivalue_line("markers", "slow: takes minutes; runs with --slow only")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="takes minutes: give --slow"))


@pytest.fixture
def add_line(request):
    """`add_line(**columns)`: a line of the table, for what is not timed against a floor."""

    def add(**columns):
        request.config.stash[LINES].append({"benchmark": request.node.name.removeprefix("test_")} | columns)

    return add


@pytest.fixture
def once(benchmark, add_line):
    """`once(function, work, passes)`: one call without a floor, for what takes long; returns the extra bytes."""

    def run(function, work, passes):
        times = []

        def timed():
            start = time.perf_counter()
            results = function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
            return results

        extra = extra_memory(lambda: benchmark.pedantic(timed, rounds=1))
        if times and not benchmark.disabled:
            figures = {"median ms": f"{1e3 * times[0]:,.0f}", "GFLOP/s": f"{work / times[0] / 1e9:,.0f}"}
            add_line(**figures, passes=passes, **{"extra MiB": in_mib(extra)})
        return extra

    return run


@pytest.fixture
def against_floor(benchmark, add_line):
    """`against_floor(function, floor, floor_name)`: time both by turns and note function / floor.

    With `work`, the operations that must be done, the rate and the extra memory are noted besides.
    """

    def run(function, floor, floor_name, *, rounds=5, work=None, passes=None):
        if benchmark.disabled:  # --benchmark-disable: does it run at all
            function()
            return
        floor()  # also makes the library take its buffers, before memory is measured
        if work is None:
            function()
        extra = None if work is None else extra_memory(function)  # a call too, so it is warm now
        floors, times = [], []

        def timed():
            times.append(seconds(function))

        benchmark.pedantic(timed, setup=lambda: floors.append(seconds(floor)), rounds=rounds)
        floors.append(seconds(floor))
        ratios = [t / ((a + b) / 2) for t, a, b in zip(times, floors, floors[1:], strict=False)]
        median, ratio = statistics.median(times), statistics.median(ratios)
        low, _, high = statistics.quantiles(ratios, method="inclusive") if len(ratios) > 1 else ratios * 3
        columns = {
            "median ms": f"{1e3 * median:,.1f}",
            "floor ms": f"{1e3 * statistics.median(floors):,.1f}",
            "ratio": f"{ratio:.2f}",
            "quartiles": f"{low:.2f}-{high:.2f}",
        }
        if work is not None:
            columns |= {"GFLOP/s": f"{work / median / 1e9:,.0f}", "passes": passes or "-", "extra MiB": in_mib(extra)}
        add_line(**columns)
        benchmark.extra_info.update(
            floor=floor_name,
            floor_seconds=floors,
            seconds=times,
            ratio_to_floor=ratio,
            ratio_quartiles=[low, high],
            work=work,
            passes=passes,
            extra_bytes=extra,
        )

    return run


def seconds(function) -> float:
    """On a GPU by events on its stream: the work queued before is not counted, the launches are where they delay it."""
    if not torch.cuda.is_available():
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def extra_memory(function) -> int | None:
    """Bytes that a call takes at its peak beyond what was there and what it returns; None where it cannot be known."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results = function()
        peak = torch.cuda.max_memory_allocated()
    else:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed and kept would hide what is taken
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the peak is what is resident now
        except OSError:
            return None
        before = _resident("VmRSS")
        results = function()
        peak = _resident("VmHWM")
    returned = sum(x.nbytes for x in results or () if isinstance(x, torch.Tensor))
    return max(0, peak - before - returned)


def _resident(what: str) -> int:
    return 1024 * int(re.search(rf"^{what}:\s+(\d+)", Path("/proc/self/status").read_text(), re.MULTILINE)[1])


def in_mib(size: int | None) -> str:
    return "-" if size is None else f"{size / 2**20:,.0f}"


def pytest_terminal_summary(terminalreporter, config):
    if not (lines := config.stash[LINES]):
        return
    rows = [COLUMNS, *(tuple(line.get(c, "-") for c in COLUMNS) for line in lines)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]

    def aligned(row):
        return [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]

    terminalreporter.section("in units of the floor")
    for row in rows:
        terminalreporter.write_line("  ".join(aligned(row)))
    if path := config.getoption("--results"):
        marks = "|---" + "|---:" * (len(COLUMNS) - 1) + "|"
        table = [f"| {' | '.join(row)} |" for row in map(aligned, rows)]
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        reasons = Counter(map(reason_of, terminalreporter.getreports("skipped")))
        left_out = [f"- {reason}: {count} benchmarks" for reason, count in sorted(reasons.items())]
        left_out += [f"- failed: {r.nodeid.rpartition('::')[2]}" for r in terminalreporter.getreports("failed")]
        text = [hardware(), "", table[0], marks, *table[1:]] + (
            ["", "Not measured:", "", *left_out] if left_out else []
        )
        Path(path).write_text("\n".join(text) + "\n", encoding="utf-8")
        terminalreporter.write_line(f"written to {path}")


def reason_of(report) -> str:
    return report.longrepr[2].removeprefix("Skipped: ") if isinstance(report.longrepr, tuple) else "skipped"


def hardware() -> str:
    """The machine and versions, in a line."""
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    if torch.cuda.is_available():
        import triton

        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            driver = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.split("\n")[0]
        except OSError:
            driver = "unknown"
        return f"{torch.cuda.get_device_name()}, driver {driver}, triton {triton.__version__}, {versions}"
    model = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return f"{model[1] if model else platform.processor()}, {torch.get_num_threads()} threads, {versions}"
