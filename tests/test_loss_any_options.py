"""Whatever options are drawn, every backend computes what the specification does."""

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hbt_fast.loss import info_nce_with_grad, tiles
from hbt_fast.loss.arguments import DIRECTIONS, HARDNESS_MODES

BACKENDS = ["torch-chunked", "cpu"] if tiles.compiled() else ["torch-chunked"]


@st.composite
def calls(draw):
    n, m, d, k = (draw(st.integers(1, top)) for top in (40, 60, 20, 3))
    seed = draw(st.integers(0, 2**32))
    positives = draw(st.booleans()) or m < n
    g = torch.Generator().manual_seed(seed)

    def some(value):
        return value if draw(st.booleans()) else None

    def numbers(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64)

    options = {
        "scale": draw(st.floats(1e-3, 300)),
        "positives": torch.randint(0, m, (n,), generator=g) if positives else None,
        "passage_ids": some(torch.randint(-3, draw(st.integers(0, m)), (m,), generator=g)),
        "query_ids": some(torch.randint(0, n, (n,), generator=g)),
        "duplicates": draw(st.sampled_from(["mask", "positive"])),
        "weights": some(torch.rand(n, generator=g) + 0.01),
        "symmetric": draw(st.booleans()),
        "false_negative_margin": some(
            draw(st.sampled_from([-0.317, 0.0713, 0.4391]))
        ),  # no ties, which rounding decides
        "own_negatives": some(numbers(n, k, d)),
        "reduction": draw(st.sampled_from(["mean", "sum"])),
        "owners": some(torch.randint(-1, n, (m,), generator=g)),
        "hardness_mode": draw(st.sampled_from([None, *HARDNESS_MODES])),
        "hardness_strength": draw(st.sampled_from([0.0, 0.3, 9.0])),
    }
    options["joint"] = () if options["symmetric"] else tuple(draw(st.sets(st.sampled_from(DIRECTIONS))))
    length = draw(st.sampled_from([1e-3, 1.0, 5.0])) / d**0.5
    return numbers(n, d) * length, numbers(m, d) * length, options, draw(st.sampled_from([1, 500, 10_000, None]))


@given(calls())
@settings(max_examples=150, deadline=None, derandomize=True)
@example(
    (torch.eye(2, 3, dtype=torch.float64), torch.eye(1, 3, dtype=torch.float64),
     {"positives": torch.tensor([0, 0]), "symmetric": True, "duplicates": "positive"}, 1)
)  # fmt: skip
def test_any_call_is_the_same_on_every_backend(call):
    q, p, options, workspace_bytes = call
    expected = info_nce_with_grad(q, p, **options, backend="torch")
    for backend in BACKENDS:
        ours = info_nce_with_grad(q, p, **options, backend=backend, workspace_bytes=workspace_bytes)
        for a, b in zip((*ours, ours.own_negatives), (*expected, expected.own_negatives), strict=True):
            if b is not None:
                size = max(b.abs().max().item(), expected.queries.abs().max().item() * q.abs().max().item())
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10 * size + 1e-13)
