"""Claims about how ranks are counted: alike by every backend, columns where they lie, in chunks, at full precision."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_evaluation_ranks import BACKENDS, LANGUAGES, needs_compiled, random_problem

from hbt_fast.evaluation import ranks as ranks_module
from hbt_fast.evaluation.counting import columns_of
from hbt_fast.evaluation.ranks import exact_ranks


@needs_compiled
def test_both_backends_count_alike_in_every_language_block():
    for seed in range(5):
        problem = random_problem(seed, n=40, m=90, dimension=3)
        a, b = (exact_ranks(*problem, backend=backend, device="cpu").higher for backend in ("cpu", "torch"))
        assert np.array_equal(a, b)


@needs_compiled
@pytest.mark.parametrize("threads", [1, 3])
def test_both_backends_count_alike_on_real_vectors_and_long_blocks(threads):
    # Blocks below and above the length that is prefetched, vectors' lengths and tails, a query without answers.
    rng = np.random.default_rng(threads)
    sizes = [1, 5000, 15, 16, 17, 300]
    queries, candidates = (rng.standard_normal((n, 24)).astype(np.float32) for n in (70, sum(sizes)))
    candidates[-200:] = candidates[5001:5201]  # ties
    languages = np.repeat([f"l{i}" for i in range(len(sizes))], sizes).tolist()
    counts = rng.integers(0, 30, 70)
    relevant = np.concatenate([rng.choice(sum(sizes), n, replace=False) for n in counts])
    problem = (queries, candidates, ["l0"] * 70, languages, np.concatenate([[0], np.cumsum(counts)]), relevant)
    torch.set_num_threads(threads)
    a, b = (
        exact_ranks(*problem, backend=backend, device="cpu", workspace_bytes=10**6).higher
        for backend in ("cpu", "torch")
    )
    assert np.array_equal(a, b)
    scores = candidates.astype(np.float64) @ queries.astype(np.float64).T
    above = (scores[:, np.repeat(np.arange(70), counts)] > scores[relevant, np.repeat(np.arange(70), counts)]).sum(0)
    assert np.abs(a.sum(axis=1) - above).max() <= 3  # float64 differs in rounding and, of ties, counts none


@pytest.mark.parametrize("backend", BACKENDS)
def test_languages_may_be_grouped_in_any_order_or_mixed(backend):
    # The same candidates in three orders: languages as they sort, grouped otherwise, mixed. Without ties, equal counts.
    rng = np.random.default_rng(0)
    queries, candidates = (rng.permutation(n * 6).reshape(n, 6).astype(np.float32) % 97 for n in (20, 90))
    languages = np.repeat(["aa", "mm", "zz"], [40, 20, 30])
    relevant = rng.choice(90, 60, replace=False)
    counts = []
    for order in (np.arange(90), np.r_[60:90, 0:40, 40:60], rng.permutation(90)):
        place = np.argsort(order)
        found = exact_ranks(
            queries, candidates[order], ["zz"] * 20, languages[order].tolist(), np.arange(0, 61, 3), place[relevant],
            backend=backend, device="cpu",
        )  # fmt: skip
        counts.append(found.higher)
        assert found.pool.tolist() == [40, 20, 30]
    assert np.array_equal(counts[0], counts[1])
    assert np.array_equal(counts[0], counts[2])


def test_grouped_candidates_are_not_copied_and_may_be_a_read_only_map(tmp_path, monkeypatch, recwarn):
    problem = list(random_problem(5))
    order = np.argsort([LANGUAGES.index(code) for code in problem[3]], kind="stable")  # zz before aa
    problem[1] = problem[1][order]
    problem[3] = [problem[3][i] for i in order]
    np.save(tmp_path / "vectors.npy", problem[1])
    mapped = np.load(tmp_path / "vectors.npy", mmap_mode="r")
    operands, multiply = [], torch.mm

    def spy(a, b, **options):
        operands.append(b.T)
        return multiply(a, b, **options)

    monkeypatch.setattr(torch, "mm", spy)
    found = exact_ranks(problem[0], mapped, *problem[2:], device="cpu")
    assert operands[0].data_ptr() == mapped.ctypes.data
    monkeypatch.undo()
    assert np.array_equal(found.higher, exact_ranks(*problem, device="cpu").higher)
    assert not recwarn.list


def test_columns_are_moved_only_where_a_language_lies_apart():
    offsets, relevant = np.array([0, 1]), np.array([1])
    assert columns_of(np.array([2, 2, 0, 1]), 3, offsets, relevant).order is None
    where = columns_of(np.array([2, 0, 2, 1]), 4, offsets, relevant)
    assert where.order.tolist() == [1, 3, 0, 2]
    assert where.blocks.tolist() == [[0, 1], [1, 2], [2, 4], [0, 0]]
    assert where.positions.tolist() == [0]
    assert where.splits.tolist() == [[0, 1, 3, 0]]  # candidate 0 wins a tie against candidate 1, 2 and 3 do not


def test_a_chunk_has_64_rows_however_many_candidates_there_are(monkeypatch):
    rows, multiply = [], torch.mm

    def spy(a, b, **options):
        rows.append(len(a))
        return multiply(a, b, **options)

    monkeypatch.setattr(torch, "mm", spy)
    candidates = np.zeros((300_000, 1), dtype=np.float32)  # 56 rows of them are 64 MiB
    problem = (np.zeros((130, 1), np.float32), candidates, ["en"] * 130, ["en"] * 300_000)
    found = exact_ranks(*problem, np.arange(131), np.arange(130), device="cpu")
    assert rows == [64, 64, 2]
    assert found.in_whole_pool.tolist() == list(range(1, 131))


def test_a_reduced_matmul_precision_of_the_program_is_not_used_and_comes_back(monkeypatch):
    during, multiply = [], torch.mm

    def spy(*arguments, **options):  # few CPUs have reduced products, so the setting is watched and not its effect
        during.append(torch.get_float32_matmul_precision())
        return multiply(*arguments, **options)

    monkeypatch.setattr(torch, "mm", spy)
    torch.set_float32_matmul_precision("medium")
    try:
        exact_ranks(*random_problem(3), device="cpu")
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert set(during) == {"highest"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "numba"}, r'"auto", "torch", "cpu" or "triton", not \'numba\''),
        ({"backend": "triton", "device": "cpu"}, r"backend='triton' does not count on device='cpu'"),
        ({"backend": "cpu", "device": "cuda"}, r"backend='cpu' does not count on device='cuda'"),
    ],
)
def test_backends_that_do_not_fit_are_refused(options, message, monkeypatch):
    monkeypatch.setattr(ranks_module, "is_compiled", lambda: True)
    monkeypatch.setattr(ranks_module, "has_triton", lambda: True)
    with pytest.raises(ValueError, match=message):
        exact_ranks(*random_problem(4), **options)


def test_without_the_compiled_part_torch_counts_and_cpu_says_why_not(monkeypatch):
    truth = exact_ranks(*random_problem(4), device="cpu").higher
    monkeypatch.setattr(ranks_module, "is_compiled", lambda: False)
    assert np.array_equal(exact_ranks(*random_problem(4), device="cpu").higher, truth)
    with pytest.raises(ValueError, match=r"csrc/, which this installation did not build: take backend=\"torch\""):
        exact_ranks(*random_problem(4), device="cpu", backend="cpu")
    assert ranks_module._backend("auto", "cpu") == "torch"
    monkeypatch.setattr(ranks_module, "is_compiled", lambda: True)
    assert ranks_module._backend("auto", "cpu") == "cpu"
    monkeypatch.setattr(ranks_module, "has_triton", lambda: True)
    assert ranks_module._backend("auto", "cuda:1") == "triton"


def test_counting_leaves_the_number_of_threads_alone():
    exact_ranks(*random_problem(4), device="cpu")
    assert torch.get_num_threads() == 1  # as conftest.py sets it


@pytest.mark.parametrize("m", [37, 130, 1309])
@pytest.mark.parametrize("n", [1, 2, 5])
def test_equal_vectors_tie_in_every_column(n, m):
    # m is no multiple of anything; 5 queries, two at a time, leave one for the last chunk.
    rng = np.random.default_rng(0)
    queries = rng.standard_normal((n, 67)).astype(np.float32)
    candidates = np.repeat(rng.standard_normal((1, 67)).astype(np.float32), m, axis=0)
    pair_2M = torch.mm(torch.from_numpy(queries[[0, -1]]), torch.from_numpy(candidates).T)
    if not bool((pair_2M == pair_2M[:, :1]).all()):
        pytest.skip("the matrix product of this machine rounds some columns otherwise")
    found = exact_ranks(
        queries, candidates, ["en"] * n, ["en"] * m, m * np.arange(n + 1), np.tile(np.arange(m), n), device="cpu",
        workspace_bytes=2 * 4 * m,
    )  # fmt: skip
    assert np.array_equal(found.in_whole_pool, 1 + np.tile(np.arange(m), n))
