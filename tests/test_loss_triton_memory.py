"""What `backend="triton"` takes beyond inputs and gradients is what `explain` says, every buffer counted.

Without a GPU every tensor that torch makes is counted; on one, what its allocator says.
"""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from test_loss_triton_claims import DEVICE, DTYPES, _way  # noqa: F401 (a fixture for every test)
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from hbt_fast.kernels import library
from hbt_fast.loss import explain, info_nce_with_grad, planner


class Storages(TorchDispatchMode):
    """Bytes of tensors that torch makes: those alive, and their peak."""

    def __init__(self, *given):
        super().__init__()
        self.alive, self.peak = {id_of(x): 0 for x in given}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        for x in tree_leaves(results):
            if isinstance(x, torch.Tensor) and id_of(x) not in self.alive:
                self.alive[id_of(x)] = x.untyped_storage().nbytes()
                weakref.finalize(x.untyped_storage(), self.alive.pop, id_of(x))
                if sum(self.alive.values()) > self.peak:
                    gc.collect()  # the interpreter holds its kernels' arguments in cycles
                    self.peak = max(self.peak, sum(self.alive.values()))
        return results


def id_of(x):
    return x.untyped_storage()._cdata


@pytest.fixture
def extra_memory(monkeypatch):
    """`extra_memory(q, p, **options)`: bytes that a call takes beyond its inputs and gradients at the most."""
    halves = library._add_product_of_halves

    def unseen(*arguments):
        with _disable_current_modes():
            return halves(*arguments)

    def measure(q, p, **o):
        if DEVICE == "cuda":
            info_nce_with_grad(q, p, **o)  # the library takes its workspace
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            results = info_nce_with_grad(q, p, **o)
            peak = torch.cuda.max_memory_allocated() - before
        else:
            monkeypatch.setattr(library, "_add_product_of_halves", unseen)
            gc.collect()
            gc.freeze()
            with Storages(q, p, *(x for x in o.values() if isinstance(x, torch.Tensor))) as storages:
                results = info_nce_with_grad(q, p, **o)
            peak = storages.peak
        return peak - sum(x.nbytes for x in results)

    yield measure
    gc.unfreeze()


@pytest.mark.parametrize("dtype", DTYPES.values())
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("workspace_bytes", [2**19, 2**21])  # several panels; one, with all logits kept if symmetric
def test_memory_beyond_inputs_and_gradients_is_what_the_plan_says(extra_memory, dtype, symmetric, workspace_bytes):
    n, d = 384, 128
    q, p = (F.normalize(torch.randn(n, d), dim=1).to(DEVICE, dtype) for _ in range(2))
    o = {"symmetric": symmetric, "workspace_bytes": workspace_bytes, "backend": "triton"}
    plan = explain(n, n, d=d, dtype=dtype, operands=dtype, device=DEVICE, **o)
    assert plan.extra_bytes <= workspace_bytes
    assert (plan.panel_rows < n) == (workspace_bytes == 2**19)
    if symmetric and plan.keep:
        o |= {"passage_ids": torch.arange(n, device=DEVICE) // 2, "query_ids": torch.arange(n, device=DEVICE) // 3}
        o |= {"false_negative_margin": 0.5, "weights": torch.rand(n, device=DEVICE)}
    extra = extra_memory(q, p, **o)
    rounding = 2**16 if DEVICE == "cuda" else 0  # its allocator's, to 512 bytes
    assert 0.6 * plan.extra_bytes <= extra <= plan.extra_bytes + rounding


@pytest.mark.parametrize("symmetric", [False, True])
def test_copies_that_are_needed_are_planned_for(extra_memory, symmetric):
    """Operands rounded to halves, and passages laid out anew; their plan is made from what was copied."""
    n, d = 384, 128
    q, p = (F.normalize(torch.randn(n, d), dim=1).to(DEVICE) for _ in range(2))
    o = {"symmetric": symmetric, "workspace_bytes": 2**21, "backend": "triton", "compute_dtype": "fp16"}
    same = {name: o[name] for name in ("symmetric", "workspace_bytes", "backend")}
    plain = explain(n, n, d=d, operands=torch.float16, device=DEVICE, **same)
    assert extra_memory(q, p, **o) <= plain.extra_bytes <= 2**21
    assert extra_memory(q, p, positives=torch.arange(n, device=DEVICE).flip(0), **o) <= 2**21


@pytest.mark.skipif(DEVICE != "cuda", reason="at size on a GPU only")
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_one_gib_is_enough_for_65536_halves(extra_memory, monkeypatch, dtype, symmetric):
    monkeypatch.setattr(planner, "GPU_ROWS", 256)
    q, p = (F.normalize(torch.randn(65536, 768, device="cuda"), dim=1).to(dtype) for _ in range(2))
    assert extra_memory(q, p, symmetric=symmetric, workspace_bytes=2**30, backend="triton") <= 2**30
