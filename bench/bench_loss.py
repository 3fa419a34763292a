"""InfoNCE and both its gradients, beside its floor: the three products without which there is no loss.

    pytest bench/bench_loss.py              4 minutes on 2 cores; what it cannot measure is listed with the reason
    pytest bench/bench_loss.py --slow       also the rivals at 8192 x 768, and 65,536 x 384 in one GiB
    bash bench/gpu.sh                       on a GPU

The floor is S = Q P^T, S P and S^T Q in the embeddings' precision, into outputs that are there. Ours is
`info_nce_with_grad`. Rivals are checked against it at the size at which they are timed. Rates are 6NMd / time, whatever
number of products somebody needs. Extra memory is beyond embeddings and gradients; conftest.py says how it is measured.

Shapes: N queries, N passages, D dimensions.
"""

import functools

import pytest
import torch
import torch.nn.functional as F
from rivals import RIVALS, SCALE, rival

from hbt_fast.loss import explain, info_nce_with_grad, planner

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
MIB = 2**20
SMALL, LARGE = ((32768, 1024), (65536, 768)) if GPU else ((4096, 384), (8192, 768))
DTYPES = ["bf16", "fp16"] if GPU else ["fp32"]
DTYPE = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ROUNDS = 11 if GPU else 5
# Relative, of the norm of a gradient: to find who computes something else, not to judge precision
TOLERANCE = {"fp32": 1e-3, "fp16": 0.1, "bf16": 0.1}

directions = pytest.mark.parametrize("symmetric", [False, True], ids=["one-way", "symmetric"])


def shapes(*values):
    return pytest.mark.parametrize("shape", values, ids=lambda shape: f"{shape[0]}x{shape[1]}")


def slow_when_large(values=(SMALL, LARGE)):
    return shapes(*(pytest.param(s, marks=[pytest.mark.slow] * (s == LARGE and not GPU)) for s in values))


@functools.lru_cache(maxsize=1)
def embeddings(shape, dtype):
    """Unit vectors; at SCALE a query's passage has about the weight of all others together."""
    g = torch.Generator(DEVICE).manual_seed(0)
    p_ND = F.normalize(torch.randn(shape, generator=g, device=DEVICE), dim=1)
    q_ND = F.normalize(p_ND + 4 / shape[1] ** 0.5 * torch.randn(shape, generator=g, device=DEVICE), dim=1)
    return q_ND.to(DTYPE[dtype]), p_ND.to(DTYPE[dtype])


@functools.lru_cache(maxsize=2)
def reference(shape, dtype, symmetric):
    return info_nce_with_grad(*embeddings(shape, dtype), scale=SCALE, symmetric=symmetric)


def three_products(q_ND, p_ND):
    """The floor, as a function that makes them again into the same memory."""
    n = q_ND.shape[0]
    s_NN, dq_ND, dp_ND = q_ND.new_empty(n, n), torch.empty_like(q_ND), torch.empty_like(p_ND)

    def products():
        torch.mm(q_ND, p_ND.T, out=s_NN)
        torch.mm(s_NN, p_ND, out=dq_ND)
        torch.mm(s_NN.T, q_ND, out=dp_ND)

    return products


@pytest.fixture
def race(against_floor):
    """`race(function, shape, dtype)`: time function(q, p) against the three products."""

    def run(function, shape, dtype, **options):
        q_ND, p_ND = embeddings(shape, dtype)
        work = 6 * shape[0] ** 2 * shape[1]
        floor = three_products(q_ND, p_ND)
        options = {"rounds": ROUNDS} | options
        against_floor(lambda: function(q_ND, p_ND), floor, "three products", work=work, **options)

    yield run
    if GPU:
        torch.cuda.empty_cache()


def ours(race, shape, dtype, symmetric, backend, workspace=None):
    try:
        plan = explain(
            *(shape[0], shape[0]),
            d=shape[1],
            dtype=DTYPE[dtype],
            operands=DTYPE[dtype],
            symmetric=symmetric,
            device=DEVICE,
            workspace_bytes=workspace,
            backend=backend,
        )
    except ValueError as why_not:
        pytest.skip(str(why_not))
    options = {"scale": SCALE, "symmetric": symmetric, "backend": backend, "workspace_bytes": workspace}
    few = (x[:128] for x in embeddings(shape, dtype))
    info_nce_with_grad(*few, **options)  # loads the library: not this loss's memory
    race(lambda q, p: info_nce_with_grad(q, p, **options), shape, dtype, passes=str(plan.passes))


if GPU:

    @directions
    @pytest.mark.parametrize("way", ["fused", "sweep"])
    @shapes(SMALL, LARGE)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_ours(race, monkeypatch, shape, dtype, symmetric, way):
        monkeypatch.setattr(planner, "WAY", way)
        ours(race, shape, dtype, symmetric, "triton")

