"""The numerics that the contract promises, each as a claim, for both torch forms."""

import math

import pytest
import torch
import torch.nn.functional as F

from hbt_fast.loss import info_nce, info_nce_with_grad, tiles
from hbt_fast.loss.problem import rounded

built = pytest.mark.skipif(tiles.compiled() is None, reason="csrc/ was not built here")
pytestmark = pytest.mark.parametrize("backend", ["torch", "torch-chunked", pytest.param("cpu", marks=built)])
HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}


def unit(*shape, seed=0):
    return F.normalize(torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=-1)


def near_pairs(n, m, d, noise=0.5):
    """Passages close to their queries, as a trained model gives them."""
    p = unit(m, d, seed=1)
    return F.normalize(p[:n] + noise * unit(n, d, seed=2), dim=-1), p


def relative(a, b):
    return ((a.double() - b).norm() / b.norm()).item()


@pytest.mark.parametrize(("n", "m", "d"), [(252, 507, 123), (64, 64, 384)])
@pytest.mark.parametrize("scale", [20.0, 50.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("symmetric", [False, True])
def test_error_is_at_most_twice_that_of_torch_in_the_same_dtype(backend, n, m, d, scale, dtype, symmetric):
    truth_in = near_pairs(n, m, d)
    truth = info_nce_with_grad(*truth_in, scale=scale, symmetric=symmetric, backend="torch")
    q, p = (x.to(dtype) for x in truth_in)
    ours = info_nce_with_grad(q, p, scale=scale, symmetric=symmetric, backend=backend)
    assert ours.queries.dtype == ours.passages.dtype == dtype
    assert ours.loss.dtype == torch.float32

    leaves = [x.clone().requires_grad_() for x in (q, p)]
    s, y = scale * (leaves[0] @ leaves[1].T).float(), torch.arange(n)
    loss = F.cross_entropy(s, y)
    if symmetric:
        loss = (loss + F.cross_entropy(s[:, :n].T, y)) / 2
    dense = (loss.detach(), *torch.autograd.grad(loss, leaves))
    for a, b, t in zip(ours[:3], dense, truth[:3], strict=True):
        assert relative(a, t) <= 2 * relative(b, t) + 1e-6


GTE = ("query_to_query", "doc_to_query", "doc_to_doc")


def gte(q, p, scale, hardness):
    """The joint loss of four directions in plain torch, with every negative of the first one hardened."""
    s, n = [(scale * (a @ b.T)).float() for a, b in ((q, p), (q, q), (p[: len(q)], q), (p[: len(q)], p))], len(q)
    own = torch.eye(n, dtype=torch.bool)
    own_M = F.pad(own, (0, len(p) - n))
    s[0] = s[0] + (hardness / scale * s[0]).detach().masked_fill(own_M, 0.0)
    s[1], s[3] = s[1].masked_fill(own, -math.inf), s[3].masked_fill(own_M, -math.inf)
    return F.cross_entropy(torch.cat(s, dim=1), torch.arange(n)) - math.log(2)


@pytest.mark.parametrize("scale", [20.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("hardness", [0.0, 9.0])
def test_the_same_holds_with_joint_directions_and_hardness(backend, scale, dtype, hardness):
    truth_in = near_pairs(130, 253, 61)
    o = {"scale": scale, "joint": GTE, "hardness_mode": "all_negatives", "hardness_strength": hardness}
    q, p = (x.to(dtype) for x in truth_in)
    ours = info_nce_with_grad(q, p, **o, backend=backend)
    assert ours.queries.dtype == ours.passages.dtype == dtype
    results = []
    for x in (truth_in, (q, p)):
        leaves = [y.clone().requires_grad_() for y in x]
        if x is truth_in:
            loss = info_nce(*leaves, **o, backend="torch")
            torch.testing.assert_close(loss.float(), gte(*leaves, scale, hardness))
        else:
            loss = gte(*leaves, scale, hardness)
        results.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    for a, t, b in zip(ours[:3], *results, strict=True):
        assert relative(a, t) <= 2 * relative(b, t) + 1e-6


@pytest.mark.parametrize("compute_dtype", ["fp16", "bf16", "tf32"])
def test_compute_dtype_rounds_the_operands_and_nothing_else(backend, compute_dtype):
    truth_in = near_pairs(60, 90, 48)
    q, p = (x.float() for x in truth_in)
    ours = info_nce_with_grad(q, p, scale=50.0, compute_dtype=compute_dtype, backend=backend)
    q64, p64 = (rounded(x, compute_dtype).double() for x in (q, p))
    if compute_dtype in HALF:
        assert torch.equal(q64, q.to(HALF[compute_dtype]).double())
    else:
        assert torch.equal(q64.float().view(torch.int32) & 0x1FFF, torch.zeros(q.shape, dtype=torch.int32))
        assert 0 < (q64 - q).abs().max() <= 2**-11
    exact = info_nce_with_grad(q64, p64, scale=50.0, backend="torch")
    assert ours.queries.dtype == torch.float32
    for a, b in zip(ours, exact, strict=True):
        assert relative(a, b) < 5e-6
    assert relative(ours.queries, info_nce_with_grad(*truth_in, scale=50.0).queries) > 1e-5  # it did round


def test_half_inputs_have_fp32_logits(backend):
    # logits near 100: bf16 logits would be off by 0.25, fp16 logits by 0.03
    q, p = (x.to(torch.bfloat16) for x in near_pairs(40, 40, 64, noise=0.1))
    exact = info_nce_with_grad(q.double(), p.double(), scale=100.0, backend="torch")
    ours = info_nce_with_grad(q, p, scale=100.0, backend=backend)
    assert relative(ours.loss, exact.loss) < 1e-4
    assert relative(ours.queries, exact.queries) < 4e-3  # half a unit in the last place of the bf16 gradient
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = info_nce_with_grad(q.float(), p.float(), scale=100.0, backend=backend)
    assert relative(again.queries, exact.queries) < 1e-4


@pytest.mark.parametrize("target", [1e-9, 1e-7, 1e-5, 1e-3])
@pytest.mark.parametrize("o", [{}, {"symmetric": True}, {"joint": GTE}])
def test_gradient_is_right_to_a_thousandth_at_tiny_losses(backend, target, o):
    n = 16
    q = torch.eye(n, dtype=torch.float64) + 0.02 * unit(n, n)
    q = F.normalize(q, dim=1)
    p = F.normalize(torch.eye(n, dtype=torch.float64) + 0.02 * unit(n, n, seed=3), dim=1)
    scale = math.log((n - 1) / target)
    exact = info_nce_with_grad(q, p, scale=scale, **o, backend="torch")
    ours = info_nce_with_grad(q.float(), p.float(), scale=scale, **o, backend=backend)
    assert 0.3 * target < exact.loss < 3 * target
    for a, b in zip(ours, exact, strict=True):
        assert relative(a, b) < 1e-3


@pytest.mark.parametrize("scale", [100.0, 500.0, 3000.0])
def test_large_scales_neither_underflow_nor_overflow(backend, scale):
    # memeff: log(0) at temperature 0.01, because exp(s - 1/temperature) underflows when no cosine is near 1
    q, p = unit(30, 400), unit(50, 400, seed=1)
    exact = info_nce_with_grad(q, p, scale=scale, symmetric=True, backend="torch")
    ours = info_nce_with_grad(q.float(), p.float(), scale=scale, symmetric=True, backend=backend)
    for a, b in zip(ours, exact, strict=True):
        assert torch.isfinite(a).all()
        assert relative(a, b) < 1e-6 * scale
    hard = {"joint": GTE, "hardness_mode": "all_negatives", "hardness_strength": 9.0}
    for o in ({"symmetric": True}, hard):
        ours = info_nce_with_grad((100 * q).float(), (-100 * q).float(), scale=scale, **o, backend=backend)
        assert all(torch.isfinite(x).all() for x in ours)


def test_an_exact_tie_has_half_the_slope(backend):
    q = torch.ones(1, 4, dtype=torch.float64)
    p = torch.ones(2, 4, dtype=torch.float64)
    ours = info_nce_with_grad(q, p, scale=1.0, backend=backend)
    assert ours.loss.item() == pytest.approx(math.log(2), rel=1e-15)
    torch.testing.assert_close(ours.passages, torch.tensor([[-0.5] * 4, [0.5] * 4], dtype=torch.float64))


@pytest.mark.parametrize("duplicates", ["mask", "positive"])
@pytest.mark.parametrize("more", [{}, {"symmetric": True}, {"joint": GTE}])
def test_rows_without_negatives_have_no_loss_and_no_gradient(backend, duplicates, more):
    q, p = unit(3, 5), unit(3, 5, seed=1)
    o = {"duplicates": duplicates, "backend": backend, **more}
    o |= {"hardness_mode": "all_negatives", "hardness_strength": 3.0}
    for ids in (torch.zeros(3, dtype=torch.int64), None):
        if ids is None:
            q, p = q[:1], p[:1]
        with torch.autograd.set_detect_anomaly(True):  # no NaN on the way either
            result = info_nce_with_grad(q, p, passage_ids=ids, **o)
        for x in result:
            assert torch.equal(x, torch.zeros_like(x))
        assert torch.equal(info_nce(q, p, passage_ids=ids, reduction="none", **o), torch.zeros(len(q)).double())
    q, p = unit(3, 5), unit(3, 5, seed=1)  # query 0 has no negative, the others do
    ids = torch.tensor([0, 0, 0])
    own = torch.stack([-q[:, None, :], q[:, None, :]], dim=1)[:, :, 0]
    result = info_nce_with_grad(q, p, passage_ids=ids, own_negatives=own, false_negative_margin=-0.001, **o)
    assert all(torch.isfinite(x).all() for x in (*result, result.own_negatives))


def test_duplicates_are_found_by_id_although_their_vectors_differ(backend):
    # sentence-transformers #2756, #3260: dropout makes embeddings of one text differ; comparing vectors finds nothing
    q, p = unit(4, 6), unit(4, 6, seed=1)
    ids = torch.tensor([7, 8, 7, 9])
    for symmetric in (False, True):
        rows = info_nce(q, p, passage_ids=ids, reduction="none", symmetric=symmetric, scale=5.0, backend=backend)
        keep = torch.tensor([0, 1, 3])  # what query 0 sees when passage 2 and its query are not there
        alone = info_nce(q[keep], p[keep], reduction="none", symmetric=symmetric, scale=5.0, backend=backend)
        torch.testing.assert_close(rows[0], alone[0])
        s = 5 * q @ p.T
        both = (F.softplus(s[0, [1, 3]].logsumexp(0) - s[0, 0]) + F.softplus(s[0, [1, 3]].logsumexp(0) - s[0, 2])) / 2
        extra = info_nce(q, p, passage_ids=ids, duplicates="positive", reduction="none", scale=5.0, backend=backend)
        torch.testing.assert_close(extra[0], both)


def test_a_positive_is_never_its_own_negative(backend):
    # ms-swift #10068: positives drawn as negatives. Two queries of one passage, in both halves
    q, p = unit(2, 6), unit(1, 6, seed=1)
    y = torch.zeros(2, dtype=torch.int64)
    for duplicates in ("mask", "positive"):
        loss = info_nce(q, p, positives=y, symmetric=True, duplicates=duplicates, backend=backend)
        assert loss == 0


def test_margin_drops_what_is_above_it_and_has_no_gradient(backend):
    q = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    angles = torch.tensor([0.6, 0.71, 0.69, -0.5], dtype=torch.float64)  # cosines; the first is the positive's
    p = torch.stack([angles, (1 - angles**2).sqrt()], dim=1)
    kept = info_nce_with_grad(q, p, scale=4.0, false_negative_margin=0.1, backend=backend)
    expected = info_nce_with_grad(q, p[[0, 2, 3]], scale=4.0, backend="torch")
    torch.testing.assert_close(kept.loss, expected.loss)
    torch.testing.assert_close(kept.queries, expected.queries)
    assert torch.equal(kept.passages[1], torch.zeros(2, dtype=torch.float64))
    long = info_nce(q * 3, p * torch.tensor([[0.1], [9.0], [1.0], [2.0]]), false_negative_margin=0.1, backend=backend)
    without = info_nce(q * 3, p[[0, 2, 3]] * torch.tensor([[0.1], [1.0], [2.0]]), backend=backend)
    torch.testing.assert_close(long, without)  # cosines, whatever the norms


@pytest.mark.parametrize("n", [1, 63, 64, 65, 127])
def test_rows_beside_a_tile_are_not_read(backend, n):
    # inf-cl: padded rows read out of bounds when N % 64 != 0. The inputs are views into a buffer of NaN
    q, p = torch.full((2, 130, 24), float("nan")).unbind(0)
    q[:n, :17], p[:n, :17] = unit(n, 17).float(), unit(n, 17, seed=1).float()
    result = info_nce_with_grad(q[:n, :17], p[:n, :17], symmetric=True, backend=backend)
    assert all(torch.isfinite(x).all() for x in result)


def test_scale_acts_in_every_path_and_its_gradient_is_exact(backend):
    # Tevatron: temperature ignored on the cached path. inf-cl, open_clip #616: the scale's gradient off by a factor
    q, p = unit(8, 5), unit(12, 5, seed=1)
    for o in ({}, {"symmetric": True}, {"joint": GTE}):
        loss = [info_nce_with_grad(q, p, scale=s, **o, backend=backend) for s in (7 - 1e-5, 7.0, 7 + 1e-5)]
        difference = (loss[2].loss - loss[0].loss) / 2e-5
        assert loss[1].scale.item() == pytest.approx(difference.item(), rel=1e-7)


def test_gradients_are_not_rescaled(backend):
    # memeff rescales the gradient by default. To first order the decrease equals the gradient's square
    q, p = unit(8, 5), unit(8, 5, seed=1)
    result = info_nce_with_grad(q, p, scale=5.0, backend=backend)
    step = 1e-6
    less = info_nce(q - step * result.queries, p - step * result.passages, scale=5.0, backend=backend)
    square = (result.queries**2).sum() + (result.passages**2).sum()
    assert ((result.loss - less) / step).item() == pytest.approx(square.item(), rel=1e-4)


def test_own_negatives_are_seen_by_their_query_only(backend):
    q, p, own = unit(5, 6), unit(5, 6, seed=1), unit(5, 2, 6, seed=2)
    before = info_nce(q, p, own_negatives=own, symmetric=True, reduction="none", backend=backend)
    own[3] = unit(2, 6, seed=9)
    after = info_nce(q, p, own_negatives=own, symmetric=True, reduction="none", backend=backend)
    assert (before != after).tolist() == [False, False, False, True, False]
