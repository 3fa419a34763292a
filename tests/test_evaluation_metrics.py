"""Claims about measures: graded, by query, group and pool they are trec_eval's; results and queries survive files."""

from __future__ import annotations

import json
import math
import zipfile
from dataclasses import asdict

import numpy as np
import pytest

from hbt_fast.data.rows import DataError
from hbt_fast.evaluation import metrics
from hbt_fast.evaluation.queries import PerQuery
from hbt_fast.evaluation.ranks import exact_ranks, pool_ranks
from hbt_fast.evaluation.results import Results

LANGUAGES = ("de", "en", "fr")


class Problem:
    """Random vectors with many ties, several relevant candidates of graded gain per query, in three languages."""

    def __init__(self, seed: int, n: int = 40, m: int = 330) -> None:
        rng = np.random.default_rng(seed)
        self.queries, self.candidates = (rng.integers(-2, 3, (size, 4)).astype(np.float32) for size in (n, m))
        self.query_languages, self.candidate_languages = (rng.choice(LANGUAGES, size).tolist() for size in (n, m))
        self.query_languages[:3] = LANGUAGES
        relevant = [np.sort(rng.choice(m, rng.integers(1, 25), replace=False)) for _ in range(n)]
        self.offsets = np.concatenate([[0], np.cumsum([len(r) for r in relevant])])
        self.relevant = np.concatenate(relevant)
        self.gains = rng.integers(1, 4, len(self.relevant)).astype(np.float32)
        pools = [np.sort(rng.choice(m, rng.integers(1, 200), replace=False)) for _ in range(n)]
        self.pools = np.concatenate([[0], np.cumsum([len(p) for p in pools])]), np.concatenate(pools)

    def ranks(self):
        return exact_ranks(
            self.queries, self.candidates, self.query_languages, self.candidate_languages, self.offsets, self.relevant,
            device="cpu",
        )  # fmt: skip

    def qrels(self, keep) -> dict[str, dict[str, int]]:
        """Of the candidates that are kept: keep(query, candidate)."""
        found = {}
        for q in range(len(self.queries)):
            mine = range(self.offsets[q], self.offsets[q + 1])
            judged = {str(self.relevant[r]): int(self.gains[r]) for r in mine if keep(q, self.relevant[r])}
            if judged:
                found[str(q)] = judged
        return found

    def run(self, keep) -> dict[str, dict[str, float]]:
        """Candidates by score and then index; pytrec-eval breaks ties by name, so it gets places instead of scores."""
        scores = self.queries @ self.candidates.T
        order = np.argsort(-scores, axis=1, kind="stable")
        kept = [[c for c in order[q] if keep(q, c)] for q in range(len(order))]
        return {str(q): {str(c): float(-place) for place, c in enumerate(row)} for q, row in enumerate(kept)}

    def theirs(self, keep_judged, keep_ranked) -> dict[str, np.ndarray]:
        pytrec_eval = pytest.importorskip("pytrec_eval")
        qrels, run = self.qrels(keep_judged), self.run(keep_ranked)
        names = {"ndcg@10": "ndcg_cut_10", "recall@100": "recall_100", "map": "map"}
        found = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut.10", "recall.100", "map"}).evaluate(run)
        top = {q: dict(sorted(scores.items(), key=lambda item: -item[1])[:10]) for q, scores in run.items()}
        first = pytrec_eval.RelevanceEvaluator(qrels, {"recip_rank"}).evaluate(top)
        n = len(self.queries)
        values = {
            ours: np.array([found.get(str(q), {}).get(theirs, np.nan) for q in range(n)])
            for ours, theirs in names.items()
        }
        return {**values, "mrr@10": np.array([first.get(str(q), {}).get("recip_rank", np.nan) for q in range(n)])}


