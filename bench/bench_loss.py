"""InfoNCE forward and both gradients, beside three bare products: Q P^T, G P and G^T Q, without which there is no loss.

Run with `pytest bench/`. The rival is what one writes first: F.cross_entropy of the logits, with autograd.
"""

import pytest
import torch
import torch.nn.functional as F

from hbt_fast.loss import info_nce

N, M, D = 2048, 2048, 384
SCALE = 50.0


@pytest.fixture(scope="module")
def embeddings():
    g = torch.Generator().manual_seed(0)
    p = F.normalize(torch.randn(M, D, generator=g), dim=1)
    q = F.normalize(p[:N] + 0.05 * torch.randn(N, D, generator=g), dim=1)
    return q.requires_grad_(), p.requires_grad_()


def three_products(q, p):
    q, p = q.detach(), p.detach()
    g = q @ p.T
    return g @ p, g.T @ q


def cross_entropy(q, p, symmetric):
    s, y = SCALE * q @ p.T, torch.arange(q.shape[0])
    loss = F.cross_entropy(s, y)
    return (loss + F.cross_entropy(s.T, y)) / 2 if symmetric else loss


FORMS = {
    "F.cross_entropy": cross_entropy,
    "torch": lambda q, p, symmetric: info_nce(q, p, scale=SCALE, symmetric=symmetric, backend="torch"),
    "torch-chunked": lambda q, p, symmetric: info_nce(q, p, scale=SCALE, symmetric=symmetric, backend="torch-chunked"),
    "torch-chunked, 8 MiB": lambda q, p, symmetric: info_nce(
        q, p, scale=SCALE, symmetric=symmetric, backend="torch-chunked", workspace_bytes=8 * 2**20
    ),
}


@pytest.mark.parametrize("symmetric", [False, True], ids=["one-way", "symmetric"])
@pytest.mark.parametrize("form", FORMS)
def test_loss_and_gradients(against_floor, embeddings, form, symmetric):
    q, p = embeddings

    def step():
        return torch.autograd.grad(FORMS[form](q, p, symmetric), [q, p])

    against_floor(step, lambda: three_products(q, p), "three products")
