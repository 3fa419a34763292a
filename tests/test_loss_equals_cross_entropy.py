"""The torch forms of the loss compute what the contract says: cross entropy where it applies, else an oracle.

Shapes: N queries, M passages, K own negatives. Float64 throughout, so tolerances are those of rounding.
"""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from hbt_fast.loss import InfoNCELoss, info_nce, info_nce_with_grad, tiles

BACKENDS = ("torch", "torch-chunked", "cpu") if tiles.compiled() else ("torch", "torch-chunked")
CLOSE = {"rtol": 1e-10, "atol": 1e-13}


def embeddings(n, m, d, *, seed=0, dtype=torch.float64, k=None):
    g = torch.Generator().manual_seed(seed)
    shapes = [(n, d), (m, d)] + ([(n, k, d)] if k else [])
    return [F.normalize(torch.randn(s, generator=g, dtype=dtype), dim=-1).requires_grad_() for s in shapes]


def check(loss, expected, inputs):
    torch.testing.assert_close(loss, expected, **CLOSE)
    ours, theirs = torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("n", "m", "d"), [(1, 1, 1), (1, 5, 3), (2, 2, 7), (33, 33, 16), (29, 67, 13)])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_one_way_is_cross_entropy(backend, n, m, d, reduction):
    q, p = embeddings(n, m, d)
    scale = torch.tensor(13.0, dtype=torch.float64, requires_grad=True)
    loss = info_nce(q, p, scale=scale, reduction=reduction, backend=backend)
    check(loss, F.cross_entropy(scale * q @ p.T, torch.arange(n), reduction=reduction), [q, p, scale])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("n", "d"), [(1, 3), (2, 1), (37, 16)])
def test_symmetric_is_the_mean_of_both_cross_entropies(backend, n, d):
    q, p = embeddings(n, n, d)
    s, y = 13 * q @ p.T, torch.arange(n)
    loss = info_nce(q, p, scale=13.0, symmetric=True, backend=backend)
    check(loss, (F.cross_entropy(s, y) + F.cross_entropy(s.T, y)) / 2, [q, p])


