"""GradCache's own cache step trains the same parameters with its losses and with ours."""

import importlib
import importlib.util
import math
import sys

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import run_ranks

from hbt_fast import InfoNCELoss
from hbt_fast.integrations.gradcache import (
    ContrastiveLossWithQueryClosure,
    DistributedContrastiveLoss,
    SimpleContrastiveLoss,
)

TOLERANCE = 1e-5  # of the way that was moved: see test_drop_in_torch.py
STEPS, BATCH, WIDTH = 3, 10, 16


def grad_cache():
    """The package: from GitHub it is grad_cache; on PyPI (0.0.1) gradcache, which imports itself as grad_cache."""
    if importlib.util.find_spec("grad_cache") is None:
        sys.modules.setdefault("grad_cache", pytest.importorskip("gradcache"))
    package = sys.modules.get("grad_cache") or importlib.import_module("grad_cache")
    cache, loss = (package_part(part, package) for part in ("grad_cache", "loss"))
    return cache.GradCache, loss.SimpleContrastiveLoss, loss.DistributedContrastiveLoss


def package_part(name, package=None):
    if package is None:
        grad_cache()
        package = sys.modules["grad_cache"]
    return importlib.import_module(f"{package.__name__}.{name}")


class Tower(torch.nn.Module):
    def __init__(self, dropout):
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(WIDTH, 24), torch.nn.Tanh(), torch.nn.Dropout(dropout), torch.nn.Linear(24, 8)
        )

    def forward(self, x):
        return 3 * F.normalize(self.layers(x), dim=-1)  # GradCache's loss has no scale: users put it here


def batches(passages):
    g = torch.Generator().manual_seed(1)
    return [
        (torch.randn(BATCH, WIDTH, generator=g), torch.randn(BATCH * passages, WIDTH, generator=g))
        for _ in range(STEPS)
    ]


def train(loss_fn, data, *, dropout=0.0, times=1.0, **keywords):
    """STEPS cache steps of chunks of 4 with one tower for both sides; ranks average, as DDP does."""
    tower = Tower(dropout)
    step = grad_cache()[0](models=[tower, tower], chunk_sizes=4, loss_fn=loss_fn)
    torch.manual_seed(2)
    losses = []
    for q, p in data:
        losses.append(step(q, p, **keywords))
        for x in tower.parameters():
            if dist.is_initialized():
                dist.all_reduce(x.grad)
                x.grad /= dist.get_world_size()
            x.data -= 0.05 * times * x.grad
            x.grad = None
    return {name: x.detach() for name, x in tower.named_parameters()}, torch.stack(losses)


def assert_moved_alike(ours, theirs):
    start = dict(Tower(0.0).named_parameters())
    for name, x in theirs.items():
        way = (x - start[name]).norm()
        assert way > 1e-3, name
        assert (ours[name] - x).norm() <= TOLERANCE * way, name


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("negatives", [0, 2])
def test_a_cache_step_trains_equal_parameters_with_dropout_on(negatives, reduction):
    data, keywords = batches(1 + negatives), {"reduction": reduction, "dropout": 0.2}
    theirs, their_losses = train(grad_cache()[1](negatives), data, **keywords)
    ours, our_losses = train(SimpleContrastiveLoss(negatives), data, **keywords)
    assert_moved_alike(ours, theirs)
    torch.testing.assert_close(our_losses, their_losses, rtol=1e-5, atol=0)


def test_targets_may_be_given():
    target = torch.randperm(2 * BATCH, generator=torch.Generator().manual_seed(3))[:BATCH]
    theirs, _ = train(grad_cache()[1](), batches(2), target=target)
    ours, _ = train(SimpleContrastiveLoss(), batches(2), target=target)
    assert_moved_alike(ours, theirs)


def test_the_plain_module_is_a_loss_fn_as_it_is():
    theirs, _ = train(grad_cache()[1](), batches(1))
    ours, _ = train(InfoNCELoss(scale=1.0), batches(1), reduction="mean")
    assert_moved_alike(ours, theirs)


