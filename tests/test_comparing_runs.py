"""Claims about comparing runs: statistics against scipy and simulation, figures against the evaluation's, output."""

from __future__ import annotations

import json
import math
import re
import warnings
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from programs import status
from scipy import stats

from hbt_fast import compare as program
from hbt_fast.data.rows import Row
from hbt_fast.evaluation.bitext import evaluate_bitext, n_way
from hbt_fast.evaluation.compare import CompareError, compare_runs
from hbt_fast.evaluation.compare_plots import draw_curves
from hbt_fast.evaluation.compare_report import latex, to_json, to_latex, to_markdown
from hbt_fast.evaluation.made import made_on
from hbt_fast.evaluation.metrics import per_query, summarise
from hbt_fast.evaluation.queries import PerQuery
from hbt_fast.evaluation.ranks import exact_ranks
from hbt_fast.evaluation.report import write_report
from hbt_fast.evaluation.resampling import Block, blocks_of, bootstrap, holm, randomisation, totals
from hbt_fast.evaluation.tasks import task_from_rows
from hbt_fast.fonts import choose, fonts_for

LANGUAGES = ("ar", "de", "zh")
EVERY = np.ones((1, 1), dtype=bool)


def evaluated(seed, questions=24, holes=False, noise=0.9, model="m"):
    """Results and values of queries of a made-up parallel task; equal seeds differ in their vectors alone."""
    rng, task = np.random.default_rng(seed), np.random.default_rng(99)
    meaning = task.standard_normal((questions, 16))
    there = task.random((questions, len(LANGUAGES))) < (0.7 if holes else 2)
    there[:, 0] = True
    number, language = np.nonzero(there)
    order = np.lexsort((number, language))
    number, language = number[order], language[order]
    vectors = [meaning[number] + noise * rng.standard_normal((len(number), 16)) for _ in range(2)]
    q_Nd, p_Md = ((v / np.linalg.norm(v, axis=1, keepdims=True)).astype(np.float32) for v in vectors)
    relevant = [np.flatnonzero(number == n) for n in number]
    offsets = np.concatenate([[0], np.cumsum(list(map(len, relevant)))])
    codes = [LANGUAGES[i] for i in language]
    ranks = exact_ranks(q_Nd, p_Md, codes, codes, offsets, np.concatenate(relevant), device="cpu")
    measures = per_query(ranks)
    results = summarise(ranks, "made-up", model, measures=measures)
    return results, PerQuery("made-up", [f"q{n}" for n in number], codes, measures)


def write(folder, name, results, values=None):
    file = folder / f"{name}.json"
    file.write_text(results.to_json(), encoding="utf-8")
    if values is not None:
        values.write(folder / f"{name}.queries.npz")
    return str(file)


@pytest.fixture
def files(tmp_path):
    return [
        write(tmp_path, name, *evaluated(seed, noise=noise))
        for seed, (name, noise) in enumerate([("a", 1.0), ("b", 0.6)])
    ]


def one_measure(values_CL, task="t"):
    """Values of queries out of (questions, languages)."""
    questions, languages = values_CL.shape
    ids = [f"q{i}" for i in range(questions) for _ in range(languages)]
    return PerQuery(task, ids, [f"l{j}" for j in range(languages)] * questions, {"mo": values_CL.ravel().astype(float)})


def p_of(parts_C, exchanges, rng):
    """The p-value of one difference."""
    return randomisation([(np.arange(len(parts_C)), np.arange(1), parts_C[:, None])], 1, exchanges, rng)[0]


def simulated(rng, gain=0.0, questions=40, languages=3):
    """Two runs whose differences have a part in common to all languages of a question."""
    hard = rng.standard_normal((questions, 1))
    runs = [
        hard + 0.5 * rng.standard_normal((questions, 1)) + 0.2 * rng.standard_normal((questions, languages))
        for _ in range(2)
    ]
    return one_measure(runs[0]), one_measure(runs[1] + gain)


# Statistics


def test_means_are_the_evaluations_own():
    for holes in (False, True):
        (results, values), (_, other) = evaluated(0, holes=holes), evaluated(1, holes=holes)
        compared = compare_runs(["a", "b"], [values, other], resamples=100)
        own = {name: getattr(results, name) for name in ("mo", "mul", "rank_distance")}
        own |= results.cutoffs["own"] | ({} if holes else {"cr": results.cr})
        for name, value in own.items():
            column = compared.measures[name].values[0]
            assert math.isclose(column[0], value, rel_tol=1e-12), name
            np.testing.assert_allclose(column[1:], results.of_language(name), rtol=1e-12)


