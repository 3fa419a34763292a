"""Exact ranks beside their floor, the bare matrix product: random unit vectors, 11 languages, 11 relevant each."""

import numpy as np
import pytest
import torch

from hbt_fast.evaluation.ranks import exact_ranks

LANGUAGES = [f"l{i:02}" for i in range(11)]


def problem(n, m, d):
    rng = np.random.default_rng(0)
    queries, candidates = (rng.standard_normal((size, d)).astype(np.float32) for size in (n, m))
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    candidates /= np.linalg.norm(candidates, axis=1, keepdims=True)
    relevant = np.stack([np.sort(rng.choice(m, 11, replace=False)) for _ in range(n)]).ravel()
    query_languages, candidate_languages = ([LANGUAGES[i % 11] for i in range(size)] for size in (n, m))
    return queries, candidates, query_languages, candidate_languages, 11 * np.arange(n + 1), relevant


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize(("n", "m", "d"), [(2000, 2000, 384)])
def test_exact_ranks(against_floor, backend, n, m, d):
    arguments = problem(n, m, d)
    q_Nd, p_Md = torch.from_numpy(arguments[0]), torch.from_numpy(arguments[1])
    s_NM = torch.empty(n, m)
    against_floor(
        lambda: exact_ranks(*arguments, backend=backend, device="cpu"),
        lambda: torch.mm(q_Nd, p_Md.T, out=s_NM),
        "one N x M x d product",
    )
