"""Claims about the Triton kernel that counts: it equals the torch specification to the count, and fits the chips.

Without a GPU the claims run in Triton's interpreter, in a process of their own, as test_kernels_interpreted.py has it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from hbt_fast.evaluation.counting import Columns, columns_of, counter_of
from hbt_fast.evaluation.ranks import exact_ranks
from hbt_fast.kernels import counts

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda"
runs = pytest.mark.skipif(not INTERPRETED and DEVICE == "cpu", reason="needs a GPU, or TRITON_INTERPRET=1")
compiles = pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET is set: nothing compiles")


def columns(seed: int, n: int, sizes: list[int], relevant: list[int], *, mixed: bool = False) -> Columns:
    """Pools of `sizes`; the queries' numbers of relevant candidates go through `relevant` by turns."""
    rng = np.random.default_rng(seed)
    language_M = np.repeat(np.arange(len(sizes)), sizes)
    if mixed:
        rng.shuffle(language_M)
    per_query = np.resize(relevant, n)
    chosen = [rng.choice(len(language_M), size, replace=False) for size in per_query]
    offsets = np.concatenate([[0], np.cumsum(per_query)])
    return columns_of(language_M, len(sizes), offsets, np.concatenate(chosen))


def scores(seed: int, n: int, m: int) -> torch.Tensor:
    """Of few values, so that a third of all comparisons are ties; rows further apart than M, amid higher scores."""
    g = torch.Generator().manual_seed(seed)
    frame = torch.full((n + 2, m + 9), 99.0)
    frame[1 : n + 1, 4 : 4 + m] = torch.randint(-1, 2, (n, m), generator=g).float()
    return frame.to(DEVICE)[1 : n + 1, 4 : 4 + m]


def counted(backend: str, where: Columns, chunks: list[torch.Tensor]) -> torch.Tensor:
    higher_RL = torch.zeros(where.splits.shape, dtype=torch.int32, device=DEVICE)
    count, first = counter_of(backend, where, DEVICE), 0
    for chunk in chunks:
        count(chunk, first, higher_RL)
        first += len(chunk)
    return higher_RL.cpu()


@runs
@pytest.mark.parametrize(
    ("sizes", "relevant"),
    [
        ([1], [1]),
        ([127, 130], [1, 1, 1]),  # 512 columns at a time
        ([40, 600, 1], [2, 4, 3]),
        ([300, 129, 128], [11, 0, 16]),  # one below and one above 128 columns at a time
        ([90, 0, 200], [20, 1, 33]),  # more than 16 relevant candidates; a language without candidates
    ],
)
@pytest.mark.parametrize("mixed", [False, True])
def test_the_kernel_equals_the_specification_with_ties(sizes, relevant, mixed):
    where = columns(0, 5, sizes, relevant, mixed=mixed)
    chunks = [scores(seed, n, sum(sizes)) for seed, n in enumerate((2, 1, 2))]
    found, truth = counted("triton", where, chunks), counted("torch", where, chunks)
    assert torch.equal(found, truth)
    assert sum(sizes) == 1 or bool((truth > 0).any())


@runs
def test_a_language_may_take_several_programs(monkeypatch):
    monkeypatch.setattr(counts, "SEGMENT", 100)
    where = columns(1, 3, [99, 100, 101, 350], [3, 12])
    chunk = scores(1, 3, 650)
    assert torch.equal(counted("triton", where, [chunk]), counted("torch", where, [chunk]))


@runs
def test_infinite_scores_are_scores():
    where = columns(2, 2, [70, 80], [6])
    chunk = scores(2, 2, 150)
    chunk[:, ::3] = float("inf")
    chunk[:, 1::3] = float("-inf")
    assert torch.equal(counted("triton", where, [chunk]), counted("torch", where, [chunk]))


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_ranks_on_a_gpu_are_the_same_by_both_backends():
    rng = np.random.default_rng(0)
    queries, candidates = (rng.integers(-2, 3, (size, 16)).astype(np.float32) for size in (300, 5000))
    codes = ["aa", "bb", "cc"]
    languages = [[codes[i] for i in rng.integers(0, 3, size)] for size in (300, 5000)]
    relevant = rng.permutation(5000)[:900]
    problem = (queries, candidates, *languages, np.arange(0, 901, 3), relevant)
    found = [
        exact_ranks(*problem, backend=backend, device=device, workspace_bytes=2**20).higher
        for backend, device in (("triton", "cuda"), ("torch", "cuda"), ("torch", "cpu"))
    ]
    assert np.array_equal(found[0], found[1])
    assert np.array_equal(found[0], found[2])  # integers: products are exact, so they are equal on every device


@compiles
@pytest.mark.skipif(DEVICE == "cuda", reason="the claims above run on the GPU")
def test_every_claim_holds_in_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "12 passed" in done.stdout, done.stdout


def launch(relevant: int, sizes: list[int]) -> tuple[dict, dict]:
    """Arguments and options with which the kernel would be launched."""
    from triton.runtime.jit import JITFunction

    where = columns(0, 2, sizes, [relevant])
    noted = []

    def note(kernel, *arguments, grid, warmup, **named):
        bound = dict(zip(kernel.arg_names, arguments, strict=False))
        bound |= {name: named.pop(name) for name in kernel.arg_names if name in named}
        noted.append((bound, named))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", note)
        counter_of("triton", where, "cpu")(torch.zeros(2, sum(sizes)), 0, torch.zeros(where.splits.shape).int())
    return noted[0]


@compiles
@pytest.mark.parametrize(("chip", "relevant"), [(80, 11), (90, 11), (100, 11), (90, 1), (90, 40)])
def test_the_kernel_compiles_for_the_chip_without_spilling(chip, relevant, tmp_path, monkeypatch):
    import test_kernels_compile as compiling

    if not compiling.CUOBJDUMP.is_file():
        pytest.skip(f"triton brings no {compiling.CUOBJDUMP}")
    monkeypatch.setitem(compiling.POINTERS, torch.int32, "*i32")
    made = compiling.compiled(counts._count_kernel, *launch(relevant, [1024, 1008]), chip)
    used = compiling.resources(made.asm["cubin"], tmp_path)
    assert used["LOCAL"] == 0, used
    assert used["STACK"] == 0, used
    assert used["REG"] <= 96, used  # 5 programs of 128 threads and more to a processor
    assert made.metadata.shared <= 1024  # for the sums at the end: no score goes through it


@compiles
def test_sizes_of_one_compile_too():
    import test_kernels_compile as compiling

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(compiling.POINTERS, torch.int32, "*i32")
        assert compiling.compiled(counts._count_kernel, *launch(1, [1]), 90).asm["cubin"]