def test_intervals_equal_scipys_where_queries_are_independent():
    x = np.random.default_rng(0).exponential(size=30)
    block = Block(np.arange(30), np.arange(1), x[None, None, :, None], np.ones((1, 30, 1)))
    drawn = bootstrap([block], EVERY, 2000, np.random.default_rng(5))
    expected = stats.bootstrap((x,), np.mean, n_resamples=2000, method="percentile", rng=np.random.default_rng(5))
    np.testing.assert_allclose(np.quantile(drawn[:, 0, 0, 0], [0.025, 0.975]), expected.confidence_interval, rtol=1e-12)
    runs = [one_measure(x[:, None]), one_measure(x[::-1, None])]
    found = compare_runs("ab", runs, resamples=500, level=0.9).measures["mo"].intervals
    for values, ends in zip((x, x[::-1]), found[:, 0], strict=True):
        rng = np.random.default_rng(np.random.SeedSequence(0).spawn(2)[0])
        # one_measure sorts its questions by name
        by_name = values[np.argsort([f"q{i}" for i in range(30)])]
        expected = stats.bootstrap(
            (by_name,), np.mean, n_resamples=500, confidence_level=0.9, method="percentile", rng=rng
        )
        np.testing.assert_allclose(ends, expected.confidence_interval, rtol=1e-12)


def test_p_values_equal_scipys_exact_ones_where_queries_are_independent():
    rng = np.random.default_rng(1)
    for shift in (0.0, 0.5, 1.2):
        x, y = rng.standard_normal(11), rng.standard_normal(11) + shift
        exact = stats.permutation_test(
            (x, y), lambda a, b: np.mean(b - a), permutation_type="samples", n_resamples=np.inf
        )
        p = p_of((y - x) / 11, 20_000, np.random.default_rng(2))
        assert abs(p - exact.pvalue) < 4 * math.sqrt(exact.pvalue / 20_000) + 1e-4


def test_p_values_are_uniform_where_runs_do_not_differ_and_would_not_be_if_translations_counted_as_independent():
    rng, grouped, apart = np.random.default_rng(3), [], []
    for seed in range(300):
        runs = simulated(rng)
        grouped.append(compare_runs("ab", runs, resamples=199, seed=seed).measures["mo"].p[0, 0])
        alone = [replace(run, ids=list(map("{}-{}".format, run.ids, run.languages))) for run in runs]
        apart.append(compare_runs("ab", alone, resamples=199, seed=seed).measures["mo"].p[0, 0])
    assert stats.kstest(grouped, "uniform").pvalue > 0.01
    assert 0.02 < np.mean(np.array(grouped) <= 0.05) < 0.09
    assert stats.kstest(apart, "uniform").pvalue < 1e-6
    assert np.mean(np.array(apart) <= 0.05) > 0.12


def test_intervals_cover_what_they_should():
    rng, covered = np.random.default_rng(4), []
    for seed in range(300):
        runs = simulated(rng, gain=0.3, questions=60)
        found = compare_runs("ab", runs, resamples=399, seed=seed).measures["mo"]
        truths = [(found.intervals[0, 0], 0.0), (found.intervals[1, 0], 0.3), (found.difference_intervals[0, 0], 0.3)]
        covered.append([low <= truth <= high for (low, high), truth in truths])
    # Percentile intervals are a little short at 60 questions: their nominal 95% are about 94.
    assert (np.mean(covered, axis=0) > 0.91).all()
    assert (np.mean(covered, axis=0) < 0.98).all()


def test_a_planted_difference_is_found_and_only_it():
    rng = np.random.default_rng(6)
    first, second = simulated(rng, gain=0.5, questions=100)
    third = replace(first, measures={"mo": first.measures["mo"] + 0.01 * rng.standard_normal(300)})
    found = compare_runs(["a", "b", "c"], [first, second, third], resamples=1999).measures["mo"]
    assert found.p_holm[0, 0] < 0.01 < 0.05 < found.p_holm[1, 0]
    assert found.difference_intervals[0, 0, 0] > 0
    assert np.array_equal(found.p_holm, np.column_stack([holm(found.p[:, 0]), holm(found.p[:, 1:])]))
    assert found.p_holm[0, 0] == 2 * found.p[0, 0]


def test_runs_that_are_equal_do_not_differ():
    values = evaluated(0)[1]
    found = compare_runs(["a", "b"], [values, values], resamples=200)
    for measured in found.measures.values():
        assert (measured.p == 1).all()
        assert (measured.difference_intervals == 0).all()