else:

    @pytest.mark.parametrize(
        ("symmetric", "workspace"),
        [(False, None), (True, None), (True, 64 * MIB)],
        ids=["one-way", "symmetric", "symmetric-64 MiB"],
    )
    @shapes(SMALL, LARGE)
    def test_ours(race, shape, symmetric, workspace):
        ours(race, shape, "fp32", symmetric, "cpu", workspace)


@pytest.mark.parametrize(
    ("shape", "symmetric"),
    [pytest.param((1048576, 768), False, id="1048576x768-one-way")]
    if GPU
    else [pytest.param((65536, 384), True, id="65536x384-symmetric", marks=pytest.mark.slow)],
)
def test_large(once, request, shape, symmetric):
    """It runs: 65,536 on a CPU in one GiB, a million on a GPU in what the plan says, 3 GiB of that being fp32 sums of
    the passages' gradients. One call, so no floor and no quartiles.
    """
    if request.config.getoption("--benchmark-disable"):
        pytest.skip("takes minutes")
    embeddings.cache_clear(), reference.cache_clear()
    q_ND, p_ND = embeddings(shape, DTYPES[0])
    options = {"scale": SCALE, "symmetric": symmetric}
    info_nce_with_grad(q_ND[:4096], p_ND[:4096], **options)
    o = {"dtype": q_ND.dtype, "operands": q_ND.dtype, "symmetric": symmetric, "device": DEVICE}
    plan = explain(*(shape[0],) * 2, d=shape[1], **o)
    found = []

    def loss():
        found[:] = info_nce_with_grad(q_ND, p_ND, **options)
        return found

    extra = once(loss, 6 * shape[0] ** 2 * shape[1], str(plan.passes))
    assert found[0].isfinite()
    assert extra is None or extra <= (plan.extra_bytes if GPU else 1024 * MIB)


@directions
@slow_when_large()
def test_torch_chunked(race, shape, symmetric):
    ours(race, shape, DTYPES[0], symmetric, "torch-chunked")


@pytest.mark.parametrize(
    ("name", "symmetric"),
    [
        pytest.param(name, symmetric, id=f"{name}-{'symmetric' if symmetric else 'one-way'}")
        for name in RIVALS
        for symmetric in (False, True)
        if RIVALS[name].passes[symmetric] is not None
    ],
)
@slow_when_large()
def test_rival(race, name, shape, symmetric):
    passes, dtype = RIVALS[name].passes[symmetric], DTYPES[0]
    try:
        function = rival(name, symmetric)
    except ImportError as missing:
        pytest.skip(f"not here: {missing}")
    q_ND, p_ND = embeddings(shape, dtype)
    expected = reference(shape, dtype, symmetric)
    try:
        found = function(q_ND, p_ND)
    except torch.OutOfMemoryError:
        pytest.skip("does not fit")
    except Exception as error:
        if name == "torch.compile of it":
            pytest.skip(f"torch.compile does not work here: {str(error).splitlines()[0]}")
        raise
    for what, a, b in zip(("loss", "queries' gradient", "passages' gradient"), found, expected, strict=False):
        error = ((a.double() - b.double()).norm() / b.double().norm()).item()
        assert error < TOLERANCE[dtype], f"{name} computes something else: {what} is off by {error:.1e}"
    del found
    race(function, shape, dtype, passes=passes, rounds=5 if GPU or shape == SMALL else 3)


# rows, columns, depth, warps, stages, pieces: what fits an H200's registers and shared memory, by the compiler's report
TILES = {
    False: [(128, 256, 64, 8, 3, 4), (128, 128, 64, 8, 3, 4), (128, 128, 64, 8, 4, 4), (128, 128, 64, 4, 3, 4)],
    True: [(128, 128, 64, 8, 4, 4), (128, 256, 64, 8, 3, 4), (128, 128, 64, 8, 3, 4), (128, 128, 64, 8, 3, 2)],
}


@pytest.mark.skipif(not GPU, reason="tiles are those of a GPU's kernels")
@pytest.mark.parametrize(
    ("symmetric", "tile"),
    [(symmetric, tile) for symmetric in TILES for tile in TILES[symmetric]],
    ids=lambda x: ("symmetric" if x else "one-way") if isinstance(x, bool) else "-".join(map(str, x)),
)
def test_tiles(race, monkeypatch, symmetric, tile):
    from hbt_fast.kernels import tiles

    table = tiles.HALF_SYMMETRIC if symmetric else tiles.HALF
    monkeypatch.setitem(table, tiles.architecture(torch.device("cuda")), tiles.Tile(*tile))
    monkeypatch.setattr(planner, "WAY", "fused")
    ours(race, LARGE, "bf16", symmetric, "triton")
