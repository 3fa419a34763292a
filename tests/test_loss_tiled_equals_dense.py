"""The tiled backends are `torch` with less memory: same values and gradients under every combination of options."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from hbt_fast.loss import info_nce, info_nce_with_grad, planner, tiles
from hbt_fast.loss.panels import Statistics

built = pytest.mark.skipif(tiles.compiled() is None, reason="csrc/ was not built here")
GTE = ("query_to_query", "doc_to_query", "doc_to_doc")
HARD = {"owners": torch.arange(50) % 41 - 1, "hardness_mode": "hard_negatives", "hardness_strength": 3.0}
TILED = ["torch-chunked", pytest.param("cpu", marks=built)]


def case(n, m, d, dtype, ids, own, positives, seed=0):
    g = torch.Generator().manual_seed(seed)

    def unit(*shape):
        return F.normalize(torch.randn(shape, generator=g, dtype=torch.float64), dim=-1).to(dtype)

    return (unit(n, d), unit(m, d)), {
        "passage_ids": torch.randint(0, m // 2 + 1, (m,), generator=g) if ids else None,
        "own_negatives": unit(n, 3, d) if own else None,
        "positives": torch.randint(0, m, (n,), generator=g) if positives else None,
    }


def assert_same(a, b, rtol):
    for x, y in zip((*a, a.own_negatives), (*b, b.own_negatives), strict=True):
        if x is not None or y is not None:
            torch.testing.assert_close(x, y, rtol=rtol, atol=rtol * y.abs().max().item())


@pytest.mark.parametrize("backend", TILED)
@pytest.mark.parametrize("duplicates", ["mask", "positive"])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("workspace_bytes", [1, 4000, None])  # one row, a few rows, everything kept
def test_every_combination_of_options(monkeypatch, backend, duplicates, symmetric, workspace_bytes):
    monkeypatch.setattr(planner, "TILE_ELEMENTS", 100)  # several tiles in a panel
    flags = itertools.product((False, True), (False, True), (False, True), (None, 0.05), (False, True), ("mean", "sum"))
    for ids, own, positives, margin, weights, reduction in flags:
        args, o = case(23, 41, 9, torch.float64, ids, own, positives)
        o |= {"symmetric": symmetric, "duplicates": duplicates, "false_negative_margin": margin, "reduction": reduction}
        o["weights"] = torch.linspace(0, 1, 23) if weights else None
        o["query_ids"] = torch.arange(23) // 2 if weights and ids else None
        dense = info_nce_with_grad(*args, **o, backend="torch")
        tiled = info_nce_with_grad(*args, **o, backend=backend, workspace_bytes=workspace_bytes)
        assert_same(tiled, dense, 1e-12)


@pytest.mark.parametrize("backend", TILED)
@pytest.mark.parametrize(("n", "m", "d"), [(252, 507, 123), (1, 1, 1), (1, 2, 3), (64, 64, 17), (5, 130, 1)])
@pytest.mark.parametrize("compute_dtype", [None, "fp16", "bf16", "tf32", "fp32"])
def test_odd_shapes_in_single_precision(backend, n, m, d, compute_dtype):
    for symmetric, workspace_bytes in ((False, None), (True, None), (True, 100_000)):
        args, o = case(n, m, d, torch.float32, n < m, n > 5, False)
        o |= {"symmetric": symmetric, "compute_dtype": compute_dtype}
        dense = info_nce_with_grad(*args, **o, backend="torch")
        tiled = info_nce_with_grad(*args, **o, backend=backend, workspace_bytes=workspace_bytes)
        assert_same(tiled, dense, 2e-5)


@pytest.mark.parametrize("needs", list(itertools.product((False, True), repeat=4)))
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("joint", [(), GTE])
def test_any_subset_of_inputs_may_require_grad(needs, reduction, joint):
    args, o = case(7, 12, 5, torch.float64, True, True, True)
    o["joint"] = joint
    grads = []
    for backend in ("torch", "torch-chunked"):
        leaves = [*args, torch.tensor(5.0, dtype=torch.float64), o["own_negatives"]]
        leaves = [x.clone().requires_grad_(need) for x, need in zip(leaves, needs, strict=True)]
        q, p, scale, own = leaves
        loss = info_nce(q, p, **o | {"scale": scale, "own_negatives": own}, reduction=reduction, backend=backend)
        assert loss.requires_grad == any(needs)
        if any(needs):
            (loss * torch.arange(1.0, 1 + loss.numel(), dtype=torch.float64)).sum().backward()
        grads.append([x.grad for x in leaves])
    for a, b, need in zip(*grads, needs, strict=True):
        assert (a is not None) == (b is not None) == need
        if need:
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-14)


class LargestTensor(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return out


@pytest.mark.parametrize("backend", TILED)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("positives", [False, True])
def test_tiled_makes_nothing_of_n_times_m(backend, symmetric, positives):
    args, o = case(300, 400, 8, torch.float32, True, False, positives)
    o |= {"symmetric": symmetric, "false_negative_margin": 0.1}
    o |= {} if symmetric else {"joint": GTE, **HARD, "owners": torch.arange(400) % 301 - 1}
    with LargestTensor() as dense:
        info_nce_with_grad(*args, **o, backend="torch")
    with LargestTensor() as tiled:
        info_nce_with_grad(*args, **o, backend=backend, workspace_bytes=200_000)
    assert dense.elements >= 300 * 400
    assert 4 * tiled.elements <= 200_000


@pytest.mark.parametrize("backend", ["torch", *TILED])
@pytest.mark.parametrize("more", [{"symmetric": True}, {"joint": GTE, **HARD}])
def test_twice_the_same_call_is_bitwise_the_same_and_inputs_stay(backend, more):
    args, o = case(40, 50, 16, torch.float32, True, True, True)
    before = [x.clone() for x in (*args, o["own_negatives"])]
    o |= {"duplicates": "positive", "backend": backend, "workspace_bytes": 20_000, **more}
    a, b = info_nce_with_grad(*args, **o), info_nce_with_grad(*args, **o)
    for x, y in zip((*a, a.own_negatives), (*b, b.own_negatives), strict=True):
        assert torch.equal(x, y)
    for x, y in zip(before, (*args, o["own_negatives"]), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("backend", ["torch", "torch-chunked"])
def test_non_contiguous_inputs(backend):
    args, _ = case(20, 30, 8, torch.float64, False, False, False)
    strided = [x.T.contiguous().T for x in args]
    strided[1] = torch.stack([strided[1], strided[1] * 0], dim=2)[:, :, 0]
    assert not any(x.is_contiguous() for x in strided)
    for symmetric in (False, True):
        a = info_nce_with_grad(*strided, symmetric=symmetric, backend=backend)
        assert_same(a, info_nce_with_grad(*args, symmetric=symmetric, backend=backend), 1e-12)


@built
def test_the_compiled_exp_is_right_to_the_last_bit_or_two():
    x = torch.linspace(-86.9, 0, 2**16).view(256, 256)
    e, keys = x.clone(), torch.zeros(256, dtype=torch.int32)
    no_options = (None,) * 11
    row = Statistics(torch.zeros(256), torch.ones(256))
    tiles.compiled().gradient(e, row, torch.ones(256), None, None, (keys, keys + 1, *no_options))
    assert (e.double() / x.double().exp() - 1).abs().max() < 1e-7