def test_ties_of_whole_numbers_count_whatever_order_they_are_summed_in():
    difference = np.array([0.1, 0.2, 0.3, -0.6, 0.1, 0.2, 0.3, 0.4]) / 8
    signs = np.array(np.meshgrid(*[[-1, 1]] * 8)).reshape(8, -1)
    whole = np.round(80 * difference).astype(int)
    expected = np.mean(np.abs(whole @ signs) >= abs(whole.sum()))
    p = p_of(difference, 50_000, np.random.default_rng(0))
    assert abs(p - expected) < 4 * math.sqrt(expected / 50_000)


def test_p_is_never_0_and_small_enough_that_many_languages_can_be_told_apart():
    assert p_of(np.ones(200), 99, np.random.default_rng(0)) == 0.01
    languages = 12
    values = np.random.default_rng(0).standard_normal((60, languages))
    found = compare_runs("ab", [one_measure(values), one_measure(values + 5)], resamples=100)
    assert found.exchanges == 12_000
    assert (found.measures["mo"].p_holm <= 0.001).all()


def test_questions_in_few_languages_are_resampled_as_if_they_were_in_all():
    # Of pairs of languages each question has two: blocks spare their products, and change nothing
    rng = np.random.default_rng(0)
    counts = np.kron(np.eye(4), np.ones((5, 2)))[None]
    sums = counts[:, None] * rng.standard_normal((1, 3, 20, 8))
    question, language = np.nonzero(counts[0])
    values, there = sums[..., question, language], np.ones((1, 40), dtype=bool)
    shuffled = rng.permutation(40)
    blocks = blocks_of(question[shuffled], language[shuffled], values[..., shuffled], there)
    assert [block.sums_MRCL.shape for block in blocks] == [(1, 3, 5, 2)] * 4
    for found, expected in zip(totals(blocks, 8), (sums.sum(axis=2), counts.sum(axis=1)), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-12)
    drawn = bootstrap(blocks, np.ones((1, 8), dtype=bool), 50, np.random.default_rng(1))
    picks = np.random.default_rng(1).integers(0, 20, (50, 20))
    for resample, picked in zip(drawn, picks, strict=True):
        with np.errstate(invalid="ignore"):
            means = sums[0][:, picked].sum(axis=1) / counts[0][picked].sum(axis=0)
        np.testing.assert_allclose(resample[0, :, 1:], means, rtol=1e-12)
        np.testing.assert_allclose(resample[0, :, 0], np.nanmean(means, axis=1), rtol=1e-12)
    whole = [(np.arange(20), np.arange(8), sums[0, 0])]
    apart = [(block.asked, block.there, block.sums_MRCL[0, 0]) for block in blocks]
    p, expected = (randomisation(parts, 8, 500, np.random.default_rng(2)) for parts in (apart, whole))
    assert np.array_equal(p, expected)


def test_holm_by_hand():
    found = holm(np.array([[0.01, 0.04], [np.nan, 0.03], [0.005, 0.9]]))
    np.testing.assert_allclose(found, [[0.04, 0.09], [np.nan, 0.09], [0.025, 0.9]])


def test_equal_seeds_give_equal_results_in_any_order_of_queries():
    (_, first), (_, second) = evaluated(0), evaluated(1)
    order = np.random.default_rng(0).permutation(len(second.ids))
    shuffled = PerQuery(
        second.task,
        [second.ids[i] for i in order],
        [second.languages[i] for i in order],
        {name: values[order] for name, values in second.measures.items()},
    )
    one, two, other = (
        compare_runs(["a", "b"], [first, run], resamples=500, seed=seed).measures["mul"]
        for run, seed in ((second, 0), (shuffled, 0), (second, 1))
    )
    assert np.array_equal(one.p, two.p)
    assert np.array_equal(one.difference_intervals, two.difference_intervals)
    assert not np.array_equal(one.difference_intervals, other.difference_intervals)


def test_chunks_of_resamples_change_nothing(monkeypatch):
    runs = [evaluated(seed)[1] for seed in (0, 1)]
    whole = compare_runs(["a", "b"], runs, resamples=300).measures["cr"]
    monkeypatch.setattr("hbt_fast.evaluation.resampling.CHUNK", 1000)
    parts = compare_runs(["a", "b"], runs, resamples=300).measures["cr"]
    np.testing.assert_allclose(whole.intervals, parts.intervals, rtol=1e-12)
    assert np.array_equal(whole.p, parts.p)


