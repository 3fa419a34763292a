"""A loss over ranks with shards of unequal length is the loss of one process, and averaged gradients are its gradients.

One spawn per world size runs all cases (starting processes costs more than they do); the tests compare what came back.
"""

import datetime
import re
import time

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

from hbt_fast.loss import InfoNCELoss, info_nce, info_nce_with_grad, negative_variance, tiles
from hbt_fast.loss.ranks import Ranks

QUERIES, PASSAGES, WIDTH, OWN = (5, 3, 4, 2), (6, 3, 7, 2), 6, 2  # rows per rank
BACKENDS = ("torch", "cpu") if tiles.compiled() else ("torch", "torch-chunked")
GTE = ("query_to_query", "doc_to_query", "doc_to_doc")
CASES = {
    "plain": {},
    "symmetric": {"symmetric": True},
    "sum": {"symmetric": True, "reduction": "sum"},
    "none": {"symmetric": True, "reduction": "none", "ids": True, "duplicates": "positive"},
    "positives": {"symmetric": True, "positives": True},
    "mask": {"symmetric": True, "ids": True, "query_ids": True, "positives": True},
    "further positives": {"symmetric": True, "ids": True, "duplicates": "positive", "positives": True},
    "margin": {"symmetric": True, "false_negative_margin": 0.05, "own": True},
    "weights, own": {"weights": True, "own": True, "ids": True},
    "all": {"symmetric": True, "ids": True, "duplicates": "positive", "false_negative_margin": 0.2, "own": True}
    | {"weights": True, "query_ids": True, "positives": True},
    "both ways in one softmax": {"joint": ("doc_to_query",), "ids": True, "duplicates": "positive", "own": True},
    "queries": {"joint": ("query_to_query",), "query_ids": True},
    "passages": {"joint": ("doc_to_doc",), "ids": True, "owners": True, "positives": True},
    "GTE": {"joint": GTE, "owners": True},
    "GTE, all": {"joint": GTE, "owners": True, "ids": True, "query_ids": True, "positives": True, "own": True}
    | {"weights": True, "duplicates": "positive", "false_negative_margin": 0.2}
    | {"hardness_mode": "hard_negatives", "hardness_strength": 2.0},
    "hardness": {"symmetric": True, "owners": True, "hardness_mode": "in_batch_negatives", "hardness_strength": 3.0},
}


