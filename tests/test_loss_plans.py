"""The planner as a table: what is kept, how many products, how much memory; and that the memory is what it says."""

import itertools

import pytest
import torch

from hbt_fast import explain, info_nce_with_grad
from hbt_fast.loss import tiles

MIB = 2**20
GTE = ("query_to_query", "doc_to_query", "doc_to_doc")
built = pytest.mark.skipif(tiles.compiled() is None, reason="csrc/ was not built here")


@built
@pytest.mark.parametrize(
    ("n", "m", "symmetric", "workspace", "passes", "rows", "columns", "keep"),
    [
        (4096, 4096, False, 64 * MIB, 3, 1024, 4096, False),  # one-way: a panel is done before the next
        (4096, 4096, True, 64 * MIB, 3, 1024, 4096, True),  # all of S is 64 MiB exactly
        (4096, 4096, True, 64 * MIB - 1, 4, 1024, 4096, False),
        (8192, 8192, True, 64 * MIB, 4, 1024, 4096, False),
        (65536, 65536, True, 64 * MIB, 4, 256, 16384, False),  # a panel of 1024 rows would be 256 MiB
        (65536, 65536, True, 1024 * MIB, 4, 1024, 4096, False),
        (100, 300, True, 64 * MIB, 3, 100, 300, True),
        (1, 1, False, 1, 3, 1, 1, False),
        (100, 300, False, 1, 3, 1, 300, False),  # one row at least
    ],
)
def test_the_plan(n, m, symmetric, workspace, passes, rows, columns, keep):
    plan = explain(n, m, symmetric=symmetric, workspace_bytes=workspace, backend="cpu")
    assert (plan.passes, plan.panel_rows, plan.tile_columns, plan.keep) == (passes, rows, columns, keep)
    assert plan.logit_bytes <= max(workspace, 4 * m)


@pytest.mark.parametrize("backend", ["torch-chunked", pytest.param("cpu", marks=built)])
@pytest.mark.parametrize("workspace", [1, 10_000, MIB, 64 * MIB])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_and_temporaries_stay_within_the_workspace(backend, workspace, dtype):
    for n, m in [(1, 1), (10, 4000), (4000, 10), (3000, 3000), (100_000, 100_000)]:
        for symmetric in (False, True):
            o = {"symmetric": symmetric, "workspace_bytes": workspace, "backend": backend, "dtype": dtype}
            plan = explain(n, m, **o)
            row = m * dtype.itemsize
            assert plan.panel_rows == 1 or plan.logit_bytes <= workspace
            assert plan.extra_bytes <= max(workspace, 4 * row) + 8 * dtype.itemsize * (n + m)
            assert 1 <= plan.tile_columns <= m


def test_auto_takes_the_compiled_form_where_it_was_built(monkeypatch):
    monkeypatch.setattr(tiles, "compiled", lambda: object())
    assert explain(10, 10).backend == "cpu"
    assert explain(10, 10, device="cuda:0", workspace_bytes=1).backend != "cpu"
    monkeypatch.setattr(tiles, "compiled", lambda: None)
    assert explain(10, 10).backend == "torch-chunked"
    assert "csrc/ was not built" in str(explain(10, 10))
    with pytest.raises(ValueError, match="backend='cpu' cannot be used: csrc/ was not built; install with"):
        explain(10, 10, backend="cpu")
    with pytest.raises(ValueError, match="backend='cpu' cannot be used: csrc/ was not built"):
        info_nce_with_grad(torch.eye(2), torch.eye(2), backend="cpu")


