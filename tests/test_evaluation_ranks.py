"""Claims about ranks and metrics: they equal a full sort, pytrec-eval, and figures worked out by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from hbt_fast.evaluation import metrics
from hbt_fast.evaluation import ranks as ranks_module
from hbt_fast.evaluation.counting import columns_of, is_compiled
from hbt_fast.evaluation.ranks import exact_ranks, pool_ranks

LANGUAGES = ("zz", "aa", "mm")
needs_compiled = pytest.mark.skipif(not is_compiled(), reason="csrc/ was not built")
BACKENDS = [pytest.param("cpu", marks=needs_compiled), "torch"]


def random_problem(seed: int, n: int = 60, m: int = 130, dimension: int = 5):
    """Vectors of small integers: products are exact in float32 and ties abound, also between languages.

    Candidates of the languages lie mixed, relevant ones are 1 to 4 of any language, and some vectors repeat.
    """
    rng = np.random.default_rng(seed)
    queries = rng.integers(-2, 3, (n, dimension)).astype(np.float32)
    candidates = rng.integers(-2, 3, (m, dimension)).astype(np.float32)
    candidates[m // 2 : m // 2 + 10] = candidates[:10]
    sizes = rng.integers(1, 5, n)
    relevant = np.concatenate([np.sort(rng.choice(m, size, replace=False)) for size in sizes])
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    return (
        queries,
        candidates,
        [LANGUAGES[i] for i in rng.integers(0, 3, n)],
        [LANGUAGES[i] for i in rng.integers(0, 3, m)],
        offsets,
        relevant,
    )


def sorted_pool(problem, query: int, language: str | None) -> list[int]:
    """The oracle: candidates of a pool, best first, by a full sort on (-score, index)."""
    queries, candidates, _, candidate_languages, _, _ = problem
    scores = candidates @ queries[query]
    pool = [c for c in range(len(candidates)) if language is None or candidate_languages[c] == language]
    return sorted(pool, key=lambda c: (-scores[c], c))


def oracle_ap(ranking: list[int], relevant: set[int]) -> float:
    hits, total = 0, 0.0
    for place, candidate in enumerate(ranking, 1):
        if candidate in relevant:
            hits += 1
            total += hits / place
    return total / hits if hits else math.nan


def relevant_of(problem, query: int) -> set[int]:
    return set(problem[5][problem[4][query] : problem[4][query + 1]].tolist())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("workspace_bytes", [1, 7 * 4 * 130, 2**20, None])
def test_ranks_equal_a_full_sort_with_ties(backend, workspace_bytes):
    # One row at a time, 7 rows (60 is no multiple), all rows at once, the default.
    problem = random_problem(0)
    ranks = exact_ranks(*problem, backend=backend, device="cpu", workspace_bytes=workspace_bytes)
    for pair, (query, candidate) in enumerate(zip(ranks.query, ranks.relevant, strict=True)):
        language = problem[3][candidate]
        assert ranks.in_whole_pool[pair] == 1 + sorted_pool(problem, query, None).index(candidate)
        assert ranks.in_own_pool[pair] == 1 + sorted_pool(problem, query, language).index(candidate)


@needs_compiled
def test_both_backends_count_alike_in_every_language_block():
    for seed in range(5):
        problem = random_problem(seed, n=40, m=90, dimension=3)
        a, b = (exact_ranks(*problem, backend=backend, device="cpu").higher for backend in ("cpu", "torch"))
        assert np.array_equal(a, b)


@needs_compiled
@pytest.mark.parametrize("threads", [1, 3])
def test_both_backends_count_alike_on_real_vectors_and_long_blocks(threads):
    # Blocks below and above the length that is prefetched, vectors' lengths and tails, a query without answers.
    rng = np.random.default_rng(threads)
    sizes = [1, 5000, 15, 16, 17, 300]
    queries, candidates = (rng.standard_normal((n, 24)).astype(np.float32) for n in (70, sum(sizes)))
    candidates[-200:] = candidates[5001:5201]  # ties
    languages = np.repeat([f"l{i}" for i in range(len(sizes))], sizes).tolist()
    counts = rng.integers(0, 30, 70)
    relevant = np.concatenate([rng.choice(sum(sizes), n, replace=False) for n in counts])
    problem = (queries, candidates, ["l0"] * 70, languages, np.concatenate([[0], np.cumsum(counts)]), relevant)
    torch.set_num_threads(threads)
    a, b = (
        exact_ranks(*problem, backend=backend, device="cpu", workspace_bytes=10**6).higher
        for backend in ("cpu", "torch")
    )
    assert np.array_equal(a, b)
    scores = candidates.astype(np.float64) @ queries.astype(np.float64).T
    above = (scores[:, np.repeat(np.arange(70), counts)] > scores[relevant, np.repeat(np.arange(70), counts)]).sum(0)
    assert np.abs(a.sum(axis=1) - above).max() <= 3  # float64 differs in rounding and, of ties, counts none


@pytest.mark.parametrize("backend", BACKENDS)
def test_languages_may_be_grouped_in_any_order_or_mixed(backend):
    # The same candidates in three orders: languages as they sort, grouped otherwise, mixed. Without ties, equal counts.
    rng = np.random.default_rng(0)
    queries, candidates = (rng.permutation(n * 6).reshape(n, 6).astype(np.float32) % 97 for n in (20, 90))
    languages = np.repeat(["aa", "mm", "zz"], [40, 20, 30])
    relevant = rng.choice(90, 60, replace=False)
    counts = []
    for order in (np.arange(90), np.r_[60:90, 0:40, 40:60], rng.permutation(90)):
        place = np.argsort(order)
        found = exact_ranks(
            queries, candidates[order], ["zz"] * 20, languages[order].tolist(), np.arange(0, 61, 3), place[relevant],
            backend=backend, device="cpu",
        )  # fmt: skip
        counts.append(found.higher)
        assert found.pool.tolist() == [40, 20, 30]
    assert np.array_equal(counts[0], counts[1])
    assert np.array_equal(counts[0], counts[2])


def test_grouped_candidates_are_not_copied_and_may_be_a_read_only_map(tmp_path, monkeypatch, recwarn):
    problem = list(random_problem(5))
    order = np.argsort([LANGUAGES.index(code) for code in problem[3]], kind="stable")  # zz before aa
    problem[1] = problem[1][order]
    problem[3] = [problem[3][i] for i in order]
    np.save(tmp_path / "vectors.npy", problem[1])
    mapped = np.load(tmp_path / "vectors.npy", mmap_mode="r")
    operands, multiply = [], torch.mm

    def spy(a, b, **options):
        operands.append(b.T)
        return multiply(a, b, **options)

    monkeypatch.setattr(torch, "mm", spy)
    found = exact_ranks(problem[0], mapped, *problem[2:], device="cpu")
    assert operands[0].data_ptr() == mapped.ctypes.data
    monkeypatch.undo()
    assert np.array_equal(found.higher, exact_ranks(*problem, device="cpu").higher)
    assert not recwarn.list


def test_columns_are_moved_only_where_a_language_lies_apart():
    offsets, relevant = np.array([0, 1]), np.array([1])
    assert columns_of(np.array([2, 2, 0, 1]), 3, offsets, relevant).order is None
    where = columns_of(np.array([2, 0, 2, 1]), 4, offsets, relevant)
    assert where.order.tolist() == [1, 3, 0, 2]
    assert where.blocks.tolist() == [[0, 1], [1, 2], [2, 4], [0, 0]]
    assert where.positions.tolist() == [0]
    assert where.splits.tolist() == [[0, 1, 3, 0]]  # candidate 0 wins a tie against candidate 1, 2 and 3 do not


def pools_of(seed: int, n: int, m: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    sizes = np.append(rng.integers(0, 40, n - 1), 0)  # the last pool is empty
    pools = [rng.choice(m, size, replace=False) for size in sizes]
    return np.concatenate([[0], np.cumsum(sizes)]), np.concatenate(pools)


@pytest.mark.parametrize("workspace_bytes", [1, 4000, 2**26])
def test_pool_ranks_equal_a_full_sort_with_ties(workspace_bytes):
    queries, candidates, _, _, offsets, relevant = random_problem(6)
    starts, pooled = pools_of(6, len(queries), len(candidates))
    found = pool_ranks(queries, candidates, offsets, relevant, (starts, pooled), workspace_bytes=workspace_bytes)
    truth = []
    for i in range(len(queries)):
        scores = candidates @ queries[i]
        ranking = sorted(pooled[starts[i] : starts[i + 1]].tolist(), key=lambda c: (-scores[c], c))
        truth += [1 + ranking.index(c) if c in ranking else 0 for c in relevant[offsets[i] : offsets[i + 1]]]
    assert found.dtype == np.int64
    assert found.tolist() == truth
    assert 0 in truth
    assert len(set(truth)) > 10


def test_equal_vectors_tie_in_pools_wherever_they_lie():
    # Of an awkward dimension, at every place of pools of every size: the lower index wins, by not one bit of rounding.
    rng = np.random.default_rng(0)
    candidates = np.repeat(rng.standard_normal((1, 67)).astype(np.float32), 40, axis=0)
    queries = rng.standard_normal((39, 67)).astype(np.float32)
    sizes = np.arange(2, 41)
    pooled = np.concatenate([rng.permutation(40)[:size] for size in sizes])
    starts = np.concatenate([[0], np.cumsum(sizes)])
    best = np.array([pooled[a:b].min() for a, b in itertools.pairwise(starts)])
    last = np.array([pooled[a:b].max() for a, b in itertools.pairwise(starts)])
    relevant = np.stack([best, last], axis=1).ravel()
    found = pool_ranks(queries, candidates, np.arange(0, 79, 2), relevant, (starts, pooled)).reshape(-1, 2)
    assert (found[:, 0] == 1).all()
    assert (found[:, 1] == sizes).all()


def test_pool_ranks_in_pools_of_everything_are_exact_ranks():
    problem = random_problem(7)
    n, m = len(problem[0]), len(problem[1])
    pools = np.arange(0, n * m + 1, m), np.tile(np.arange(m)[::-1], n)
    found = pool_ranks(problem[0], problem[1], *problem[4:], pools)
    assert np.array_equal(found, exact_ranks(*problem, device="cpu").in_whole_pool)


def test_metrics_equal_a_brute_force_oracle():
    problem = random_problem(1)
    results = metrics.summarise(exact_ranks(*problem, device="cpu"), "random")
    languages = sorted(LANGUAGES)
    assert results.languages == languages
    cells, mul, distance = {}, {}, {}
    for a in languages:
        mine = [q for q in range(len(problem[2])) if problem[2][q] == a]
        for b in languages:
            aps = [
                oracle_ap(sorted_pool(problem, q, b), {c for c in relevant_of(problem, q) if problem[3][c] == b})
                for q in mine
            ]
            cells[a, b] = np.nanmean(aps)
        mul[a] = np.mean([oracle_ap(sorted_pool(problem, q, None), relevant_of(problem, q)) for q in mine])
        places = [[sorted_pool(problem, q, None).index(c) for c in relevant_of(problem, q)] for q in mine]
        distance[a] = np.mean([max(p) - min(p) for p in places if len(p) > 1])
    np.testing.assert_allclose(results.matrix, [[cells[a, b] for b in languages] for a in languages], rtol=1e-12)
    np.testing.assert_allclose(results.mul_by_language, [mul[a] for a in languages], rtol=1e-12)
    np.testing.assert_allclose(results.rank_distance_by_language, [distance[a] for a in languages], rtol=1e-12)
    assert results.mo == pytest.approx(np.mean([cells[a, a] for a in languages]), rel=1e-12)
    assert results.cr == pytest.approx(np.mean([cells[a, b] for a, b in itertools.permutations(languages, 2)]))
    assert results.mul == pytest.approx(np.mean(list(mul.values())), rel=1e-12)
    assert results.rank_distance == pytest.approx(np.mean(list(distance.values())), rel=1e-12)


def test_map_and_cutoffs_equal_pytrec_eval():
    pytrec_eval = pytest.importorskip("pytrec_eval")
    problem = random_problem(2, m=250)
    ranks = exact_ranks(*problem, device="cpu")
    ap = metrics.average_precision(ranks.in_whole_pool, ranks.query, len(problem[0]))
    # pytrec-eval breaks ties by document name: it gets distinct scores in the order that our contract states.
    run = {
        str(q): {str(c): float(-place) for place, c in enumerate(sorted_pool(problem, q, None))}
        for q in range(len(problem[0]))
    }
    qrels = {str(q): {str(c): 1 for c in relevant_of(problem, q)} for q in range(len(problem[0]))}
    theirs = pytrec_eval.RelevanceEvaluator(qrels, {"map", "ndcg_cut.10", "recall.100"}).evaluate(run)
    top = {q: dict(sorted(scores.items(), key=lambda item: -item[1])[:10]) for q, scores in run.items()}
    theirs_mrr = pytrec_eval.RelevanceEvaluator(qrels, {"recip_rank"}).evaluate(top)
    np.testing.assert_allclose(ap, [theirs[str(q)]["map"] for q in range(len(ap))], rtol=1e-12)

    def macro(values: dict[str, dict[str, float]], key: str) -> float:
        by_language = {a: [values[str(q)][key] for q in range(len(ap)) if problem[2][q] == a] for a in LANGUAGES}
        return float(np.mean([np.mean(v) for v in by_language.values()]))

    ours = metrics.cutoff_metrics(ranks, "all")
    assert ours["ndcg@10"] == pytest.approx(macro(theirs, "ndcg_cut_10"), rel=1e-12)
    assert ours["recall@100"] == pytest.approx(macro(theirs, "recall_100"), rel=1e-12)
    assert ours["mrr@10"] == pytest.approx(macro(theirs_mrr, "recip_rank"), rel=1e-12)


@pytest.mark.parametrize("pool", ["own", "all"])
def test_cutoffs_end_where_their_names_say(pool):
    """One query whose only answer is at the last rank that counts, then at the next."""

    def at(rank: int) -> dict[str, float]:
        scores = -np.arange(200, dtype=np.float32)[:, None]
        ranks = exact_ranks(
            np.ones((1, 1), np.float32), scores, ["en"], ["en"] * 200, np.array([0, 1]), np.array([rank - 1]),
            device="cpu",
        )  # fmt: skip
        return metrics.cutoff_metrics(ranks, pool)

    assert at(10) == pytest.approx({"ndcg@10": 1 / math.log2(11), "recall@100": 1.0, "mrr@10": 0.1})
    assert at(11) == {"ndcg@10": 0.0, "recall@100": 1.0, "mrr@10": 0.0}
    assert at(100)["recall@100"] == 1.0
    assert at(101)["recall@100"] == 0.0


def test_hand_computed_case():
    """Two parallel questions (de, en), four candidates; scores set by hand through unit axes."""
    # index                         0       1       2       3       (0 de, 1 en: the answer; 2 de, 3 en: others)
    candidates = np.eye(4, dtype=np.float32)
    queries = np.array([[0.9, 0.4, 0.5, 0.4], [0.2, 0.3, 0.9, 0.8]], dtype=np.float32)
    # de question: whole pool 0, 2, 1, 3 (1 and 3 tie, lower index first): answers at ranks 1 and 3, distance 2.
    # en question: whole pool 2, 3, 1, 0: answers at ranks 3 and 4, distance 1.
    ranks = exact_ranks(
        queries, candidates, ["de", "en"], ["de", "en", "de", "en"], np.array([0, 2, 4]), np.array([0, 1, 0, 1])
    )
    results = metrics.summarise(ranks, "hand")
    # de question: answer 1st of the de pool, 1st of the en pool (tie won); en question: 2nd of each.
    assert results.matrix == [[1.0, 1.0], [0.5, 0.5]]
    assert results.mo == 0.75
    assert results.cr == 0.75
    assert results.mul_by_language == pytest.approx([(1 / 1 + 2 / 3) / 2, (1 / 3 + 2 / 4) / 2])
    assert results.mul == pytest.approx(((1 + 2 / 3) / 2 + (1 / 3 + 1 / 2) / 2) / 2)
    assert results.rank_distance_by_language == [2.0, 1.0]
    assert results.rank_distance == 1.5


def test_no_candidate_beats_itself_by_rounding():
    # Every query is a candidate and its own answer, in an awkward shape and split into chunks: rank 1 throughout.
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((257, 67)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    languages = ["en"] * 257
    for workspace_bytes in (4 * 257, 4 * 257 * 50, 2**24):
        ranks = exact_ranks(
            vectors, vectors, languages, languages, np.arange(258), np.arange(257), workspace_bytes=workspace_bytes
        )
        assert (ranks.in_whole_pool == 1).all()


@pytest.mark.parametrize("m", [37, 130, 1309])
@pytest.mark.parametrize("n", [1, 2, 5])
def test_equal_vectors_tie_in_every_column(n, m):
    # m is no multiple of anything; 5 queries, two at a time, leave one for the last chunk.
    rng = np.random.default_rng(0)
    queries = rng.standard_normal((n, 67)).astype(np.float32)
    candidates = np.repeat(rng.standard_normal((1, 67)).astype(np.float32), m, axis=0)
    pair_2M = torch.mm(torch.from_numpy(queries[[0, -1]]), torch.from_numpy(candidates).T)
    if not bool((pair_2M == pair_2M[:, :1]).all()):
        pytest.skip("the matrix product of this machine rounds some columns otherwise")
    found = exact_ranks(
        queries, candidates, ["en"] * n, ["en"] * m, m * np.arange(n + 1), np.tile(np.arange(m), n), device="cpu",
        workspace_bytes=2 * 4 * m,
    )  # fmt: skip
    assert np.array_equal(found.in_whole_pool, 1 + np.tile(np.arange(m), n))


def test_a_chunk_has_64_rows_however_many_candidates_there_are(monkeypatch):
    rows, multiply = [], torch.mm

    def spy(a, b, **options):
        rows.append(len(a))
        return multiply(a, b, **options)

    monkeypatch.setattr(torch, "mm", spy)
    candidates = np.zeros((300_000, 1), dtype=np.float32)  # 56 rows of them are 64 MiB
    problem = (np.zeros((130, 1), np.float32), candidates, ["en"] * 130, ["en"] * 300_000)
    found = exact_ranks(*problem, np.arange(131), np.arange(130), device="cpu")
    assert rows == [64, 64, 2]
    assert found.in_whole_pool.tolist() == list(range(1, 131))


def test_a_reduced_matmul_precision_of_the_program_is_not_used_and_comes_back(monkeypatch):
    during, multiply = [], torch.mm

    def spy(*arguments, **options):  # few CPUs have reduced products, so the setting is watched and not its effect
        during.append(torch.get_float32_matmul_precision())
        return multiply(*arguments, **options)

    monkeypatch.setattr(torch, "mm", spy)
    torch.set_float32_matmul_precision("medium")
    try:
        exact_ranks(*random_problem(3), device="cpu")
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert set(during) == {"highest"}


def test_a_language_without_answers_is_left_out_of_the_means():
    # MLQA-R has holes: the fr pool holds no answer of the one query, so only de -> en counts for Cr.
    candidates, queries = np.eye(3, dtype=np.float32), np.array([[0.3, 0.2, 0.1]], dtype=np.float32)
    ranks = exact_ranks(queries, candidates, ["de"], ["de", "en", "fr"], np.array([0, 2]), np.array([0, 1]))
    results = metrics.summarise(ranks, "holes")
    assert (results.mo, results.cr, results.mul, results.rank_distance) == (1.0, 1.0, 1.0, 1.0)
    assert math.isnan(results.matrix[0][2])
    assert math.isnan(results.mul_by_language[1])


def test_one_answer_has_no_rank_distance():
    ranks = exact_ranks(np.eye(2, dtype=np.float32), np.eye(2, dtype=np.float32), ["en"] * 2, ["en"] * 2,
                        np.arange(3), np.arange(2))  # fmt: skip
    assert math.isnan(metrics.summarise(ranks, "single").rank_distance)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p[0].__setitem__((3, 1), np.nan), r"queries: vector 3 holds NaN"),
        (lambda p: p[1].__setitem__((7, 0), np.inf), r"candidates: vector 7 holds NaN or infinity"),
        (lambda p: p.__setitem__(0, p[0][:, :2]), r"queries have dimension 2, candidates 5"),
        (lambda p: p.__setitem__(0, p[0].astype(np.float64)), r"queries must be float32"),
        (lambda p: p.__setitem__(2, p[2][1:]), r"60 vectors but 59 languages"),
        (lambda p: p.__setitem__(4, p[4][:-1]), r"offsets must have one entry more than the 60 queries, not 60"),
        (lambda p: p.__setitem__(5, p[5][:-1]), r"offsets must rise from 0 to \d+, the length of relevant"),
        (lambda p: p[4].__setitem__(2, p[4][-1]), r"offsets must rise"),
        (lambda p: p[5].__setitem__(3, 130), r"relevant must lie in 0 .. 129, the candidates"),
        (lambda p: p[5].__setitem__(3, -1), r"relevant must lie in 0 .. 129, the candidates"),
    ],
)
def test_bad_input_is_named(change, message):
    problem = list(random_problem(4))
    change(problem)
    with pytest.raises(ValueError, match=message):
        exact_ranks(*problem)
    if "languages" not in message:
        pools = np.arange(61), np.zeros(60, dtype=np.int64)
        with pytest.raises(ValueError, match=message):
            pool_ranks(problem[0], problem[1], *problem[4:], pools)


def test_bad_pools_are_named():
    problem = random_problem(4)
    given = (problem[0], problem[1], *problem[4:])
    with pytest.raises(ValueError, match=r"pools\[0\] must rise from 0 to 59, the length of pools\[1\]"):
        pool_ranks(*given, (np.arange(61), np.zeros(59, dtype=np.int64)))
    with pytest.raises(ValueError, match=r"pools\[1\] must lie in 0 .. 129"):
        pool_ranks(*given, (np.arange(61), np.full(60, 130)))


def test_large_numbers_are_not_taken_for_infinity():
    vectors = np.full((4, 2), 2e38, dtype=np.float32)
    assert vectors[0].sum(dtype=np.float64) > np.finfo(np.float32).max
    ranks_module._check_vectors(vectors, vectors)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "numba"}, r'"auto", "torch", "cpu" or "triton", not \'numba\''),
        ({"backend": "triton", "device": "cpu"}, r"backend='triton' does not count on device='cpu'"),
        ({"backend": "cpu", "device": "cuda"}, r"backend='cpu' does not count on device='cuda'"),
    ],
)
def test_backends_that_do_not_fit_are_refused(options, message, monkeypatch):
    monkeypatch.setattr(ranks_module, "is_compiled", lambda: True)
    monkeypatch.setattr(ranks_module, "has_triton", lambda: True)
    with pytest.raises(ValueError, match=message):
        exact_ranks(*random_problem(4), **options)


def test_without_the_compiled_part_torch_counts_and_cpu_says_why_not(monkeypatch):
    truth = exact_ranks(*random_problem(4), device="cpu").higher
    monkeypatch.setattr(ranks_module, "is_compiled", lambda: False)
    assert np.array_equal(exact_ranks(*random_problem(4), device="cpu").higher, truth)
    with pytest.raises(ValueError, match=r"csrc/, which this installation did not build: take backend=\"torch\""):
        exact_ranks(*random_problem(4), device="cpu", backend="cpu")
    assert ranks_module._backend("auto", "cpu") == "torch"
    monkeypatch.setattr(ranks_module, "is_compiled", lambda: True)
    assert ranks_module._backend("auto", "cpu") == "cpu"
    monkeypatch.setattr(ranks_module, "has_triton", lambda: True)
    assert ranks_module._backend("auto", "cuda:1") == "triton"


def test_counting_leaves_the_number_of_threads_alone():
    exact_ranks(*random_problem(4), device="cpu")
    assert torch.get_num_threads() == 1  # as conftest.py sets it