@pytest.mark.parametrize("negatives", [0, 2])
def test_passages_alone_may_be_cached_and_the_queries_come_from_a_closure(negatives):
    def train_passages(loss_fn):
        tower, queries = Tower(0.2), Tower(0.0)
        step = grad_cache()[0](models=[tower], chunk_sizes=4, loss_fn=loss_fn)
        torch.manual_seed(2)
        for q, p in batches(1 + negatives):
            step(p, query_closure=lambda q=q: queries(q))
            for x in (*tower.parameters(), *queries.parameters()):
                x.data -= 0.05 * x.grad
                x.grad = None
        return [{name: x.detach() for name, x in t.named_parameters()} for t in (tower, queries)]

    theirs = train_passages(package_part("loss").ContrastiveLossWithQueryClosure(negatives))
    ours = train_passages(ContrastiveLossWithQueryClosure(negatives))
    for ours_of, theirs_of in zip(ours, theirs, strict=True):
        assert_moved_alike(ours_of, theirs_of)
    (q, p) = batches(1 + negatives)[0]
    both = ContrastiveLossWithQueryClosure(negatives)(q, p, reduction="sum")
    assert both == SimpleContrastiveLoss(negatives)(q, p, reduction="sum")


def test_a_closure_beside_queries_or_neither_is_refused():
    (q, p), loss = batches(1)[0], ContrastiveLossWithQueryClosure()
    for reps, closure in (((q, p), lambda: q), ((p,), None), ((), lambda: q)):
        with pytest.raises(ValueError, match=f"got {len(reps)} tensors and (no|a) query_closure; pass the passages"):
            loss(*reps, query_closure=closure)


def test_the_functional_form_trains_equal_parameters():
    functional = package_part("functional")

    def train_functionally(loss_fn):
        tower = Tower(0.2)
        embed, loss_of = functional.cached(tower), functional.cat_input_tensor(loss_fn)
        torch.manual_seed(2)
        for q, p in batches(1):
            parts = [[embed(x) for x in side.split(4)] for side in (q, p)]
            loss_of(*([reps for reps, _ in side] for side in parts)).backward()
            for reps, finish in (*parts[0], *parts[1]):
                finish(reps)
            for x in tower.parameters():
                x.data -= 0.05 * x.grad
                x.grad = None
        return {name: x.detach() for name, x in tower.named_parameters()}

    assert_moved_alike(train_functionally(SimpleContrastiveLoss()), train_functionally(grad_cache()[1]()))


def test_content_ids_are_in_the_order_of_the_passages():
    (q, p), ids = batches(3)[0], torch.arange(3 * BATCH)
    ids[4] = ids[0]  # a hard negative of query 1 is the positive of query 0
    scores = q @ p.T
    scores[0, 4] = -math.inf
    expected = F.cross_entropy(scores, 3 * torch.arange(BATCH))
    torch.testing.assert_close(SimpleContrastiveLoss(2)(q, p, passage_ids=ids), expected)
    torch.testing.assert_close(SimpleContrastiveLoss(2, passage_ids=ids)(q, p), expected)


def test_a_wrong_number_of_passages_is_refused(monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: False)  # an earlier test of this process may have left a group
    (q, p) = batches(2)[0]
    with pytest.raises(ValueError, match=r"n_hard_negatives=2 means 3 passages per query.*30 for 10.*there are 20"):
        SimpleContrastiveLoss(2)(q, p)
    with pytest.raises(ValueError, match="n_hard_negatives"):
        SimpleContrastiveLoss(-1)
    with pytest.raises(RuntimeError, match="init_process_group"):
        DistributedContrastiveLoss()


def worker(rank, world, out):
    dist.init_process_group("gloo")
    half = BATCH // world
    data = [(q.view(world, half, -1)[rank], p.view(world, 2 * half, -1)[rank]) for q, p in batches(2)]
    ours, losses = train(DistributedContrastiveLoss(1), data)
    theirs, _ = train(grad_cache()[2](1), data, times=world)
    torch.save((ours, theirs, losses), f"{out}/{rank}.pt")


def test_two_ranks_train_the_whole_batch_where_theirs_needs_the_factor_world_size(tmp_path):
    grad_cache()
    run_ranks(worker, 2, str(tmp_path))
    truth, true_losses = train(SimpleContrastiveLoss(1), batches(2))
    for rank in range(2):
        ours, theirs, losses = torch.load(tmp_path / f"{rank}.pt")
        assert_moved_alike(ours, truth)
        assert_moved_alike(theirs, truth)
        torch.testing.assert_close(losses, true_losses, rtol=1e-5, atol=0)
