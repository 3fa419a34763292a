"""`backend="triton"` keeps the loss contract: on a GPU where there is one, else in Triton's interpreter.

In the suite it runs in a process of its own (test_kernels_interpreted.py), as do the claims about its memory and about
several ranks (test_loss_triton_*.py); on a GPU run these files themselves.
"""

import itertools
import os

import pytest
import torch
import torch.nn.functional as F
from test_loss_tiled_equals_dense import case

from hbt_fast.loss import explain, info_nce, info_nce_with_grad, planner

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1 before triton is imported", allow_module_level=True)

GTE = ("query_to_query", "doc_to_query", "doc_to_doc")
JOINT = (
    ((), "in_batch_negatives"),
    ((), "hard_negatives"),
    (("query_to_query",), None),
    (("doc_to_query",), "all_negatives"),
    (("query_to_query", "doc_to_doc"), "hard_negatives"),
    (GTE, None),
)
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
if DEVICE == "cuda":  # the interpreter's bf16 is wrong
    DTYPES["bf16"] = torch.bfloat16


@pytest.fixture(autouse=True, params=["fused", "sweep"])
def _way(request, monkeypatch):
    monkeypatch.setattr(planner, "WAY", request.param)
    monkeypatch.setattr(planner, "GPU_ROWS", 16)


def on_device(args, options, dtype):
    def put(x):
        return x.to(DEVICE, dtype if x.is_floating_point() else None) if isinstance(x, torch.Tensor) else x

    return [put(x) for x in args], {name: put(x) for name, x in options.items()}


def error(a, b):
    """Relative to the size of what is expected, and of 1e-3 for what is nearly nothing."""
    return ((a.double().cpu() - b.cpu()).norm() / (b.norm().cpu() + 1e-3)).item()


def assert_no_worse_than_twice_torch(args, options, compute_dtype, **more):
    """Against float64, beside torch with the operands rounded alike.

    That torch keeps the gradient with respect to the logits in fp32. A tensor core takes it rounded as the operands
    are, which adds a relative error of their unit roundoff at most.
    """
    truth = info_nce_with_grad(*on_device(args, {}, torch.float64)[0], **on_device([], options, torch.float64)[1])
    args, options = on_device(args, options, torch.float32)
    compute = None if compute_dtype == "fp32" else compute_dtype
    ours = info_nce_with_grad(*args, **options, compute_dtype=compute, backend="triton", **more)
    dense = info_nce_with_grad(*args, **options, compute_dtype=compute, backend="torch")
    rounding = {"fp32": 1e-5, "fp16": 2**-11, "bf16": 2**-8}[compute_dtype]
    for name, a, b, t in zip(("loss", "queries", "passages", "scale"), ours, dense, truth, strict=True):
        assert error(a, t) <= 2 * error(b, t) + rounding, name
    if truth.own_negatives is not None:
        a, b, t = ours.own_negatives, dense.own_negatives, truth.own_negatives
        assert error(a, t) <= 2 * error(b, t) + rounding


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("workspace_bytes", [1, None])  # several panels; one, with all logits kept if symmetric
def test_every_combination_of_options(dtype, symmetric, workspace_bytes):
    flags = itertools.product(("mask", "positive"), (False, True), (False, True), (False, True), (None, 0.05))
    for duplicates, ids, own, positives, margin in flags:
        args, o = case(23, 41, 9, torch.float64, ids, own, positives)
        o |= {"symmetric": symmetric, "duplicates": duplicates, "false_negative_margin": margin, "scale": 10.0}
        o["query_ids"] = torch.arange(23) // 2 if ids else None
        if dtype != "fp32" and margin is not None:
            o["false_negative_margin"] = 0.5  # no candidate so near the limit that rounding decides
        assert_no_worse_than_twice_torch(args, o, dtype, workspace_bytes=workspace_bytes)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("workspace_bytes", [1, None])
def test_joint_directions_and_hardness(dtype, workspace_bytes):
    for joint, mode in JOINT:
        ids = mode in (None, "hard_negatives")
        args, o = case(23, 41, 9, torch.float64, ids, mode is not None, ids and mode is not None)
        o |= {"symmetric": not joint, "joint": joint, "scale": 10.0, "owners": torch.arange(41) % 24 - 1}
        o |= {"hardness_mode": mode, "hardness_strength": 3.0, "duplicates": "positive" if mode is None else "mask"}
        o["query_ids"] = torch.arange(23) // 2 if ids else None
        o["false_negative_margin"] = 0.5 if mode == "all_negatives" else None
        assert_no_worse_than_twice_torch(args, o, dtype, workspace_bytes=workspace_bytes)


