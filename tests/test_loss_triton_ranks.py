"""`backend="triton"` over several ranks is one process's loss; ranks work while passages of a late one are coming."""

import datetime
import itertools
import time

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from test_loss_ranks_equal_one import QUERIES, assert_equal_one, compute, shard, whole_batch
from test_loss_triton_claims import DEVICE, _way  # noqa: F401 (a fixture for every test)

from hbt_fast.kernels import fused, sweep
from hbt_fast.loss import info_nce_with_grad, planner, ranks


def late_passages(rank, world, group, way, symmetric, workspace_bytes):
    """A call in which the last rank sends its passages late: what was still coming when the first kernel began."""
    q, p = (shard("q", whole_batch(world, torch.float32)[name][: sum(QUERIES[:world])], rank) for name in "qp")
    module, name = (fused, "exp_rows") if not symmetric else (fused, "row_and_column_statistics")
    if way == "sweep" or (symmetric and workspace_bytes is None):  # then all is kept
        module, name = sweep, "products"
    begin, kernel, seen = ranks.Gathering.__init__, getattr(module, name), []

    def late(gathering, *arguments):
        if rank == world - 1:
            time.sleep(1)
        begin(gathering, *arguments)
        seen.append(gathering)

    def noted(q_RD, p_CD, *arguments, **named):
        seen.append((len(p_CD), [len(x) for _, x, work in seen[0].coming if not work.is_completed()]))
        return kernel(q_RD, p_CD, *arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks.Gathering, "__init__", late)
        patch.setattr(module, name, noted)
        o = {"symmetric": symmetric, "workspace_bytes": workspace_bytes, "backend": "triton"}
        result = info_nce_with_grad(q, p, scale=5.0, group=group, **o)
    return tuple(result), seen[1:]


SOME_CASES = ("symmetric", "none", "weights, own", "all", "passages", "GTE, all", "hardness")
LATE = list(itertools.product((False, True), (1, None)))


def rank_of_triton(rank, world, way, folder):
    torch.set_num_threads(1)
    planner.WAY, planner.GPU_ROWS = way, 2
    limit = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", f"file://{folder}/meet", limit, world_size=world, rank=rank)
    try:
        group = dist.group.WORLD
        b = {name: shard(name, x, rank) for name, x in whole_batch(world, torch.float32).items()}
        results = {name: compute(b, name, "triton", None, group) for name in SOME_CASES}
        for call in LATE:
            results[call] = late_passages(rank, world, group, way, *call)
        torch.save(results, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(DEVICE == "cuda", reason="its ranks are processes on a CPU")
def test_ranks_equal_one_and_work_on_their_own_passages_first(tmp_path):
    """A late rank: the others' first kernel sees their own passages only, and begins before all have come."""
    world = 3
    mp.spawn(rank_of_triton, args=(world, planner.WAY, str(tmp_path)), nprocs=world)
    results = [torch.load(tmp_path / f"{r}.pt") for r in range(world)]
    b = whole_batch(world, torch.float32)
    for name in SOME_CASES:
        one = compute(b, name, "torch", b["default positives"])
        assert_equal_one([r[name] for r in results], one, ("q", "p", "own"), 2e-5)
    count = sum(QUERIES[:world])
    for call in LATE:
        one = info_nce_with_grad(b["q"], b["p"][:count], scale=5.0, symmetric=call[0], backend="torch")
        names = ("loss", "q", "p", "scale")
        found = [dict(zip(names, r[call][0], strict=True)) for r in results]
        assert_equal_one(found, dict(zip(names, one, strict=True)), ("q", "p"), 2e-5)
        for rank in range(world - 1):
            (first, coming), *others = results[rank][call][1]
            assert first == QUERIES[rank]
            assert QUERIES[world - 1] in coming
            assert sorted([first, *(size for size, _ in others[: world - 1])]) == sorted(QUERIES[:world])
            assert {size for size, _ in others[world - 1 :]} <= {count}