def whole_batch(world, dtype):
    """All ranks' inputs, and for every argument how many rows of it each rank has."""
    n, m = sum(QUERIES[:world]), sum(PASSAGES[:world])
    g = torch.Generator().manual_seed(world)

    def unit(*shape):
        return F.normalize(torch.randn(shape, generator=g, dtype=torch.float64), dim=-1).to(dtype)

    starts = [sum(PASSAGES[:r]) for r in range(world)]
    owners = [torch.randint(-1, QUERIES[r], (PASSAGES[r],), generator=g) for r in range(world)]
    return {
        "q": unit(n, WIDTH),
        "p": unit(m, WIDTH),
        "own": unit(n, OWN, WIDTH),
        "default positives": torch.cat([torch.arange(QUERIES[r]) + starts[r] for r in range(world)]),
        "positives": torch.randint(0, m, (n,), generator=g),
        "passage_ids": torch.randint(0, m // 2, (m,), generator=g),
        "query_ids": torch.randint(0, n // 2, (n,), generator=g),
        "owners": torch.cat([torch.where(x < 0, x, x + sum(QUERIES[:r])) for r, x in enumerate(owners)]),
        "weights": torch.rand(n, generator=g).to(dtype),
        "cotangents": torch.rand(n, generator=g).to(dtype),
    }


def shard(name, x, rank):
    counts = PASSAGES if name in ("p", "passage_ids", "owners") else QUERIES
    x = x[sum(counts[:rank]) : sum(counts[: rank + 1])]
    return torch.where(x < 0, x, x - sum(QUERIES[:rank])) if name == "owners" else x


def compute(b, case, backend, default_positives, group=None):
    """Loss and gradients (of queries, passages, own negatives, scale) from one rank's batch, or from the whole one."""
    o = dict(CASES[case])
    q, p, own = (b[k].clone().requires_grad_() for k in ("q", "p", "own"))
    scale = torch.tensor(5.0, dtype=q.dtype, requires_grad=True)
    flags = {k: o.pop(k, False) for k in ("ids", "query_ids", "positives", "own", "weights", "owners")}
    o |= {
        "positives": b["positives"] if flags["positives"] else default_positives,
        "passage_ids": b["passage_ids"] if flags["ids"] else None,
        "query_ids": b["query_ids"] if flags["query_ids"] else None,
        "own_negatives": own if flags["own"] else None,
        "weights": b["weights"] if flags["weights"] else None,
        "owners": b["owners"] if flags["owners"] else None,
        "workspace_bytes": 600,  # chunks of a few rows
    }
    loss = info_nce(q, p, scale=scale, group=group, backend=backend, **o)
    (loss * b["cotangents"] if loss.ndim else loss).sum().backward()
    result = {"loss": loss.detach(), "q": q.grad, "p": p.grad, "own": own.grad, "scale": scale.grad}
    if loss.ndim == 0:
        direct = info_nce_with_grad(q, p, scale=scale, group=group, backend=backend, **o)
        torch.testing.assert_close(direct.loss, loss.detach(), rtol=0, atol=0)
        for x, y in zip(direct[1:], (q.grad, p.grad, scale.grad), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-7)
    return result


def mistakes(b, rank, group):
    """What each rank raises when only the last one errs, or when ranks disagree: an error everywhere, and no hang."""
    last = rank == dist.get_world_size(group) - 1
    calls = {
        "nan": lambda: info_nce(b["q"] / (0 if last else 1), b["p"], group=group),
        "range": lambda: info_nce(b["q"], b["p"], positives=b["positives"] + 99 * last, group=group),
        "width": lambda: info_nce(b["q"][:, last:], b["p"][:, last:], group=group),
        "symmetric": lambda: info_nce(b["q"], b["p"], symmetric=last, group=group),
        "joint": lambda: info_nce(b["q"], b["p"], joint=GTE[last:], group=group),
        "hardness_mode": lambda: info_nce(
            b["q"], b["p"], hardness_mode="hard_negatives" if last else None, hardness_strength=1.0, group=group
        ),
        "variance": lambda: negative_variance(b["q"] / (0 if last else 1), b["p"], group=group),
    }
    messages = {}
    for name, call in calls.items():
        with pytest.raises(ValueError, match=r".") as e:
            call()
        messages[name] = str(e.value)
    return messages


class Tower(torch.nn.Module):
    """An encoder and a learnable scale under one DDP wrapper."""

    def __init__(self):
        super().__init__()
        self.encoder = torch.nn.Linear(WIDTH, 4, dtype=torch.float64)
        torch.nn.init.eye_(self.encoder.weight)
        torch.nn.init.ones_(self.encoder.bias)
        self.loss = InfoNCELoss(3.0, learnable=True, symmetric=True)

    def forward(self, q, p, **options):
        return self.loss(self.encoder(q), self.encoder(p), **options)


def variance(b, positives, group=None):
    q, p = (b[k].clone().requires_grad_() for k in ("q", "p"))
    loss = negative_variance(q, p, positives=positives, group=group)
    loss.backward()
    return {"loss": loss.detach(), "q": q.grad, "p": p.grad}


def overlap(rank, world, group):
    """A late rank: which passages are there when the own ones are, and that all are in the end."""
    ranks = Ranks(group, rank, tuple(QUERIES[:world]), tuple(PASSAGES[:world]))
    late = world - 1
    if rank == late:
        time.sleep(1)
    p = torch.full((PASSAGES[rank], 2), float(rank))
    gathering = ranks.start_gathering(p, torch.float64, lambda x: x + 1)
    own = gathering.wait(ranks.own_passages).clone()
    still_coming = [block.start for block, *_ in gathering.coming]
    came = {block.start: work.is_completed() for block, _, work in gathering.coming}
    return own, still_coming, came, gathering.wait(slice(0, sum(PASSAGES[:world]))).clone(), gathering.coming


def worker(rank, world, folder):
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", f"file://{folder}/meet", timeout, world_size=world, rank=rank)
    try:
        group, results = dist.group.WORLD, {}
        for dtype in (torch.float64, torch.float32):
            b = {k: shard(k, x, rank) for k, x in whole_batch(world, dtype).items()}
            for backend in BACKENDS:
                for case in CASES:
                    results[dtype, backend, case] = compute(b, case, backend, None, group)
            results[dtype, "variance", None] = variance(b, None, group)
            results[dtype, "variance", "positives"] = variance(b, b["positives"], group)
        results["overlap"] = overlap(rank, world, group)
        b = {k: shard(k, x, rank) for k, x in whole_batch(world, torch.float64).items()}
        results["mistakes"] = mistakes(b, rank, group)
        for backend in BACKENDS:
            model = torch.nn.parallel.DistributedDataParallel(Tower())
            model(b["q"], b["p"], group=group, backend=backend).backward()
            results["ddp", backend] = {k: v.grad for k, v in model.module.named_parameters()}
        torch.save(results, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 3, 4])
def ranks(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(worker, args=(request.param, str(folder)), nprocs=request.param)
    return [torch.load(folder / f"{r}.pt") for r in range(request.param)]


def assert_equal_one(results, one, names, tolerance):
    world = len(results)
    if one["loss"].ndim:
        torch.testing.assert_close(torch.cat([r["loss"] for r in results]), one["loss"], rtol=tolerance, atol=1e-14)
    else:
        for r in results:
            torch.testing.assert_close(r["loss"], one["loss"], rtol=tolerance, atol=0)
    for name in names:
        if one[name] is None:
            assert all(r[name] is None for r in results)
            continue
        whole = torch.cat([r[name] for r in results]) / world  # what averaging the parameters' gradients does
        torch.testing.assert_close(whole, one[name], rtol=tolerance, atol=tolerance * one[name].abs().max().item())
    if "scale" in one:
        for r in results:
            torch.testing.assert_close(r["scale"], one["scale"], rtol=10 * tolerance, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-5)])