def equal(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("seed", range(3))
def test_every_query_has_the_values_of_pytrec_eval_in_its_own_pool(seed):
    problem = Problem(seed)

    def own(q, c):
        return problem.candidate_languages[c] == problem.query_languages[q]

    ours, theirs = metrics.per_query(problem.ranks(), problem.gains), problem.theirs(own, own)
    for name in ("ndcg@10", "recall@100", "mrr@10"):
        equal(ours[name], theirs[name])
    equal(ours["mo"], theirs["map"])


def test_every_query_has_the_values_of_pytrec_eval_in_the_whole_pool():
    problem = Problem(3)
    ranks = problem.ranks()
    ours, theirs = metrics.per_query(ranks, problem.gains), problem.theirs(lambda q, c: True, lambda q, c: True)
    equal(ours["mul"], theirs["map"])
    best = [min(ranks.in_whole_pool[ranks.query == q]) for q in range(len(problem.queries))]
    assert ours["accuracy@1"].tolist() == [float(rank == 1) for rank in best]
    language_N = np.array(problem.query_languages)
    for name, value in metrics.cutoff_metrics(ranks, "all", problem.gains).items():
        assert value == pytest.approx(np.mean([theirs[name][language_N == code].mean() for code in LANGUAGES]))


def test_cr_of_a_query_is_the_mean_over_the_pools_of_other_languages():
    problem = Problem(4)
    pools = {
        code: problem.theirs(*[lambda q, c, code=code: problem.candidate_languages[c] == code] * 2)["map"]
        for code in LANGUAGES
    }
    ours = metrics.per_query(problem.ranks())["cr"]
    for q, language in enumerate(problem.query_languages):
        others = [pools[code][q] for code in LANGUAGES if code != language and not np.isnan(pools[code][q])]
        equal(ours[q], np.mean(others) if others else np.nan)


def test_gains_change_ndcg_and_nothing_else():
    ranks, gains = Problem(5).ranks(), Problem(5).gains
    binary, graded = metrics.per_query(ranks), metrics.per_query(ranks, gains)
    assert not np.array_equal(binary["ndcg@10"], graded["ndcg@10"], equal_nan=True)
    assert all(np.array_equal(binary[name], graded[name], equal_nan=True) for name in binary if name != "ndcg@10")
    equal(metrics.per_query(ranks, np.full_like(gains, 3))["ndcg@10"], binary["ndcg@10"])  # only ratios count


@pytest.mark.parametrize("seed", range(3))
def test_reranking_has_the_values_of_pytrec_eval_where_pools_lack_relevant_candidates(seed):
    problem = Problem(seed)
    starts, members = problem.pools

    def pooled(q, c):
        return c in members[starts[q] : starts[q + 1]]

    ranks = pool_ranks(problem.queries, problem.candidates, problem.offsets, problem.relevant, problem.pools)
    assert (ranks == 0).any()
    query = np.repeat(np.arange(len(problem.queries)), np.diff(problem.offsets))
    ours = metrics.in_pools(ranks, query, len(problem.queries), problem.gains)
    theirs = problem.theirs(lambda q, c: True, pooled)  # what the pool lacks is relevant and not found
    for name in ("ndcg@10", "recall@100", "mrr@10", "map"):
        equal(ours[name], theirs[name])
    results = metrics.summarise_pools(ours, problem.query_languages, 330, "random", groups={"west": ["en", "fr"]})
    by_language = [np.mean(theirs["mrr@10"][np.array(problem.query_languages) == code]) for code in LANGUAGES]
    equal(results.by_language["mrr@10"], by_language)
    assert results.cutoffs["re-ranking"]["mrr@10"] == pytest.approx(np.mean(by_language))
    assert results.groups["west"]["mrr@10"] == pytest.approx(np.mean(by_language[1:]))
    assert math.isnan(results.mo)


def test_groups_are_macro_means_of_every_measure():
    problem = Problem(6)
    results = metrics.summarise(problem.ranks(), "random", gains=problem.gains, groups={"a": ["de", "fr"], "b": ["en"]})
    matrix = np.array(results.matrix)
    assert results.group_languages == {"a": ["de", "fr"], "b": ["en"]}
    assert "a (de, fr); b (en):" in results.to_markdown()
    assert results.groups["a"]["mo"] == pytest.approx((matrix[0, 0] + matrix[2, 2]) / 2)
    assert results.groups["a"]["cr"] == pytest.approx(np.mean([matrix[0, 1], matrix[0, 2], matrix[2, 0], matrix[2, 1]]))
    assert results.groups["b"]["cr"] == pytest.approx(np.mean([matrix[1, 0], matrix[1, 2]]))
    for name in ("mul", "rank_distance", "ndcg@10", "recall@100", "mrr@10", "accuracy@1"):
        values = results.by_language[name]
        assert results.groups["a"][name] == pytest.approx((values[0] + values[2]) / 2)
        assert results.groups["b"][name] == pytest.approx(values[1])
    assert results.cutoffs["own"]["ndcg@10"] == pytest.approx(np.mean(results.by_language["ndcg@10"]))


def test_cr_of_a_group_is_a_mean_over_pairs_as_cr_is():
    # de has an answer in en only, en has one in de and in fr: three pairs, of which two are of en.
    candidates = np.eye(6, dtype=np.float32)
    queries = np.array([[0, 0, 0.1, 0.2, 0, 0], [0.2, 0.1, 0, 0, 0.1, 0.2]], dtype=np.float32)
    languages = ["de", "de", "en", "en", "fr", "fr"]
    ranks = exact_ranks(queries, candidates, ["de", "en"], languages, np.array([0, 1, 3]), np.array([2, 0, 4]))
    results = metrics.summarise(ranks, "holes", groups={"both": ["de", "en"]})
    assert results.groups["both"]["cr"] == results.cr == pytest.approx((0.5 + 1 + 0.5) / 3)


def test_an_approximate_search_is_measured_by_what_it_found():
    problem = Problem(7)
    ranks, order = problem.ranks(), np.argsort(-(problem.queries @ problem.candidates.T), axis=1, kind="stable")
    exact = metrics.cutoff_metrics(ranks, "all", problem.gains)
    assert metrics.found_metrics(ranks, order[:, :100], problem.gains) == pytest.approx(exact)
    lost = order[:, :100].copy()
    lost[:, ::2] = -1
    assert metrics.found_metrics(ranks, lost, problem.gains)["recall@100"] < exact["recall@100"]


def one_language_per_query(languages=("en",)) -> Results:
    n = 6 * len(languages)
    vectors = np.eye(n, dtype=np.float32)
    codes = [code for code in languages for _ in range(6)]
    ranks = exact_ranks(vectors, vectors, codes, codes, np.arange(n + 1), np.arange(n), device="cpu")
    return metrics.summarise(ranks, "made", "m", left_out=2)


def test_several_relevant_passages_in_one_language_have_no_rank_distance():
    vectors = np.eye(4, dtype=np.float32)
    ranks = exact_ranks(vectors[:1], vectors, ["en"], ["en", "en", "de", "de"], np.array([0, 2]), np.array([0, 1]))
    assert math.isnan(metrics.summarise(ranks, "miracl").rank_distance)
    ranks = exact_ranks(vectors[:1], vectors, ["en"], ["en", "en", "de", "de"], np.array([0, 2]), np.array([0, 2]))
    assert metrics.summarise(ranks, "parallel").rank_distance == 2.0


def test_a_page_shows_what_there_is_and_no_nan():
    page = one_language_per_query().to_markdown()
    assert "| mAP |\n| --- |\n| 1.0000 |" in page
    assert not any(word in page for word in ("nan", "Cr", "Mul", "rank distance", "By query language"))
    assert "2 further queries have no relevant candidate" in page
    assert "| nDCG@10 | Recall@100 | MRR@10 |\n| --- | ---: | ---: |\n| 1.0000" in page  # of the only pool
    page = one_language_per_query(("en", "sw")).to_markdown()
    assert "| Mo | Mul |" in page
    assert not any(word in page for word in ("nan", "Cr", "rank distance", "passage language (column)"))
    problem = Problem(8)
    page = metrics.summarise(problem.ranks(), "r", groups={"west": ["en"]}).to_markdown()
    for part in (
        "| Mo | Cr | Mul | rank distance |",
        "| west |",
        "| query | Mo | Cr (mean) |",
        "passage language (column)",
    ):
        assert part in page


def test_headlines_are_what_a_task_is_reported_by():
    results = metrics.summarise(Problem(9).ranks(), "r")
    assert results.headline() == (
        f"Mo {results.mo:.4f}  Cr {results.cr:.4f}  Mul {results.mul:.4f}  RD {results.rank_distance:.1f}"
    )
    assert one_language_per_query().headline() == "nDCG@10 1.0000  Recall@100 1.0000  MRR@10 1.0000  mAP 1.0000"
    assert one_language_per_query(("en", "sw")).headline().endswith("mAP 1.0000  (pool of all languages)")


def test_results_of_earlier_versions_load():
    results = metrics.summarise(Problem(1).ranks(), "r")
    old = {key: value for key, value in asdict(results).items()
           if key not in ("by_language", "groups", "left_out", "notes")}  # fmt: skip
    again = Results.from_json(json.dumps(old))
    assert again.by_language == {}
    assert again.of_language("cr") == pytest.approx(results.by_language["cr"])
    assert again.of_language("mo") == pytest.approx(results.by_language["mo"])
    assert "By query language" in again.to_markdown()


def test_measures_of_queries_survive_their_file(tmp_path):
    table = PerQuery("t", ["a", "質問"], ["en", "ja"], {"mo": np.array([0.5, np.nan]), "ndcg@10": np.ones(2)})
    again = PerQuery.read(table.write(tmp_path / "x.queries.npz"))
    assert (again.task, again.ids, again.languages, list(again.measures)) == (
        "t",
        ["a", "質問"],
        ["en", "ja"],
        ["mo", "ndcg@10"],
    )
    assert np.array_equal(again.measures["mo"], table.measures["mo"], equal_nan=True)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"task": np.array(3)}, "no text array 'task'"),
        ({"task": np.array(["t"])}, "no text array 'task'"),
        ({"ids": np.array("a")}, "no text array 'ids'"),
        ({"ids": np.array([["a", "b"]])}, "no text array 'ids'"),
        ({"languages": np.array([b"en", b"de"])}, "no text array 'languages'"),
        ({"languages": np.array(["en"])}, "x.npz: "),
        ({"mo": np.ones(3)}, "x.npz: "),
        ({"mo": np.ones((2, 2))}, "x.npz: "),
        ({"mo": np.array(["x", "y"])}, "x.npz: "),
    ],
)
def test_arrays_that_are_no_measures_of_queries_are_refused(tmp_path, changed, message):
    arrays = {"task": np.array("t"), "ids": np.array(["a", "b"]), "languages": np.array(["en", "de"]), "mo": np.ones(2)}
    np.savez(tmp_path / "x.npz", **arrays)
    assert PerQuery.read(tmp_path / "x.npz").ids == ["a", "b"]
    np.savez(tmp_path / "x.npz", **arrays | changed)
    with pytest.raises(DataError, match=message):
        PerQuery.read(tmp_path / "x.npz")


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("{'descr': '<f8', 'fortran_order': False, 'shape': (9999999999,)}", "task.npy is cut short"),
        ("{'descr': '<f8', 'fortran_order': False, 'shape': (2,", ""),
        ("{'descr': '<q9', 'fortran_order': False, 'shape': (2,)}", ""),
        ("3", ""),
    ],
)
def test_headers_of_arrays_that_say_anything_are_refused(tmp_path, header, message):
    raw = header.encode() + b"\n"
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("task.npy", b"\x93NUMPY\x01\x00" + len(raw).to_bytes(2, "little") + raw + bytes(16))
    with pytest.raises(DataError, match=rf"x.npz: not a .queries.npz file of hbt_fast.evaluate \({message}"):
        PerQuery.read(tmp_path / "x.npz")


def test_other_files_are_refused_and_nothing_is_unpickled(tmp_path):
    path = tmp_path / "x.npz"
    path.write_bytes(b"no archive")
    with pytest.raises(ValueError, match=r"x\.npz: not a \.queries\.npz file .*no \.npz file"):
        PerQuery.read(path)
    np.savez(path, task=np.array("t"), ids=np.array([{}], object), languages=np.array(["en"]))
    with pytest.raises(ValueError, match="allow_pickle"):
        PerQuery.read(path)
    np.savez(path, mo=np.ones(2))
    with pytest.raises(ValueError, match="no text array 'task'"):
        PerQuery.read(path)
    np.savez(path, task=np.array("t"), ids=np.array(["a"]), languages=np.array(["en"]), mo=np.ones(2))
    with pytest.raises(ValueError, match=r"measure 'mo' is float64 \(2,\); it must be float64 \(1,\)"):
        PerQuery.read(path)
    with pytest.raises(FileNotFoundError):
        PerQuery.read(tmp_path / "absent.npz")
    with pytest.raises(ValueError, match=r"must end in \.npz"):
        PerQuery("t", [], [], {}).write(tmp_path / "x.json")