def test_directions_of_bitext_share_their_lines_and_varieties_of_a_language_are_in_no_mean():
    hits = {"de>en": [1, 0, 1, 1], "en>de": [1, 0, 0, 1], "en>en-GB": [1, 1, 1, 1]}
    ids = [f"{line}|{direction}" for direction in hits for line in range(4)]
    languages = [direction for direction in hits for _ in range(4)]
    run = PerQuery("bitext", ids, languages, {"accuracy": np.concatenate([*hits.values()]).astype(float)})
    found = compare_runs(["a", "b"], [run, run], resamples=100)
    assert (found.queries, found.questions) == (12, 4)
    assert found.measures["accuracy"].values[0].tolist() == [0.625, 0.75, 0.5, 1.0]


def test_groups_of_languages_are_compared_as_the_evaluation_averages_them():
    groups = {"west": ["de"], "two": ["ar", "zh"], "all": list(LANGUAGES)}
    (_, values), (_, other) = evaluated(0, holes=True), evaluated(1, holes=True)
    found = compare_runs(["a", "b"], [values, other], resamples=400, groups=groups)
    assert found.group_columns == {"west": 1, "two": 2, "all": 3}
    assert found.language_columns == {"ar": 4, "de": 5, "zh": 6}
    for name, measured in found.measures.items():
        np.testing.assert_allclose(measured.values[:, 1], measured.values[:, 5], rtol=1e-12, err_msg=name)
        np.testing.assert_allclose(measured.values[:, 2], measured.values[:, [4, 6]].mean(axis=1), rtol=1e-12)
        # A group of one language, or of all, has the interval and p of that language, or of all
        for twin, column in ((1, 5), (3, 0)):
            np.testing.assert_allclose(measured.intervals[:, twin], measured.intervals[:, column], rtol=1e-12)
            np.testing.assert_allclose(measured.difference_intervals[:, twin], measured.difference_intervals[:, column])
            assert measured.p[0, twin] == measured.p[0, column]
        np.testing.assert_allclose(measured.p_holm[:, 1:4], holm(measured.p[:, 1:4]))
    with pytest.raises(CompareError, match="group 'low': no query is in sw; the languages of the quer"):
        compare_runs(["a", "b"], [values, other], groups={"low": ["sw", "de"]})


def test_a_group_without_a_measure_has_no_value_and_no_p():
    run = one_measure(np.random.default_rng(0).random((10, 2)))
    run.measures["mo"][1::2] = np.nan
    found = compare_runs(["a", "b"], [run, run], resamples=100, groups={"none": ["l1"]}).measures["mo"]
    assert np.isnan(found.values[:, 1]).all()
    assert np.isnan(found.p[:, 1]).all()


def bitext(folder):
    """Result files of two made-up encoders on 20 lines in four languages, and the results of the second."""

    class Noisy:
        def __init__(self, seed):
            self.rng = np.random.default_rng(seed)

        def encode(self, texts, prompt="", progress=False):
            meaning = np.random.default_rng(9).standard_normal((20, 8))[[int(text.split()[1]) for text in texts]]
            v_nd = meaning + self.rng.standard_normal((len(texts), 8))
            return (v_nd / np.linalg.norm(v_nd, axis=1, keepdims=True)).astype(np.float32)

    task = n_way("made", {code: [f"{code} {i}" for i in range(20)] for code in ("de", "en", "en-GB", "yo")})
    files = []
    for seed in (0, 1):
        results = evaluate_bitext(Noisy(seed), replace(task, groups={"low": ["yo", "de"]}), log=None)
        files.append(results.write(folder / f"{seed}.json")[0])
    return files, results


