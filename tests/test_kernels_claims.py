"""The kernels equal float64, whatever the sizes and whoever is a negative. Runs on a GPU, or in Triton's interpreter.

Without a GPU `test_kernels_interpreted.py` runs this file in a process of its own: the interpreter is chosen when
triton is imported. bfloat16 is wrong in the interpreter and runs on a GPU only.

A bound is 2x the error that plain torch makes with the same operands and fp32 logits, plus that of another order of
summation in fp32: a few units in the last place of the largest logit. Errors of a row are relative to its largest
element, since that is what matters in a sum of the row.
"""

from __future__ import annotations

import os

import kernels_reference as reference
import pytest
import torch

from hbt_fast.kernels import NEVER, Coefficients, epilogue, fused, library, sweep
from hbt_fast.kernels.tiles import Tile

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("no GPU here: test_kernels_interpreted.py runs these claims", allow_module_level=True)

DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (not INTERPRETED)
EPS = 2.0**-24
# One below and one above a tile's edge, tiles cut on both sides, several tiles, and nearly nothing.
SHAPES = [(1, 1), (2, 252), (63, 65), (127, 2), (65, 127), (252, 252), (252, 1), (127, 63)]
TILE = Tile(64, 64, 32, 4, 3, 2)


def case_of(index: int, shape: tuple[int, int], dtype: torch.dtype, **changes) -> reference.Case:
    """Every combination of options and scales comes by as the index runs."""
    settings = {"scale": (1.0, 20.0, 200.0)[index % 3], "margin": index % 2 == 1, "query_ids": index // 2 % 2 == 1}
    d = (16, 100, 123)[index // 2 % 3]
    return reference.make_case(*shape, d, dtype=dtype, seed=index, device=DEVICE, **(settings | changes))


def summation_error(case: reference.Case) -> float:
    """Of logits in fp32, from the order in which D products are added: what a change of order may cost."""
    size = case.scale.double() * (case.q_RD.double().abs() @ case.p_MD.double().abs().T).max()
    return float(8 * EPS * (1 + size))


def assert_as_good_as_torch(ours, torch_too, truth, case, what, dim=None) -> None:
    """Errors at most twice torch's; relative to the largest of a line along `dim`, or element by element."""
    ours, torch_too = ours.double(), torch_too.double()
    same = ours == truth  # infinities too
    size = truth.abs() if dim is None else truth.abs().amax(dim, keepdim=True)
    size = size.clamp_min(1e-30)
    error = torch.where(same, 0.0, (ours - truth).abs() / size)
    allowed = torch.where(torch_too == truth, 0.0, (torch_too - truth).abs() / size).max()
    assert error.max() <= 2 * allowed + summation_error(case), f"{what}: {error.max():.2e} against torch {allowed:.2e}"


def assert_statistics(found, truth, torch_too, case, what) -> None:
    assert torch.equal(found[0] == -reference.INF, truth[0] == -reference.INF), f"{what}: who has no negative"
    has = truth[0] > -reference.INF
    assert bool((found[1][~has] == 0).all()), f"{what}: a sum without negatives"
    if has.any():
        error = (found[0].double() - truth[0])[has].abs().max()
        limit = 2 * (torch_too[0].double() - truth[0])[has].abs().max() + summation_error(case)
        assert error <= limit, f"{what}: maximum is off by {error:.2e}"
        # the sum is relative to the maximum found, which has an error of its own
        lse = [m.double()[has] + z.double()[has].log() for m, z in (found, torch_too, truth)]
        error, allowed = (lse[0] - lse[2]).abs().max(), (lse[1] - lse[2]).abs().max()
        assert error <= 2 * allowed + summation_error(case), f"{what}: log sum {error:.2e}, torch {allowed:.2e}"


def products(case: reference.Case) -> torch.Tensor:
    """In a larger buffer of NaN, rows further apart than M."""
    out, frame = framed(case.q_RD.shape[0], case.p_MD.shape[0], torch.float32)
    frame.fill_(float("nan"))
    return sweep.products(case.q_RD, case.p_MD, out)


def exp_rows(way: str, case: reference.Case, tile: Tile | None = TILE, out=None):
    if way == "fused":
        return fused.exp_rows(case.q_RD, case.p_MD, case.scale, case.who, e_RM=out, tile=tile)
    made = products(case)
    return sweep.exp_rows(made, case.scale, case.who, case.q_RD.dtype, e_RM=out, tile=tile)


def row_and_column_statistics(way: str, case: reference.Case, tile: Tile | None = TILE):
    if way == "fused":
        return fused.row_and_column_statistics(case.q_RD, case.p_MD, case.scale, case.who, tile=tile)
    return sweep.row_and_column_statistics(products(case), case.scale, case.who, tile=tile)


def gradient(way: str, case: reference.Case, coefficients: Coefficients, tile: Tile | None = TILE, out=None):
    if way == "fused":
        return fused.gradient(case.q_RD, case.p_MD, case.scale, case.who, coefficients, d_RM=out, tile=tile)
    made = products(case)
    return sweep.gradient(made, case.scale, case.who, coefficients, case.q_RD.dtype, d_RM=out, tile=tile)


def coefficients_of(case: reference.Case, seed: int = 0) -> Coefficients:
    """As a driver's: slopes over sums, so without negatives not a number; and a normaliser that fp16 needs."""
    s = reference.statistics(case)
    g = torch.Generator().manual_seed(seed)
    row, column = (
        (torch.rand(z.shape, generator=g).to(z.device) / z / 1e5).float().nan_to_num(posinf=float("nan"))
        for z in (s.row_sum_R, s.column_sum_A)
    )
    normaliser = torch.tensor(2.0**16, device=DEVICE)
    parts = (s.row_max_R.float(), row, s.column_max_A.float(), column)
    return Coefficients(*(reference.surrounded(x) for x in parts), normaliser)


def framed(r: int, m: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """An (R, M) output whose rows are further apart than M, and the frame that nothing may write to."""
    frame = torch.full((r + 2, m + 24), 7.0, dtype=dtype, device=DEVICE)
    return frame[1 : 1 + r, 8 : 8 + m], frame


def assert_frame_untouched(frame: torch.Tensor, inner: torch.Tensor) -> None:
    inner.fill_(7)
    assert bool((frame == 7).all())


def assert_exp_rows(found, case: reference.Case, what: str) -> None:
    dtype = case.q_RD.dtype
    truth = reference.statistics(case)
    plain = reference.statistics(case, torch.float32)
    assert_statistics((found.max_R, found.sum_R), truth[:2], plain[:2], case, what)
    window = epilogue.window_of(dtype)
    above = (found.max_R - found.offset_R)[found.max_R > -reference.INF]
    assert bool(((above >= window.low - 1e-3) & (above <= window.high + 1e-3)).all()), f"{what}: offset {above}"
    assert bool(found.offset_R.isfinite().all())
    e_RM = reference.exp_rows(case, found.offset_R)
    plain_RM = reference.exp_rows(case, found.offset_R, torch.float32).to(dtype)
    assert_as_good_as_torch(found.e_RM, plain_RM, e_RM, case, what, dim=1)
    assert bool((found.e_RM[e_RM == 0] == 0).all()), f"{what}: something in place of a non-negative"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("way", ["fused", "sweep"])
def test_exp_rows_equals_float64_for_every_shape(way, dtype):
    for index, shape in enumerate(SHAPES):
        case = case_of(index, shape, dtype)
        out, frame = framed(*shape, dtype)
        found = exp_rows(way, case, out=out)
        assert_exp_rows(found, case, f"{way} {shape} {index}")
        assert_frame_untouched(frame, out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("way", ["fused", "sweep"])
def test_row_and_column_statistics_equal_float64_for_every_shape(way, dtype):
    for index, shape in enumerate(SHAPES):
        case = case_of(index, shape, dtype)
        found = row_and_column_statistics(way, case)
        truth, plain = reference.statistics(case), reference.statistics(case, torch.float32)
        for half, what in ((slice(0, 2), "rows"), (slice(2, 4), "columns")):
            assert_statistics(found[half], truth[half], plain[half], case, f"{way} {shape} {index} {what}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("way", ["fused", "sweep"])
def test_gradient_equals_float64_for_every_shape(way, dtype):
    for index, shape in enumerate(SHAPES):
        case = case_of(index, shape, dtype)
        coefficients = coefficients_of(case)
        out, frame = framed(*shape, dtype)
        found = gradient(way, case, coefficients, out=out)
        truth = reference.gradient(case, coefficients)
        plain = reference.gradient(case, coefficients, torch.float32).to(dtype)
        assert bool(found.isfinite().all()), f"{way} {shape} {index}"
        assert bool((found[truth == 0] == 0).all()), f"{way} {shape} {index}: something in place of a non-negative"
        assert_as_good_as_torch(found, plain, truth, case, f"{way} {shape} {index} rows", dim=1)
        assert_as_good_as_torch(found, plain, truth, case, f"{way} {shape} {index} columns", dim=0)
        assert_frame_untouched(frame, out)


@pytest.mark.parametrize("way", ["fused", "sweep"])
def test_a_row_whose_every_passage_is_its_positive_has_no_negative(way):
    case = case_of(0, (63, 65), torch.float32)
    case.who.column_ids_M[:40] = case.who.row_ids_R[5]
    case.who.column_ids_M[40:] = NEVER
    found = exp_rows(way, case)
    assert found.max_R[5] == -reference.INF
    assert bool((found.max_R > -reference.INF).any())
    assert bool((found.e_RM[5] == 0).all())
    assert_exp_rows(found, case, way)
    both = row_and_column_statistics(way, case)
    assert both.row_max_R[5] == -reference.INF
    assert both.row_sum_R[5] == 0


@pytest.mark.parametrize("way", ["fused", "sweep"])
def test_a_column_whose_passage_answers_every_query_has_no_negative(way):
    case = case_of(0, (63, 65), torch.float32)
    case.who.y_R.fill_(4)
    case.who.y_A[7:9] = 4
    found = row_and_column_statistics(way, case)
    assert (found.column_max_A == -reference.INF).nonzero().flatten().tolist() == [7, 8]
    assert bool((found.column_sum_A[7:9] == 0).all())
    coefficients = coefficients_of(case)
    assert bool(coefficients.column_factor_A[7:9].isnan().all())
    truth = reference.gradient(case, coefficients)
    plain = reference.gradient(case, coefficients, torch.float32)
    assert_as_good_as_torch(gradient(way, case, coefficients), plain, truth, case, way, dim=1)


def adversarial(dtype: torch.dtype, m: int = 252) -> reference.Case:
    """Scale 200; odd rows have -200 in the first columns and +200 in column 200, even rows the reverse, and every third
    row has no negative among the first columns; the rest is near 0."""
    case = reference.make_case(127, m, 16, scale=200.0, dtype=dtype, device=DEVICE)
    u = torch.zeros(16)
    u[0] = 1
    case.p_MD[:, 0] = 0
    case.p_MD[:64] = -u.to(case.p_MD)
    case.p_MD[200] = u.to(case.p_MD)
    case.q_RD[0::2] = -u.to(case.q_RD)
    case.q_RD[1::2] = u.to(case.q_RD)
    case.who.column_ids_M.copy_(torch.arange(m) + 1000)
    case.who.row_ids_R.copy_(torch.arange(127))
    case.who.column_ids_M[:64] = 7
    case.who.row_ids_R[::3] = 7
    return case


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("way", ["fused", "sweep"])
def test_exp_rows_is_exact_where_the_estimate_of_the_maximum_is_off_by_400(way, dtype):
    case = adversarial(dtype)
    found = exp_rows(way, case)
    assert found.max_R[1] == 200
    assert bool(found.e_RM.isfinite().all())
    assert_exp_rows(found, case, way)
    if way == "fused":  # both kinds of row are there: estimates that held, and such that did not
        window = epilogue.window_of(dtype)
        repaired = (found.max_R - found.offset_R - window.target).abs() < 1e-4
        assert bool(repaired[1])
        assert not bool(repaired[2])


@pytest.mark.parametrize("way", ["fused", "sweep"])
def test_fp16_keeps_the_many_small_negatives(way):
    """4096 negatives 14 nats below one: 0.3 % of the sum, and nearly subnormal beside a maximum of 1."""
    m, d = 4096, 16
    case = reference.make_case(2, m, d, scale=1.0, dtype=torch.float16, device=DEVICE)
    case.q_RD.zero_()
    case.q_RD[:, 0] = 1
    case.p_MD.zero_()
    case.p_MD[:, 0] = -14
    case.p_MD[9, 0] = 0
    case.who.row_ids_R.fill_(1)
    case.who.column_ids_M.fill_(2)
    found = exp_rows(way, case, Tile(16, 1024, 16, 4, 3))
    kept = (found.e_RM.double().sum(1) - found.e_RM[:, 9].double()) * (found.offset_R - found.max_R).double().exp()
    exact = (m - 1) * torch.tensor(-14.0).double().exp()
    assert bool(((kept - exact).abs() <= exact * 0.002).all()), f"{kept} of {exact}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("way", ["fused", "sweep"])
def test_equal_inputs_give_equal_bits(way, dtype):
    case = case_of(3, (65, 127), dtype)
    coefficients = coefficients_of(case)
    for operation in (exp_rows, row_and_column_statistics, lambda w, c: (gradient(w, c, coefficients),)):
        assert all(torch.equal(a, b) for a, b in zip(operation(way, case), operation(way, case), strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("way", ["fused", "sweep"])
def test_the_tiles_of_the_table_give_the_same(way, dtype):
    case = case_of(3, (130, 300), dtype)
    coefficients = coefficients_of(case)
    assert_exp_rows(exp_rows(way, case, None), case, "table")
    found, truth = row_and_column_statistics(way, case, None), reference.statistics(case)
    plain = reference.statistics(case, torch.float32)
    assert_statistics(found[:2], truth[:2], plain[:2], case, "rows")
    assert_statistics(found[2:], truth[2:], plain[2:], case, "columns")
    truth = reference.gradient(case, coefficients)
    plain = reference.gradient(case, coefficients, torch.float32).to(dtype)
    assert_as_good_as_torch(gradient(way, case, coefficients, None), plain, truth, case, "table", dim=1)


@pytest.mark.parametrize(("r", "m"), [(3, 1100), (140, 40)])
@pytest.mark.parametrize("way", ["fused", "sweep"])
def test_many_tiles_are_walked_and_merged(way, r, m):
    """Statistics are merged 32 tiles at a time, maxima rising by about 20 from one 32 to the next; and tiles are walked
    in groups of 8 rows of tiles, here 9."""
    case = case_of(1, (r, m), torch.float32, margin=False)
    case.p_MD.mul_(torch.arange(m, device=DEVICE)[:, None] / 200)
    tile = Tile(16, 16, 16, 4, 3)
    assert_exp_rows(exp_rows(way, case, tile), case, way)
    found, truth = row_and_column_statistics(way, case, tile), reference.statistics(case)
    plain = reference.statistics(case, torch.float32)
    assert_statistics(found[:2], truth[:2], plain[:2], case, way)
    assert_statistics(found[2:], truth[2:], plain[2:], case, way)


def test_a_float32_sweep_may_write_over_the_products():
    case = case_of(1, (63, 65), torch.float32)
    made = sweep.products(case.q_RD, case.p_MD)
    assert_exp_rows(sweep.exp_rows(made, case.scale, case.who, torch.float32, e_RM=made), case, "in place")
    coefficients = coefficients_of(case)
    apart = gradient("sweep", case, coefficients)
    made = sweep.products(case.q_RD, case.p_MD)
    assert torch.equal(sweep.gradient(made, case.scale, case.who, coefficients, torch.float32, d_RM=made), apart)


@pytest.mark.parametrize("way", ["fused", "sweep"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_shows_in_the_sums(way, value):
    case = case_of(0, (63, 65), torch.float32)
    case.q_RD[4, 3] = value
    assert exp_rows(way, case).sum_R[4].isnan()
    found = row_and_column_statistics(way, case)
    assert found.row_sum_R[4].isnan()
    assert bool(found.column_sum_A.isnan().any())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_add_up_in_float32(dtype):
    """Over many calls, into some rows of a larger matrix: halves of a sum would show as 1e-3."""
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(2, 20, 33, 17, generator=g).to(DEVICE, dtype)).unbind()
    out, frame = torch.full((21, 17), float("nan"), device=DEVICE), torch.full((24, 17), 7.0, device=DEVICE)
    for i, (x, y) in enumerate(zip(a[:, :, :16], b, strict=True)):
        library.add_product(frame[2:18], x.T, y, beta=int(i > 0))
        library.add_product(out, x.new_ones(21, 33), y, beta=int(i > 0))
    truth = torch.einsum("ika,ikb->ab", a[:, :, :16].double(), b.double())
    assert ((frame[2:18] - truth).norm() / truth.norm()).item() < 1e-6
    assert bool((frame[:2] == 7).all() & (frame[18:] == 7).all())
    assert bool(out.isfinite().all())


def test_rescale_changes_what_is_to_be_changed():
    for size in (1, 4095, 4097):
        frame = torch.arange(size + 2.0, device=DEVICE)
        expected = frame.clone()
        library.rescale(frame[1:-1], torch.tensor(1.0, device=DEVICE))
        assert torch.equal(frame, expected)
        library.rescale(frame[1:-1], torch.tensor(0.25, device=DEVICE))
        expected[1:-1] *= 0.25
        assert torch.equal(frame, expected)
    with pytest.raises(ValueError, match="contiguous"):
        library.rescale(torch.ones(4, 4, device=DEVICE).T[1:], torch.tensor(1.0, device=DEVICE))
    with pytest.raises(ValueError, match="ratio"):
        library.rescale(torch.ones(4, device=DEVICE), torch.ones(1, device=DEVICE))