def test_a_direction_without_negatives_beside_very_small_logits_spoils_nothing():
    # exp(0 - maximum) overflows where the maximum is that of another direction, or of own negatives
    q = F.normalize(torch.randn(6, 8, generator=torch.manual_seed(0), dtype=torch.float64), dim=-1)
    ids = torch.zeros(6, dtype=torch.int64)
    options = {"passage_ids": ids, "own_negatives": -q[:, None], "scale": 200.0}
    assert_no_worse_than_twice_torch([q, q.clone()], options, "fp32")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "m", "d"), [(1, 1, 1), (2, 2, 3), (1, 70, 16), (63, 65, 17), (65, 127, 123)])
def test_odd_shapes_and_scales(dtype, n, m, d):
    for symmetric, scale in ((False, 1.0), (True, 50.0), (False, 200.0), (True, 200.0)):
        args, _ = case(n, m, d, torch.float64, False, False, False)
        near = F.normalize(args[1][:n] + 0.3 * args[0], dim=-1)
        assert_no_worse_than_twice_torch([near, args[1]], {"scale": scale, "symmetric": symmetric}, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [False, True])
def test_gradients_are_right_at_a_loss_of_a_billionth(dtype, symmetric):
    n = 32
    q = F.normalize(torch.eye(n, dtype=torch.float64) + 0.02 * torch.randn(n, n, generator=torch.manual_seed(0)), dim=1)
    p = F.normalize(torch.eye(n, dtype=torch.float64) + 0.02 * torch.randn(n, n, generator=torch.manual_seed(1)), dim=1)
    q, p = (x.to(DTYPES[dtype]).double().to(DEVICE) for x in (q, p))
    exact = info_nce_with_grad(q, p, scale=25.0, symmetric=symmetric, backend="torch")
    compute = None if dtype == "fp32" else dtype
    ours = info_nce_with_grad(
        q.float(), p.float(), scale=25.0, symmetric=symmetric, compute_dtype=compute, backend="triton"
    )
    assert exact.loss < 3e-9
    for a, b in zip(ours, exact, strict=True):
        assert ((a.double() - b).norm() / b.norm()).item() < (1e-5 if dtype == "fp32" else 4e-3)


@pytest.mark.parametrize("dtype", DTYPES.values())
def test_autograd_non_contiguous_halves_and_a_learnable_scale(dtype):
    args, _ = case(20, 30, 8, torch.float64, False, False, False)
    for symmetric in (False, True):
        leaves = [x.to(DEVICE, dtype).T.contiguous().T.requires_grad_() for x in args]
        scale = torch.tensor(5.0, device=DEVICE, requires_grad=True)
        loss = info_nce(*leaves, scale=scale, symmetric=symmetric, backend="triton")
        (3 * loss).backward()
        doubles = [x.detach().double().requires_grad_() for x in (*leaves, scale)]
        expected = info_nce(*doubles[:2], scale=doubles[2], symmetric=symmetric, backend="torch")
        (3 * expected).backward()
        for x, y in zip((*leaves, scale), doubles, strict=True):
            assert x.grad.dtype == x.dtype
            assert error(x.grad, y.grad) < (1e-5 if dtype == torch.float32 else 1e-2)


def test_twice_the_same_call_is_bitwise_the_same():
    args, o = case(40, 50, 16, torch.float32, True, True, True)
    args, o = on_device(args, o, torch.float32)
    o |= {"duplicates": "positive", "backend": "triton", "compute_dtype": "fp16"}
    for more in ({"symmetric": True}, {"joint": GTE, "hardness_mode": "hard_negatives", "hardness_strength": 3.0}):
        more["owners"] = torch.arange(50, device=DEVICE) % 40
        a, b = info_nce_with_grad(*args, **o, **more), info_nce_with_grad(*args, **o, **more)
        assert all(torch.equal(x, y) for x, y in zip((*a, a.own_negatives), (*b, b.own_negatives), strict=True))


HALF = {"backend": "triton", "dtype": torch.float16, "operands": torch.float16, "workspace_bytes": 2**30}


def test_the_plan():
    one, both = (explain(65536, 65536, d=768, symmetric=s, device=DEVICE, **HALF) for s in (False, True))
    assert (one.passes, both.passes) == (3, 4)
    assert max(one.extra_bytes, both.extra_bytes) <= 2**30
    small = explain(4096, 4096, symmetric=True, device=DEVICE, **HALF)
    assert (small.passes, small.keep, small.way) == (3, True, "sweep")


@pytest.mark.skipif(DEVICE != "cuda", reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("symmetric", [False, True])
def test_a_call_can_be_captured_in_a_cuda_graph(symmetric):
    args, _ = case(40, 50, 16, torch.float32, False, False, False)
    q, p = (x.cuda().half() for x in args)
    scale = torch.tensor(20.0, device="cuda")
    o = {"scale": scale, "symmetric": symmetric, "backend": "triton", "workspace_bytes": 2**26}
    expected = info_nce_with_grad(q, p, **o)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        info_nce_with_grad(q, p, **o)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        captured = info_nce_with_grad(q, p, **o)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))