def test_bitext_of_very_many_directions_is_compared_by_source(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("hbt_fast.evaluation.bitext.MOST_QUERIES", 100)
    files, results = bitext(tmp_path)
    assert status(program.main, [*map(str, files), "--resamples", "100"]) == 0
    printed = capsys.readouterr().out
    assert "80 queries of 20 questions, 4 directions." in printed
    direction = dict(zip(zip(results.sources, results.targets, strict=True), results.measures["accuracy"], strict=True))
    # Of "en" the other variety is no target
    means = {"de": ("en", "en-GB", "yo"), "en": ("de", "yo")}
    means = {code: np.mean([direction[code, target] for target in targets]) for code, targets in means.items()}
    for code, mean in means.items():
        assert re.search(rf"\| {code}>\* \| 0\.\d{{4}} \| ({mean:.4f})", printed), code
    group = re.search(r"## By group.*?\| low: as source \| 0\.\d{4} \| (0\.\d{4})", printed, re.DOTALL)[1]
    yo = np.mean([direction["yo", target] for target in ("de", "en", "en-GB")])
    assert float(group) == pytest.approx((means["de"] + yo) / 2, abs=1e-4)


def test_bitext_is_compared_into_and_out_of_english_too(tmp_path, capsys):
    files, results = bitext(tmp_path)
    assert status(program.main, [*map(str, files), "--resamples", "100", "--out", str(tmp_path / "out")]) == 0
    table = json.loads((tmp_path / "out" / "table.json").read_text(encoding="utf-8"))
    by_group = table["measures"]["accuracy"]["by_group"]
    means = {name: mean["accuracy"] for name, mean in results.means.items() if name != "all directions"}
    assert {name: entries[1]["value"] for name, entries in by_group.items()} == pytest.approx(means)
    assert table["groups"]["low: within"] == ["de>yo", "yo>de"]
    (tmp_path / "0.queries.npz").unlink()
    assert status(program.main, [*map(str, files), "--out", str(tmp_path / "figures")]) == 2
    table = json.loads((tmp_path / "figures" / "table.json").read_text(encoding="utf-8"))
    accuracy = table["measures"]["accuracy"]
    assert {name: entries[1]["value"] for name, entries in accuracy["by_group"].items()} == pytest.approx(means)
    directions = map("{}>{}".format, results.sources, results.targets)
    stated = dict(zip(directions, results.measures["accuracy"], strict=True))
    assert {name: entries[1]["value"] for name, entries in accuracy["by_language"].items()} == stated
    assert status(program.main, [*map(str, files), "--groups", "low=xx"]) == 2
    assert "group 'low': no language xx; there are de, en, en-GB, yo" in capsys.readouterr().err


def test_queries_that_differ_are_named():
    values = evaluated(0)[1]
    fewer = PerQuery(values.task, values.ids[1:], values.languages[1:], {"mo": values.measures["mo"][1:]})
    with pytest.raises(CompareError, match=r"not asked the same queries: 1 only in a \(ar\), such as 'q0' in ar"):
        compare_runs(["a", "b"], [values, fewer])
    with pytest.raises(CompareError, match="query 'q0' in ar occurs twice"):
        compare_runs(["a", "b"], [replace(values, ids=["q0", "q0", *values.ids[2:]]), values])
    with pytest.raises(CompareError, match="different tasks: a was evaluated on 'made-up', b on 'other'"):
        compare_runs(["a", "b"], [values, replace(values, task="other")])
    with pytest.raises(CompareError, match=r"no measure in common: a has mo.* b has f1"):
        compare_runs(["a", "b"], [values, replace(values, measures={"f1": values.measures["mo"]})])
    holed = values.measures["mo"].copy()
    holed[3] = np.nan
    with pytest.raises(CompareError, match="query 'q3' in ar has mo in a and not in b"):
        compare_runs(["a", "b"], [values, replace(values, measures={"mo": holed})])


# The program


def test_the_program_prints_and_writes_everything(files, tmp_path, capsys):
    out = tmp_path / "out"
    assert status(program.main, [*files, "--out", str(out), "--resamples", "200"]) == 0
    printed = capsys.readouterr().out
    assert "| run | Mo | Cr | Mul | rank distance |" in printed
    assert "## Differences to a" in printed
    assert {path.name for path in out.iterdir()} == {
        "table.md", "table.json", "table.tex", "settings.png", "heat-maps.png", "heat-maps-difference.png",
        "rank-distance.png",
    }  # fmt: skip
    table = json.loads((out / "table.json").read_text(encoding="utf-8"))
    stated = json.loads((tmp_path / "b.json").read_text(encoding="utf-8"))
    entry = table["measures"]["mul"]["overall"][1]
    assert math.isclose(entry["value"], stated["mul"], rel_tol=1e-12)
    assert entry["difference_interval"][0] <= entry["difference"] <= entry["difference_interval"][1]
    assert table["measures"]["rank_distance"]["lower_is_better"]
    assert set(table["measures"]["mo"]["by_language"]) == set(LANGUAGES)


def test_groups_come_from_the_result_file_or_the_command_line(tmp_path, capsys):
    files = []
    for seed, name in enumerate("ab"):
        results, values = evaluated(seed)
        grouped = replace(results, group_languages={"far": ["ar", "zh"]})
        files.append(write(tmp_path, name, grouped, values))
    assert status(program.main, [*files, "--resamples", "100"]) == 0
    printed = capsys.readouterr().out
    row = re.search(r"## By group.*?Mul\n\n.*?\| far \| (0\.\d{4})", printed, re.DOTALL)
    means = [np.mean([evaluated(0)[0].of_language("mul")[i] for i in (0, 2)])]
    assert float(row[1]) == pytest.approx(means[0], abs=5e-5)
    assert "far: ar, zh." in printed
    out = tmp_path / "out"
    assert status(program.main, [*files, "--groups", "west=de", "--resamples", "100", "--out", str(out)]) == 0
    assert "| far |" not in capsys.readouterr().out
    assert r"  west & " in (out / "table.tex").read_text(encoding="utf-8")
    assert status(program.main, [*files, "--groups", "west"]) == 2
    assert 'write "low=sw,yo;high=en,de"' in capsys.readouterr().err


def test_run_folders_are_compared_with_their_learning_curves(tmp_path, capsys):
    for seed, name in enumerate(("mono", "hybrid")):
        folder = tmp_path / name
        folder.mkdir()
        results, values = evaluated(seed)
        write(folder, "evaluation", results, values)
        write(folder, "evaluation-before", *evaluated(9))
        lines = [{"evaluation": "before training", "mo": 0.1, "cr": 0.1, "mul": 0.1, "rank_distance": 9.0}]
        lines += [{"step": 0, "loss": 1.0}, {"step": 1, "loss": 1.0}, {"step": 2, "loss": 1.0}]
        lines += [{"evaluation": "during training", "step": 2, "mo": 0.2, "cr": 0.2, "mul": None, "rank_distance": 8}]
        lines += [{"evaluation": "after training", "mo": 0.3, "cr": 0.3, "mul": 0.3, "rank_distance": 7}]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    curve = program.learning_curve(tmp_path / "mono")
    assert [step for step, _ in curve[""]] == [0, 2, 3]
    assert "mul" not in curve[""][1][1]
    figure = draw_curves(["mono", "hybrid"], [curve, {}], "task")
    assert [panel.get_title(loc="left") for panel in figure.axes] == [
        "Mo",
        "Cr",
        "Mul",
        "rank distance, lower is better",
    ]
    runs = [str(tmp_path / "mono"), str(tmp_path / "hybrid")]
    assert status(program.main, [*runs, "--out", str(tmp_path / "out"), "--resamples", "100"]) == 0
    assert (tmp_path / "out" / "learning-curves.png").is_file()
    assert "| hybrid |" in capsys.readouterr().out
    before = [f"{name}/evaluation-before.json" for name in runs[:1]]
    assert status(program.main, [*before, runs[0], "--resamples", "100"]) == 0
    assert "| evaluation-before |" in capsys.readouterr().out


def test_evaluations_on_a_part_of_the_questions_are_not_joined_to_those_on_all(tmp_path):
    lines = [{"step": step, "loss": 1.0} for step in range(8)]
    lines += [{"evaluation": "before training", "task": "whole", "mo": 0.1}]
    lines += [{"evaluation": "during training", "step": step, "task": "part", "mo": step / 10} for step in (2, 4, 6)]
    lines += [{"evaluation": "after training", "step": 4, "task": "whole", "mo": 0.3}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    curve = program.learning_curve(tmp_path)
    assert list(curve) == ["part", "whole"]
    assert curve["part"] == [(2, {"mo": 0.2}), (4, {"mo": 0.4}), (6, {"mo": 0.6})]
    assert curve["whole"] == [(0, {"mo": 0.1}), (4, {"mo": 0.3})]
    drawn = draw_curves(["run"], [curve], "task").axes[0].lines
    assert [line.get_linestyle() for line in drawn] == ["-", "None"]
    assert [line.get_label() for line in drawn][:1] == ["run"]


def test_names_come_from_paths_as_far_as_they_must(tmp_path):
    paths = []
    for name in ("one/evaluation", "two/evaluation", "one/other", "two/other"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        paths.append(write((tmp_path / name).parent, (tmp_path / name).name, evaluated(0)[0]))
    from hbt_fast.evaluation.compared import read_runs

    assert [run.name for run in read_runs(paths[:2])] == ["one", "two"]
    assert [run.name for run in read_runs(paths[2:])] == ["one/other", "two/other"]
    assert [run.name for run in read_runs([f"x={paths[2]}", paths[3]])] == ["x", "other"]
    with pytest.raises(CompareError, match="two runs are called 'x': name them apart"):
        read_runs([f"x={paths[2]}", f"x={paths[3]}"])


def test_without_values_of_queries_the_figures_are_shown_and_what_is_missing_is_said(files, tmp_path, capsys):
    (tmp_path / "b.queries.npz").unlink()
    assert status(program.main, [*files, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr()
    assert re.search(r"\| b \| 0\.\d{4} \| 0\.\d{4} \| 0\.\d{4} \| \d+\.\d \|", said.out)
    assert "b.queries.npz is not there" in said.err
    assert "*" not in (tmp_path / "out" / "table.tex").read_text(encoding="utf-8")
    assert (tmp_path / "out" / "settings.png").is_file()
    entry = json.loads((tmp_path / "out" / "table.json").read_text(encoding="utf-8"))["measures"]["mo"]["overall"][1]
    assert entry["p"] is entry["interval"] is None
    assert entry["difference"] != 0


def test_what_cannot_be_compared_is_said_in_words(files, tmp_path, capsys):
    results, values = evaluated(0)
    (tmp_path / "text.json").write_text("no JSON", encoding="utf-8")
    (tmp_path / "list.json").write_text("[1, 2]", encoding="utf-8")
    (tmp_path / "half.json").write_text('{"task": "made-up", "mo": 1}', encoding="utf-8")
    write(tmp_path, "other", replace(results, task="mlqa-r"), replace(values, task="mlqa-r"))
    lists = {name: getattr(results, name)[:2] for name in ("mul_by_language", "rank_distance_by_language")}
    lists |= {"languages": ["ar", "de"], "matrix": [row[:2] for row in results.matrix[:2]]}
    lists["by_language"] = {name: column[:2] for name, column in results.by_language.items()}
    write(tmp_path, "fewer", replace(results, **lists), values)
    write(tmp_path, "context", replace(results, candidates=5), values)
    write(tmp_path, "stale", replace(results, mul=0.5), values)
    write(tmp_path, "damaged", results)
    (tmp_path / "damaged.queries.npz").write_bytes(b"PK nothing")
    (tmp_path / "empty").mkdir()
    for name, words in {
        "text.json": "not a result file of hbt_fast.evaluate, not even JSON",
        "list.json": 'those name a "task"',
        "half.json": "not a whole result file",
        "other.json": "different tasks: .*'made-up', .*'mlqa-r'",
        "fewer.json": "different languages: .* has ar, de, zh, .* ar, de",
        "context.json": "different numbers of candidates: .* 72, .* 5",
        "stale.json": "they are of two evaluations",
        "damaged.json": "damaged.queries.npz: not a .queries.npz file",
        "empty": "no evaluation.json in it",
        "nowhere.json": "no such file",
    }.items():
        assert status(program.main, [files[0], str(tmp_path / name), "--resamples", "100"]) == 2, name
        assert re.search(words, capsys.readouterr().err), name
    assert status(program.main, files[:1]) == 2
    assert "one run" in capsys.readouterr().err
    for wrong in (["--resamples", "5"], ["--level", "1"], ["--seed", "-1"], ["--out", files[0]]):
        with pytest.raises(SystemExit, match="2"):
            program.main([*files, *wrong])


def test_an_average_over_other_weights_than_the_result_files_is_remarked(tmp_path, capsys):
    paths = [write(tmp_path, name, *evaluated(seed, holes=True)) for seed, name in enumerate("ab")]
    assert status(program.main, [*paths, "--resamples", "100"]) == 0
    assert "as its result file averages, over language pairs" in capsys.readouterr().out


def test_tables_survive_any_name():
    runs = [evaluated(seed)[1] for seed in (0, 1)]
    compared = compare_runs(["50% of a_b & c#1 ~{x}^\\", "Ελ|ηνικά"], runs, resamples=100)
    lines = [line for line in to_markdown(compared).splitlines() if line.startswith("|")]
    assert all(line.count("|") - line.count("\\|") > 2 for line in lines)
    assert "Ελ\\|ηνικά" in to_markdown(compared)
    tables = to_latex(compared)
    assert r"50\% of a\_b \& c\#1 \textasciitilde{}\{x\}\textasciicircum{}\textbackslash{}" in tables
    assert "XeLaTeX" in tables
    assert tables.count(r"\begin{table}") == tables.count(r"\end{table}") == 5
    for row in re.findall(r"(.*) \\\\", tables):
        assert len(re.findall(r"(?<!\\)&", row)) in (2, 4), row
    assert json.loads(to_json(compared, ["a", "b"]))["runs"][1]["name"] == "Ελ|ηνικά"
    assert latex("a>b") == r"a\textgreater{}b"


def test_stars_follow_the_corrected_p_values_and_the_best_is_bold():
    first, second = simulated(np.random.default_rng(6), gain=0.5, questions=100)
    compared = compare_runs(["a", "b"], [first, second], resamples=1999)
    table = to_latex(compared)
    assert re.search(r"\n  b & \\textbf\{0\.\d{4}\}\$\^\{\*\*\*\}\$ \\\\\n   & \{\\scriptsize \[0\.\d{4}, ", table)


def test_settings_that_differ_are_remarked(tmp_path, capsys):
    files = []
    for seed, (name, length) in enumerate([("a", 512), ("b", 256)]):
        results, values = evaluated(seed)
        settings = {"precision": "fp32", "max_length": length} | ({"index": "flat"} if seed else {})
        files.append(write(tmp_path, name, replace(results, settings=settings), values))
    assert status(program.main, [*files, "--resamples", "100"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("Evaluated with another") == 1
    assert "Evaluated with another max_length: a 512, b 256." in printed
    assert "a does not record its index (an earlier version): it may be another." in printed


def test_prompts_and_data_that_differ_are_remarked_and_questions_refused(tmp_path, capsys):
    def results(name, prompt, **settings):
        measured, values = evaluated(0)
        made = {"passages and judgements": "12", "questions": "34", **settings}
        measured = replace(measured, prompts={"query": prompt, "passage": "p: "}, settings=made)
        return write(tmp_path, name, measured, values)

    first = results("a", "q: ")
    run = [first, results("b", "", **{"passages and judgements": "13"}), "--resamples", "100"]
    assert status(program.main, run) == 0
    printed = capsys.readouterr().out
    assert "Evaluated with another query prompt: a 'q: ', b ''." in printed
    assert "Evaluated with another passages and judgements: a 12, b 13." in printed
    assert "passage prompt" not in printed
    assert status(program.main, [first, results("c", "q: ", questions="35"), "--resamples", "100"]) == 2
    assert "different questions" in capsys.readouterr().err


def test_a_checksum_of_a_task_changes_with_every_part_of_it():
    task = task_from_rows("t", [Row({"en": "q one"}, {"en": "p one"}), Row({"en": "q two"}, {"en": "p two"})])
    base = made_on(task)
    assert made_on(replace(task)) == base
    changed = [
        replace(task, queries=["q one", "q 2"]),
        replace(task, query_languages=["en", "de"]),
        replace(task, candidates=["p one", "p 2"]),
        replace(task, candidate_languages=["en", "de"]),
        replace(task, relevant=task.relevant[::-1].copy()),
        replace(task, gains=np.array([1, 2], np.float32)),
        replace(task, ignored=np.array([-1, 0])),
        replace(task, pools=(np.array([0, 2, 4]), np.array([0, 1, 0, 1]))),
    ]
    for number, other in enumerate(changed):
        made = made_on(other)
        assert (made["questions"] != base["questions"]) == (number < 2)
        assert (made["passages and judgements"] != base["passages and judgements"]) == (number >= 2)


def test_names_with_dollars_are_no_formulas(files, tmp_path):
    out = tmp_path / "out"
    runs = [rf"$\foo$_{{={files[0]}", f"$x_{{$y={files[1]}"]
    assert status(program.main, [*runs, "--out", str(out), "--resamples", "100"]) == 0
    assert (out / "heat-maps-difference.png").is_file()
    results = replace(evaluated(0)[0], model="runs/$x_{$y")
    assert write_report(results, tmp_path / "one.json")[-1].is_file()


# Fonts


def test_a_font_is_sought_only_where_the_first_does_not_do():
    assert choose(["Mo", "Ελληνικά", "русский", "العربية"]) == (["DejaVu Sans"], [])


def test_characters_that_no_font_has_are_said_once(monkeypatch):
    from matplotlib.font_manager import fontManager

    monkeypatch.setattr(
        fontManager, "ttflist", [f for f in fontManager.ttflist if f.name.startswith(("DejaVu", "Last"))]
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with fonts_for(["模型"]):
            figure = draw_curves(["模型", "b"], [{"": [(0, {"mo": 0.1}), (5, {"mo": 0.2})]}, {}], "模型")
            figure.draw_without_rendering()
    assert len(caught) == 1
    assert re.search("no installed font has 2 of the characters .* 型 模", str(caught[0].message))


def test_of_installed_fonts_those_are_taken_that_have_most_of_what_is_missing(monkeypatch):
    from matplotlib.font_manager import fontManager

    has = {"Sans One": set("模"), "Sans Two": set("模型"), "Sans Three": set("ไ"), "None": set()}
    monkeypatch.setattr("hbt_fast.fonts._drawn", lambda file: has.get(file, set("abc")))
    entries = [SimpleNamespace(fname=n, name=n, style="normal", weight=400, stretch="normal") for n in has]
    monkeypatch.setattr(fontManager, "ttflist", entries)
    assert choose(["abc 模型", "ไ"]) == (["DejaVu Sans", "Sans Two", "Sans Three"], [])
    assert choose(["ไ語"]) == (["DejaVu Sans", "Sans Three"], ["語"])


def test_drawing_warns_of_nothing_where_all_is_latin(files, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        runs = [f"ein sehr {'langer ' * 30}Name={files[0]}", files[1]]
        assert status(program.main, [*runs, "--out", str(tmp_path / "o")]) == 0