@pytest.mark.parametrize("backend", BACKENDS)
def test_positives_shared_columns_and_own_negatives_are_columns_of_a_cross_entropy(backend):
    q, p, own = embeddings(19, 8, 5, k=3)
    y = torch.randint(0, 8, (19,), generator=torch.Generator().manual_seed(1))  # 19 queries of 8 passages: shared
    s = 7 * torch.cat([q @ p.T, torch.einsum("nd,nkd->nk", q, own)], dim=1)
    loss = info_nce(q, p, scale=7.0, positives=y, own_negatives=own, backend=backend)
    check(loss, F.cross_entropy(s, y), [q, p, own])


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_weigh_rows_and_divide_by_their_sum(backend):
    q, p = embeddings(19, 23, 5)
    w = torch.rand(19, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    w[3] = 0

    def rows():
        return w * F.cross_entropy(20 * q @ p.T, torch.arange(19), reduction="none")

    check(info_nce(q, p, weights=w, backend=backend), rows().sum() / w.sum(), [q, p])
    check(info_nce(q, p, weights=w, reduction="sum", backend=backend), rows().sum(), [q, p])
    each = info_nce(q, p, weights=w, reduction="none", backend=backend)
    torch.testing.assert_close(each, rows(), **CLOSE)
    check((each**2).sum(), (rows() ** 2).sum(), [q, p])


def oracle(q, p, o):
    """The contract term by term, in Python loops over single logits: slow, and nothing shared with the package."""
    n, m, y = q.shape[0], p.shape[0], o["positives"].tolist()
    pid, qid = o["passage_ids"], o["query_ids"]
    if qid is None and pid is not None:
        qid = [pid[j] for j in y]
    cosine = F.normalize(q.detach(), dim=1) @ F.normalize(p.detach(), dim=1).T
    margin = math.inf if o["false_negative_margin"] is None else o["false_negative_margin"]
    further_count = o["duplicates"] == "positive"
    joint, mode = o.get("joint", ()), o.get("hardness_mode")
    owners = [-1] * m if o.get("owners") is None else o["owners"].tolist()

    def term(positives, negatives):
        if not negatives:
            return q.sum() * 0
        z = sum(torch.exp(x) for x in negatives) / (2 if "doc_to_query" in joint else 1)
        return sum(torch.log1p(z / torch.exp(x)) for x in positives) / len(positives)

    def hard(s, own):
        meant = mode == "all_negatives" or mode == ("hard_negatives" if own else "in_batch_negatives")
        return s + o["hardness_strength"] * (s / o["scale"]).detach() if meant else s

    def also(i, limit):
        same_query = [y[k] == y[i] or (qid is not None and qid[k] == qid[i]) for k in range(n)]
        same_passage = [j == y[i] or owners[j] == i or (pid is not None and pid[j] == pid[y[i]]) for j in range(m)]
        blocks = {
            "query_to_query": (q[i], q, same_query),
            "doc_to_query": (p[y[i]], q, same_query),
            "doc_to_doc": (p[y[i]], p, same_passage),
        }
        for name in joint:
            anchor, candidates, same = blocks[name]
            for x, left_out in zip(candidates, same, strict=True):
                if not left_out and F.cosine_similarity(anchor.detach(), x.detach(), dim=0) <= limit:
                    yield o["scale"] * anchor @ x

    losses = []
    for i in range(n):
        limit = cosine[i, y[i]] + margin
        positives, negatives = [o["scale"] * q[i] @ p[y[i]]], []
        for j in range(m):
            s = o["scale"] * q[i] @ p[j]
            if j == y[i]:
                continue
            if pid is not None and pid[j] == pid[y[i]]:
                positives += [s] if further_count else []
            elif cosine[i, j] <= limit:
                negatives.append(hard(s, owners[j] == i))
        for x in [] if o["own_negatives"] is None else o["own_negatives"][i]:
            if F.cosine_similarity(q[i].detach(), x.detach(), dim=0) <= limit:
                negatives.append(hard(o["scale"] * q[i] @ x, own=True))
        row = term(positives, [*negatives, *also(i, limit)])
        if o["symmetric"]:
            positives, negatives = [o["scale"] * q[i] @ p[y[i]]], []
            for k in range(n):
                s = o["scale"] * q[k] @ p[y[i]]
                if k == i:
                    continue
                if y[k] == y[i] or (qid is not None and qid[k] == qid[i]):
                    positives += [s] if further_count else []
                elif cosine[k, y[i]] <= limit:
                    negatives.append(s)
            row = (row + term(positives, negatives)) / 2
        losses.append(row)
    w = o["weights"]
    return (torch.stack(losses) * w).sum() / w.sum()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("duplicates", ["mask", "positive"])
@pytest.mark.parametrize("unit", [True, False])
def test_every_option_does_what_the_contract_says(backend, symmetric, duplicates, unit):
    n, m, d, k = 7, 11, 4, 2
    q, p, own = embeddings(n, m, d, k=k)
    if not unit:  # the margin compares cosines, so it normalises inside
        q, p, own = ((x * torch.rand(*x.shape[:-1], 1) * 2).detach().requires_grad_() for x in (q, p, own))
    g = torch.Generator().manual_seed(2)
    for ids, query_ids, margin, with_own in itertools.product((False, True), (False, True), (None, 0.1), (False, True)):
        o = {
            "scale": torch.tensor(6.0, dtype=torch.float64, requires_grad=True),
            "positives": torch.tensor([0, 4, 4, 10, 2, 7, 1]),
            "passage_ids": torch.randint(0, 6, (m,), generator=g) if ids else None,
            "query_ids": torch.randint(0, 3, (n,), generator=g) if query_ids else None,
            "duplicates": duplicates,
            "weights": torch.rand(n, generator=g, dtype=torch.float64),
            "symmetric": symmetric,
            "false_negative_margin": margin,
            "own_negatives": own if with_own else None,
        }
        inputs = [q, p, o["scale"]] + ([own] if with_own else [])
        check(info_nce(q, p, **o, backend=backend), oracle(q, p, o), inputs)


OTHER_DIRECTIONS = ("query_to_query", "doc_to_query", "doc_to_doc")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("joint", [j for r in range(4) for j in itertools.combinations(OTHER_DIRECTIONS, r)])
@pytest.mark.parametrize("mode", [None, "in_batch_negatives", "hard_negatives", "all_negatives"])
def test_joint_directions_and_hardness_do_what_the_contract_says(backend, joint, mode):
    n, m, d, k = 7, 11, 4, 2
    q, p, own = embeddings(n, m, d, k=k)
    g = torch.Generator().manual_seed(3)
    for ids, owners, with_own, margin in ((0, 1, 0, None), (1, 1, 1, None), (1, 0, 1, 0.1), (0, 1, 1, 0.1)):
        o = {
            "scale": torch.tensor(6.0, dtype=torch.float64, requires_grad=True),
            "positives": torch.tensor([0, 4, 4, 10, 2, 7, 1]),
            "passage_ids": torch.randint(0, 6, (m,), generator=g) if ids else None,
            "query_ids": torch.randint(0, 3, (n,), generator=g) if ids and with_own else None,
            "duplicates": "positive" if ids and owners else "mask",
            "weights": torch.rand(n, generator=g, dtype=torch.float64),
            "symmetric": not joint,
            "false_negative_margin": margin,
            "own_negatives": own if with_own else None,
            "joint": joint,
            "owners": torch.randint(-1, n, (m,), generator=g) if owners else None,
            "hardness_mode": mode,
            "hardness_strength": 2.5,
        }
        inputs = [q, p, o["scale"]] + ([own] if with_own else [])
        for workspace_bytes in (1, None):
            loss = info_nce(q, p, **o, backend=backend, workspace_bytes=workspace_bytes)
            check(loss, oracle(q, p, o), inputs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("symmetric", [False, True])
def test_gradients_are_the_finite_differences(backend, symmetric):
    q, p, own = embeddings(5, 7, 3, k=2)
    scale = torch.tensor(4.0, dtype=torch.float64, requires_grad=True)
    ids, y = torch.tensor([0, 1, 0, 2, 3, 1, 4]), torch.tensor([6, 0, 0, 3, 1])

    def loss(q, p, scale, own, reduction):
        o = {"positives": y, "passage_ids": ids, "duplicates": "positive", "symmetric": symmetric}
        o |= {} if symmetric else {"joint": OTHER_DIRECTIONS}
        return info_nce(q, p, scale=scale, own_negatives=own, reduction=reduction, backend=backend, **o)

    for reduction in ("mean", "none"):
        torch.autograd.gradcheck(lambda *x, r=reduction: loss(*x, r), (q, p, scale, own))


def test_dense_can_be_differentiated_twice():
    q, p = embeddings(4, 6, 3)
    torch.autograd.gradgradcheck(lambda q, p: info_nce(q, p, scale=3.0, symmetric=True, backend="torch"), (q, p))


@pytest.mark.parametrize("backend", BACKENDS)
def test_with_grad_returns_the_gradients_of_the_loss_and_no_graph(backend):
    q, p, own = embeddings(6, 9, 5, k=2)
    scale = torch.tensor(9.0, dtype=torch.float64, requires_grad=True)
    expected = info_nce(q, p, scale=scale, own_negatives=own, symmetric=True, backend="torch")
    gradients = torch.autograd.grad(expected, [q, p, scale, own])
    for context in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with context():
            result = info_nce_with_grad(q, p, scale=scale, own_negatives=own, symmetric=True, backend=backend)
        loss, *three = result
        torch.testing.assert_close(loss, expected, **CLOSE)
        for a, b in zip((*three, result.own_negatives), gradients, strict=True):
            torch.testing.assert_close(a, b, **CLOSE)
            assert not a.requires_grad
        assert not loss.requires_grad
        assert loss.grad_fn is None
    assert q.grad is None
    with torch.inference_mode():  # embeddings that were made there cannot be saved for backward
        info_nce_with_grad(q * 1, p * 1, backend=backend)
    assert info_nce_with_grad(q, p, scale=9.0, backend=backend).scale.dtype == torch.float64


def test_module_learns_its_scale():
    q, p = embeddings(6, 6, 5, dtype=torch.float32)
    fixed, learned = InfoNCELoss(20.0, symmetric=True), InfoNCELoss(20.0, learnable=True, symmetric=True)
    assert list(fixed.parameters()) == []
    torch.testing.assert_close(fixed(q, p), info_nce(q, p, scale=20.0, symmetric=True), rtol=0, atol=0)
    learned(q, p).backward()
    result = learned.with_grad(q, p)
    torch.testing.assert_close(learned.log_scale.grad, result.scale * 20)
    with pytest.raises(TypeError, match="temperature"):
        InfoNCELoss(temperature=0.05)
