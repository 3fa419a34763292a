"""Claims about ranks and metrics: they equal a full sort, pytrec-eval, and figures worked out by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from hbt_fast.evaluation import metrics
from hbt_fast.evaluation import ranks as ranks_module
from hbt_fast.evaluation.counting import is_compiled
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
def test_an_ignored_candidate_is_as_if_it_were_not_there(backend):
    problem = random_problem(5)
    rng = np.random.default_rng(5)
    ignored = np.array([rng.choice(sorted(set(range(130)) - relevant_of(problem, query))) for query in range(60)])
    ignored[::7] = -1
    ranks = exact_ranks(*problem, ignored=ignored, backend=backend, device="cpu", workspace_bytes=7 * 4 * 130)
    assert ranks.relevant.tolist() == problem[5].tolist()
    for pair, (query, candidate) in enumerate(zip(ranks.query, ranks.relevant, strict=True)):
        for language, rank in ((None, ranks.in_whole_pool), (problem[3][candidate], ranks.in_own_pool)):
            pool = [c for c in sorted_pool(problem, query, language) if c != ignored[query]]
            assert rank[pair] == 1 + pool.index(candidate)
    with pytest.raises(ValueError, match=r"ignored must be 60 candidates in 0 \.\. 129, or -1"):
        exact_ranks(*problem, ignored=ignored + 70)


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


def test_large_numbers_are_not_taken_for_infinity():
    vectors = np.full((4, 2), 2e38, dtype=np.float32)
    assert vectors[0].sum(dtype=np.float64) > np.finfo(np.float32).max
    ranks_module._check_vectors(vectors, vectors)
