"""Each benchmark's time in units of its floor, as a table at the end of `pytest bench/`."""

import pytest

LINES = pytest.StashKey[list]()


def pytest_configure(config):
    config.stash[LINES] = []


@pytest.fixture
def against_floor(benchmark, request):
    """`against_floor(function, floor, floor_name)`: time both, alternately, and note function / floor.

    The floor is what must happen at the least; its time comes from the same rounds, so that a slow spell of a shared
    machine falls on both. Medians, because such a machine has outliers on one side only.
    """
    import statistics
    import time

    def run(function, floor, floor_name, *, rounds=5):
        if benchmark.disabled:  # --benchmark-disable: does it run at all
            function()
            return
        floor_times = []

        def setup():
            start = time.perf_counter()
            floor()
            floor_times.append(time.perf_counter() - start)

        benchmark.pedantic(function, setup=setup, rounds=rounds, warmup_rounds=1)
        floor_median = statistics.median(floor_times[1:])
        ratio = benchmark.stats.stats.median / floor_median
        benchmark.extra_info.update(floor=floor_name, floor_seconds=floor_median, ratio_to_floor=ratio)
        times = f"{1e3 * benchmark.stats.stats.median:9.1f} ms {1e3 * floor_median:9.1f} ms"
        request.config.stash[LINES].append(f"{request.node.name:<58}{times} {ratio:7.2f}")

    return run


def pytest_terminal_summary(terminalreporter, config):
    if lines := config.stash[LINES]:
        terminalreporter.section("ratio to the floor")
        terminalreporter.write_line(f"{'benchmark':<58}{'median':>12} {'floor':>12} {'ratio':>7}")
        for line in lines:
            terminalreporter.write_line(line)
