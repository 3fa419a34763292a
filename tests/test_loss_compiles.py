"""torch.compile(fullgraph=True) takes the loss as one operator: the same values, gradients and errors as without."""

import pytest
import torch
from test_loss_tiled_equals_dense import TILED, case

from hbt_fast.loss import InfoNCELoss, info_nce


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["torch", *TILED])
@pytest.mark.parametrize(("reduction", "symmetric"), [("mean", False), ("none", True)])
def test_compiled_equals_eager(backend, reduction, symmetric):
    args, o = case(12, 20, 8, torch.float64, True, True, True)
    o |= {"symmetric": symmetric, "duplicates": "mask", "reduction": reduction, "backend": backend}
    o |= {"joint": () if symmetric else ("query_to_query", "doc_to_doc"), "owners": torch.arange(20) % 13 - 1}
    o |= {"hardness_mode": "hard_negatives", "hardness_strength": 2.0}
    own = o.pop("own_negatives")

    def step(q, p, scale, own):
        q, p = torch.nn.functional.normalize(q, dim=1), torch.nn.functional.normalize(p, dim=1)
        return info_nce(q, p, scale=scale.exp(), own_negatives=own, **o)

    results = []
    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaves = [x.clone().requires_grad_() for x in (*args, torch.tensor(2.0, dtype=torch.float64), own)]
        loss = run(*leaves)
        (loss * torch.arange(2.0, 2 + loss.numel(), dtype=loss.dtype)).sum().backward()
        results.append([loss.detach(), *(x.grad for x in leaves)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_a_module_with_a_learnable_scale_compiles_and_a_new_batch_size_is_taken():
    module = InfoNCELoss(10.0, learnable=True)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for n in (5, 9, 9):
        args, _ = case(n, n + 3, 8, torch.float32, False, False, False)
        q = args[0].requires_grad_()
        gradients = []
        for run in (module, compiled):
            module.zero_grad()
            gradients.append([*torch.autograd.grad(run(q, args[1]), [q, module.log_scale])])
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b)


def test_only_what_requires_grad_gets_one():
    args, _ = case(6, 6, 4, torch.float32, False, False, False)
    compiled = torch.compile(lambda q, p: info_nce(q, p, scale=5.0), fullgraph=True, backend="aot_eager")
    p = args[1].requires_grad_()
    compiled(args[0], p).backward()
    assert args[0].grad is None
    assert p.grad is not None
    with torch.no_grad():
        assert not compiled(args[0], p).requires_grad


def test_a_mistake_still_has_its_message():
    compiled = torch.compile(lambda q, p: info_nce(q, p), fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="queries contains NaN or Inf, first in row 0"):
        compiled(torch.full((3, 2), float("nan")), torch.ones(3, 2))