@built
@pytest.mark.parametrize(
    ("joint", "workspace", "passes", "keep"),
    [
        (("query_to_query",), 64 * MIB, 6, False),
        (("doc_to_query",), 64 * MIB, 3, True),  # columns of S: no matrix of its own
        (("doc_to_query",), 63 * MIB, 4, False),
        (GTE, 3 * 64 * MIB, 9, True),
        (GTE, 3 * 64 * MIB - 1, 12, False),
    ],
)
def test_the_plan_of_joint_directions(joint, workspace, passes, keep):
    for backend in ("cpu", "triton"):
        o = {"backend": backend, "workspace_bytes": workspace} if backend == "cpu" else {"device": "cuda"}
        plan = explain(4096, 4096, joint=joint, **o)
        if backend == "cpu":
            assert (plan.passes, plan.keep) == (passes, keep)
        assert plan.passes % len(plan.matrices) == 0
        assert plan.backend == backend
    q2q = explain(100, 300, joint=("query_to_query",), queries=400)
    assert q2q.matrices == {"query_to_doc": 300, "query_to_query": 400}
    assert q2q.logit_bytes == 4 * 100 * 700
    assert explain(100, 300, joint=GTE, backend="torch").passes == 9


def test_joint_directions_are_computed_in_the_passes_of_the_plan(monkeypatch):
    q, p = torch.randn(2, 40, 8, generator=torch.Generator().manual_seed(0)).unbind()
    for joint, workspace in itertools.product((("query_to_query",), ("doc_to_query",), GTE), (2000, MIB)):
        o = {"joint": joint, "workspace_bytes": workspace, "backend": "torch-chunked"}
        elements = []
        monkeypatch.setattr(torch, "addmm", counted(torch.addmm, elements))
        info_nce_with_grad(q, p, **o)
        monkeypatch.undo()
        assert sum(elements) == explain(40, 40, **o).passes * 40 * 40 * 8


def counted(addmm, elements):
    def count(*operands, **options):
        elements.append(operands[1].numel() * operands[2].shape[1])
        return addmm(*operands, **options)

    return count


def test_a_plan_reads_as_a_sentence():
    text = str(explain(100, 100, joint=GTE, workspace_bytes=1, backend="torch-chunked"))
    assert "12 products (4 each of query_to_doc and doc_to_query, query_to_query, doc_to_doc), panels of" in text
    text = str(explain(8192, 8192, symmetric=True, workspace_bytes=64 * MIB, backend="torch-chunked"))
    assert "4 products, panels of 1,024 rows; beyond inputs and gradients" in text


@built
@pytest.mark.parametrize("symmetric", [False, True])
def test_the_workspace_changes_no_bit_of_the_result(symmetric):
    q, p = torch.randn(2, 1500, 32, generator=torch.Generator().manual_seed(0)).div(6).unbind()
    small, large = (
        info_nce_with_grad(q, p, symmetric=symmetric, backend="cpu", workspace_bytes=w) for w in (7 * MIB, 512 * MIB)
    )
    assert all(torch.equal(a, b) for a, b in zip(small, large, strict=True))


def test_a_plan_for_a_gpu_can_be_made_without_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    o = {"device": "cuda", "dtype": torch.bfloat16, "operands": torch.bfloat16}
    one, both = (explain(65536, 65536, d=768, symmetric=s, **o) for s in (False, True))
    assert (one.backend, one.passes, both.passes) == ("triton", 3, 4)
    assert max(one.extra_bytes, both.extra_bytes) <= 1024 * MIB
    assert explain(9, 9, device="cuda", dtype=torch.float64).backend == "torch-chunked"


@built
def test_an_extension_that_was_built_from_other_sources_is_not_used(monkeypatch):
    monkeypatch.setattr(tiles, "ARGUMENTS", tiles.ARGUMENTS + 1)
    tiles.compiled.cache_clear()
    with pytest.warns(UserWarning, match="was built from other sources than these, and is not used: build it again"):
        assert tiles.compiled() is None
    tiles.compiled.cache_clear()


def test_a_plan_of_what_is_no_direction_is_refused():
    for joint in (("query_to_quer",), "query_to_query", True):
        with pytest.raises(ValueError, match="joint"):
            explain(8, 8, joint=joint)