def test_loss_and_gradients(ranks, case, backend, dtype, tolerance):
    b = whole_batch(len(ranks), dtype)
    one = compute(b, case, backend, b["default positives"])
    assert_equal_one([r[dtype, backend, case] for r in ranks], one, ("q", "p", "own"), tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-5)])
@pytest.mark.parametrize("positives", [None, "positives"])
def test_variance(ranks, positives, dtype, tolerance):
    b = whole_batch(len(ranks), dtype)
    one = variance(b, b[positives or "default positives"])
    assert_equal_one([r[dtype, "variance", positives] for r in ranks], one, ("q", "p"), tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
def test_parameters_under_ddp_learnable_scale_included(ranks, backend):
    # inf-cl, open_clip #616, contrastors: the scale's gradient wrong by a factor under data parallelism
    b, model = whole_batch(len(ranks), torch.float64), Tower()
    info_nce_loss = model(b["q"], b["p"], positives=b["default positives"])
    info_nce_loss.backward()
    for r in ranks:
        for name, parameter in model.named_parameters():
            tolerance = 1e-6 if name == "loss.log_scale" else 1e-10  # that parameter is fp32
            torch.testing.assert_close(r["ddp", backend][name], parameter.grad, rtol=tolerance, atol=1e-13)


def test_own_passages_are_worked_on_while_those_of_a_late_rank_are_coming(ranks):
    world = len(ranks)
    late_start = sum(PASSAGES[: world - 1])
    for rank, r in enumerate(ranks):
        own, still_coming, came, everything, coming = r["overlap"]
        assert torch.equal(own, torch.full((PASSAGES[rank], 2), rank + 1.0, dtype=torch.float64))
        assert len(still_coming) == world - 1
        if rank < world - 1:
            assert not came[late_start]
        expected = torch.arange(1.0, world + 1).repeat_interleave(torch.tensor(PASSAGES[:world]))
        assert torch.equal(everything[:, 0], expected.double())
        assert coming == []


def test_a_mistake_on_one_rank_raises_on_all(ranks):
    *others, last = [r["mistakes"] for r in ranks]
    assert "queries contains NaN" in last["nan"]
    assert "queries contains NaN" in last["variance"]
    for r in others:
        for name in ("nan", "variance"):
            assert f"wrong on rank {len(ranks) - 1}" in r[name]
    for r in (*others, last):
        assert "positives must be passage indices" in r["range"]
        assert "the width d must be the same on every rank" in r["width"]
        for name in ("symmetric", "joint", "hardness_mode"):
            assert re.search(f"{name}.* must be the same on every rank", r[name])
