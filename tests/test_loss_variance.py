"""The variance of negative similarities in O((N + M) d^2) is the plain double sum over negatives."""

import pytest
import torch
import torch.nn.functional as F

from hbt_fast.loss import negative_variance


def unit(n, d, seed, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(n, d, generator=g, dtype=torch.float64), dim=1).to(dtype).requires_grad_()


def double_sum(q, p, y, size):
    c = 1 / (size - 1)
    terms = [(q[i] @ p[j] + c) ** 2 for i in range(len(q)) for j in range(len(p)) if j != y[i]]
    return sum(terms) / len(terms)


@pytest.mark.parametrize(("n", "m", "d"), [(1, 2, 1), (6, 6, 3), (5, 9, 7)])
@pytest.mark.parametrize("positives", [False, True])
@pytest.mark.parametrize("size", [None, 100])
def test_it_is_the_double_sum(n, m, d, positives, size):
    q, p = unit(n, d, 0), unit(m, d, 1)
    y = torch.randint(0, m, (n,), generator=torch.Generator().manual_seed(2)) if positives else None
    ours = negative_variance(q, p, positives=y, size=size)
    expected = double_sum(q, p, range(n) if y is None else y.tolist(), size or m)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=0)
    for a, b in zip(torch.autograd.grad(ours, [q, p]), torch.autograd.grad(expected, [q, p]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-15)


def test_it_is_zero_for_a_simplex_and_for_one_pair():
    n = 5
    simplex = F.normalize(torch.eye(n, dtype=torch.float64) - 1 / n, dim=1)  # similarities of -1/(n-1)
    assert negative_variance(simplex, simplex).item() == pytest.approx(0, abs=1e-16)
    assert negative_variance(simplex[:1], simplex[:1]) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_precision_is_single_for_half_inputs(dtype):
    q, p = unit(300, 64, 0, dtype), unit(500, 64, 1, dtype)
    exact = negative_variance(q.double(), p.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert negative_variance(q, p).item() == pytest.approx(exact.item(), rel=1e-5)
