"""Bitext retrieval: files that are recognised, accuracies that equal brute force, and what reports say of them."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from hbt_fast.data.rows import DataError
from hbt_fast.evaluation import bitext
from hbt_fast.evaluation.bitext import XTREME_36, BitextTask, evaluate_bitext, load_bitext, n_way
from hbt_fast.evaluation.bitext_neighbours import mutual_neighbours
from hbt_fast.evaluation.bitext_report import BitextResults, draw
from hbt_fast.evaluation.queries import PerQuery
from hbt_fast.evaluation.run import EvaluationError


class Encoder:
    """Looks texts up; whole numbers, so that float32 products are exact and equal scores are equal."""

    def __init__(self, vectors: dict[str, np.ndarray]) -> None:
        self.vectors, self.asked = vectors, []

    def encode(self, texts, prompt="", progress=False):
        self.asked.append((prompt, list(texts)))
        return np.stack([self.vectors[prompt + text] for text in texts]).astype(np.float32)


def made(languages=("de", "en", "fr"), n=60, d=5, prompts=("",), seed=0) -> tuple[BitextTask, Encoder]:
    """A task full of ties: small whole numbers, texts that occur twice, and different texts with one vector."""
    rng = np.random.default_rng(seed)
    sentences = {code: [f"{code} {i if i % 7 else i // 14}" for i in range(n)] for code in languages}
    common = rng.integers(-2, 3, (n, d))
    vectors = {}
    for texts in sentences.values():
        for i, text in enumerate(texts):
            for prompt in prompts:
                vectors.setdefault(prompt + text, common[i] + (rng.random(d) < 0.2))
    return n_way("made", sentences), Encoder(vectors)


def nearest(a_nd: np.ndarray, b_nd: np.ndarray) -> np.ndarray:
    """The specification: all scores in float64, the first of the highest."""
    return np.array([int(np.flatnonzero(row == row.max())[0]) for row in a_nd.astype(np.float64) @ b_nd.T])


def write(folder, files: dict[str, str | bytes]):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


@pytest.mark.parametrize("backend", ["numba", "torch"])
@pytest.mark.parametrize("workspace", [1, 150, 10_000], ids=["row by row", "some rows", "at once"])
@pytest.mark.parametrize(("n", "m"), [(1, 1), (2, 90), (90, 2), (75, 101)])
def test_the_best_of_rows_and_columns_equal_a_sort_with_ties_by_index(backend, workspace, n, m):
    rng = np.random.default_rng(n + m)
    a_nd, b_md = (rng.integers(-2, 3, (size, 4)).astype(np.float32) for size in (n, m))
    tensors = torch.from_numpy(a_nd), torch.from_numpy(b_md)
    found, back, _ = mutual_neighbours(*tensors, 4, workspace_c=torch.empty(workspace), backend=backend)
    for side, scores in ((found, a_nd @ b_md.T), (back, b_md @ a_nd.T)):
        order = np.argsort(-scores, axis=1, kind="stable")[:, :4]
        np.testing.assert_array_equal(side.index, order)
        np.testing.assert_array_equal(side.scores, np.take_along_axis(scores, order, 1))


@pytest.mark.parametrize("seed", range(5))
def test_accuracy_both_ways_equals_brute_force_with_ties_and_repeated_texts(seed):
    task, encoder = made(seed=seed)
    results = evaluate_bitext(encoder, task, log=None)
    assert len(results.sources) == 6
    for source, target, accuracy, same in zip(
        results.sources, results.targets, results.measures["accuracy"], results.measures["same text"], strict=True
    ):
        a, b = task.sentences[source], task.sentences[target]
        best = nearest(*(np.stack([encoder.vectors[text] for text in side]) for side in (a, b)))
        assert accuracy == np.mean(best == np.arange(len(a)))
        assert same == np.mean([b[j] == b[i] for i, j in enumerate(best)])
    assert results.measures["same text"] != results.measures["accuracy"]


def test_the_margin_equals_its_definition_over_the_four_nearest():
    task, encoder = made(("de", "en"), n=40, d=6)
    encoder.vectors = {text: v + 5 for text, v in encoder.vectors.items()}  # cosines of real encoders are positive
    results = evaluate_bitext(encoder, task, log=None)
    for source, target, margin in zip(results.sources, results.targets, results.measures["margin"], strict=True):
        texts = [list(dict.fromkeys(task.sentences[code])) for code in (source, target)]
        a, b = (np.stack([encoder.vectors[text] for text in side]).astype(np.float64) for side in texts)
        scores = a @ b.T
        near = np.argsort(-scores, axis=1, kind="stable")[:, :4]
        around_a, around_b = (np.sort(s, axis=1)[:, -4:].mean(1) for s in (scores, scores.T))
        ratio = [[scores[i, j] / ((around_a[i] + around_b[j]) / 2) for j in near[i]] for i in range(len(a))]
        chosen = {text: texts[1][near[i][int(np.argmax(ratio[i]))]] for i, text in enumerate(texts[0])}
        lines = [task.sentences[target].index(chosen[text]) for text in task.sentences[source]]
        assert margin == np.mean(np.array(lines) == np.arange(len(lines)))
    assert results.measures["margin"] != results.measures["accuracy"]


def test_a_margin_over_less_than_nothing_does_not_win():
    at = [2.0, -1.0, -1.5]  # line 1: its neighbourhood has mean cosines below 0 with all three, so the nearest stays
    task = n_way("made", {"de": ["a0", "a1", "a2"], "en": ["b0", "b1", "b2"]})
    vectors = {f"{side}{i}": np.array([x]) for side in "ab" for i, x in enumerate(at)}
    results = evaluate_bitext(Encoder(vectors), task, log=None)
    assert results.measures["margin"] == results.measures["accuracy"] == [2 / 3, 2 / 3]


def test_accuracy_equals_mteb():
    pytest.importorskip("mteb")
    datasets = pytest.importorskip("datasets")
    from mteb._evaluators import BitextMiningEvaluator
    from mteb.timing import TimingStack

    rng = np.random.default_rng(0)
    sentences = {code: [f"{code} {i}" for i in range(80)] for code in ("de", "en")}
    common = rng.standard_normal((80, 8))
    vectors = {text: v for texts in sentences.values() for text, v in zip(texts, common, strict=True)}
    vectors = {text: v + 0.7 * rng.standard_normal(8) for text, v in vectors.items()}
    vectors = {text: v / np.linalg.norm(v) for text, v in vectors.items()}

    class Model:
        def encode(self, batches, **options):
            return np.stack([vectors[text] for batch in batches for text in batch["text"]]).astype(np.float32)

        def similarity(self, a, b):
            return a @ b.T

    results = evaluate_bitext(Encoder(vectors), n_way("made", sentences), log=None)
    data = datasets.Dataset.from_dict({"sentence1": sentences["de"], "sentence2": sentences["en"]})
    for columns, ours in zip(
        [("sentence1", "sentence2"), ("sentence2", "sentence1")], results.measures["accuracy"], strict=True
    ):
        evaluator = BitextMiningEvaluator(
            data, task_metadata=None, hf_split="test", hf_subset="default", pair_columns=[columns], timer=TimingStack()
        )
        (found,) = evaluator(Model(), encode_kwargs={}).values()
        assert ours == np.mean([near["corpus_id"] == i for i, near in enumerate(found)])
        assert 0.3 < ours < 1


def test_every_distinct_text_is_encoded_once():
    task, encoder = made()
    evaluate_bitext(encoder, task, log=None)
    ((prompt, texts),) = encoder.asked
    assert prompt == ""
    assert len(texts) == len(set(texts)) == len({text for side in task.sentences.values() for text in side})


def test_targets_with_a_prompt_of_their_own_are_encoded_with_it():
    task, encoder = made(("de", "en"), prompts=("query: ", "passage: "))
    results = evaluate_bitext(encoder, task, "query: ", target_prompt="passage: ", log=None)
    assert [prompt for prompt, _ in encoder.asked] == ["query: ", "passage: "]
    assert results.prompts == {"source": "query: ", "target": "passage: "}
    for source, target, accuracy in zip(results.sources, results.targets, results.measures["accuracy"], strict=True):
        a = np.stack([encoder.vectors[f"query: {text}"] for text in task.sentences[source]])
        b = np.stack([encoder.vectors[f"passage: {text}"] for text in task.sentences[target]])
        assert accuracy == np.mean(nearest(a, b) == np.arange(len(a)))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_vectors_that_are_not_finite_are_an_error_that_names_the_text(bad):
    task, encoder = made()
    encoder.vectors["en 3"] = np.full(5, bad)
    with pytest.raises(EvaluationError, match="'en 3'"):
        evaluate_bitext(encoder, task, log=None)


@pytest.mark.parametrize(
    ("files", "shown"),
    [
        (["tatoeba.deu-eng.deu", "tatoeba.deu-eng.eng", "tatoeba.cmn-eng.cmn", "tatoeba.cmn-eng.eng"], "de en zh"),
        (["de-en.de", "de-en.en"], "de en"),
        (["newstest2019-src.eng.txt", "newstest2019-ref.deu.txt", "newstest2019-ref-2.deu.txt"], "de en"),
        (["newstest2019-src.eng.txt", "newstest2019-ref.zho-CN.txt", "newstest2019-ref.zho-TW.txt"], "en zh-CN zh-TW"),
        (["eng_Latn.devtest", "ace_Arab.devtest", "ace_Latn.devtest"], "ace-Arab ace-Latn en"),
        (["en.txt", "pt-BR.txt"], "en pt"),
        (["dev.en", "dev.sw", "dev.yo"], "en sw yo"),
        (["corpus.de", "corpus.en", "corpus.ids", "corpus.xml"], "de en"),
    ],
)
def test_layouts_are_recognised_among_other_files(tmp_path, files, shown):
    write(tmp_path, {name: f" {name} \r\nb\n" for name in files})
    write(tmp_path, {"README.md": "x", "SOURCE.txt": "x", "LANGUAGES.tsv": "x", "LICENSE": "x"})
    (tmp_path / "older").mkdir()
    task = load_bitext(tmp_path)
    assert sorted(set(task.languages.values())) == shown.split()
    assert task.name == tmp_path.name
    assert not any("ref-2" in file for file in task.sentences)
    for file, sentences in task.sentences.items():
        assert sentences == [file.rpartition("/")[2], "b"]


def test_pairs_that_share_no_language_are_reported_by_language(tmp_path):
    files = ("deu-fra.deu", "deu-fra.fra", "ita-spa.ita", "ita-spa.spa")
    task = load_bitext(write(tmp_path, {f"tatoeba.{name}": "a\nb\n" for name in files}))
    results = evaluate_bitext(Encoder({"a": np.eye(2)[0], "b": np.eye(2)[1]}), task, log=None)
    page = results.to_markdown()
    assert all(f"| {code} | 2 | 1.0000 | 1.0000 |" in page for code in ("de", "fr", "it", "es"))
    assert all(path.stat().st_size for path in results.write(tmp_path / "out.json"))


def test_pairs_share_no_english_file_and_many_languages_share_all(tmp_path):
    pairs = write(tmp_path / "p", {f"{a}-en.{x}": "a\nb\n" for a in ("de", "fr") for x in (a, "en")})
    assert [tuple(file.rpartition("/")[2] for file in pair) for pair in load_bitext(pairs).pairs] == [
        ("de-en.de", "de-en.en"), ("fr-en.fr", "fr-en.en"),
    ]  # fmt: skip
    many = write(tmp_path / "m", {f"{code}.txt": "a\nb\n" for code in ("de", "en", "fr", "sw")})
    assert len(load_bitext(many).pairs) == 6


def test_languages_are_selected_by_the_files_codes_the_shown_ones_or_all_varieties(tmp_path):
    codes = ("eng", "eng-GB", "deu", "zho-CN", "zho-TW")
    folder = write(tmp_path, {f"newstest2019-ref.{code}.txt": "a\n" for code in codes})

    def selected(*languages):
        return sorted(load_bitext(folder, languages).languages.values())

    assert selected("de", "en") == selected("deu", "eng") == ["de", "en"]
    assert selected("zh", "deu") == ["de", "zh-CN", "zh-TW"]
    assert selected("zho-TW", "de") == ["de", "zh-TW"]
    with pytest.raises(DataError, match=r"'fr'; there are de, en, en-GB, zh-CN, zh-TW"):
        selected("de", "fr")


def test_the_language_of_all_pairs_need_not_be_named(tmp_path):
    files = {f"tatoeba.{a}-eng.{x}": "a\n" for a in ("deu", "fra", "ara", "arz") for x in (a, "eng")}
    folder = write(tmp_path, files)
    assert sorted(set(load_bitext(folder, ["ar"]).languages.values())) == ["ar", "en"]
    assert sorted(set(load_bitext(folder, ["deu", "fr"]).languages.values())) == ["de", "en", "fr"]
    with pytest.raises(DataError, match=r"no file for language 'afr'"):
        load_bitext(folder, ["xtreme"])


def test_xtreme_is_36_languages_of_tatoeba(shared_data):
    task = load_bitext(shared_data / "tatoeba-laser", ["xtreme"])
    assert len(XTREME_36) == len(task.pairs) == 36
    assert sum(len(task.sentences[a]) for a, _ in task.pairs) == 31_692
    assert len(load_bitext(shared_data / "tatoeba-laser").pairs) == 112


def test_ntrex_is_128_languages_with_names_of_their_own(shared_data):
    task = load_bitext(shared_data / "ntrex-128")
    assert len(set(task.languages.values())) == 128
    assert len(task.pairs) == 128 * 127 // 2
    assert {len(sentences) for sentences in task.sentences.values()} == {1997}
    assert {"en", "en-GB", "zh-TW", "fa", "fa-AF", "sr-Latn"} <= set(task.languages.values())


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"de.txt": "a\nb\n", "en.txt": "a\n"}, r"de\.txt has 2 lines, .*en\.txt has 1"),
        ({"de.txt": "a\nb\n", "en.txt": "a\n \n"}, r"en\.txt:2: an empty line"),
        ({"de.txt": b"a\n\xff\n", "en.txt": "a\nb\n"}, r"de\.txt:2: not UTF-8"),
        ({"de.txt": "a\n", "en.txt": ""}, r"en\.txt: empty file"),
        ({"de.txt": "a\n"}, r"it has de\.txt\. Name them as"),
        ({"t.de-en.de": "a\n", "u.txt": "a\n"}, r"t\.de-en\.de: its other side, t\.de-en\.en, is not there"),
        ({"de.dev": "a\n", "de.test": "a\n", "en.dev": "a\n"}, r"de\.dev and de\.test are both of de"),
        ({f"{s}.de-en.{x}": "a\n" for s in "tu" for x in ("de", "en")}, r"t\.de-en\.de and u\.de-en\.de are both"),
        (dict.fromkeys(("t.de-en.de", "u.de-en.de", "t.de-en.en"), "a\n"), r"t\.de-en\.de and u\.de-en\.de are both"),
        ({f"{pair}.{x}": "a\n" for pair in ("de-en", "en-de") for x in ("de", "en")}, r"more than one pair .*de and"),
    ],
)  # fmt: skip
def test_bad_folders_are_named(tmp_path, files, message):
    with pytest.raises(DataError, match=message):
        load_bitext(write(tmp_path, files))


def test_a_folder_that_is_not_there_and_an_unknown_group_are_named(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        load_bitext(tmp_path / "none")
    with pytest.raises(DataError, match=r"group 'low': no language yo in made; there are de, en, fr"):
        replace(made()[0], groups={"low": ["yo", "fr"]})


def results_of(languages=("de", "en", "fr"), **changes) -> BitextResults:
    task, encoder = made(languages)
    return evaluate_bitext(encoder, replace(task, **changes), model="models/made", log=None)


def test_means_are_over_directions_without_varieties_of_one_language():
    results = results_of(("de", "en", "en-GB", "yo"), groups={"low": ["yo"], "all": ["de", "yo"]})
    cell = dict(zip(zip(results.sources, results.targets, strict=True), results.measures["accuracy"], strict=True))
    means = {name: mean["accuracy"] for name, mean in results.means.items()}
    assert means["into en"] == pytest.approx((cell["de", "en"] + cell["yo", "en"]) / 2)
    assert means["out of en"] == pytest.approx((cell["en", "de"] + cell["en", "yo"]) / 2)
    told_apart = [value for pair, value in cell.items() if set(pair) != {"en", "en-GB"}]
    assert len(told_apart) == 10
    assert means["all directions"] == pytest.approx(np.mean(told_apart))
    assert means["low: into en"] == cell["yo", "en"]
    assert means["all: within"] == pytest.approx((cell["de", "yo"] + cell["yo", "de"]) / 2)
    assert "low: within" not in means


def test_results_survive_json():
    results = results_of(groups={"few": ["de", "fr"]})
    text = results.to_json()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert BitextResults.from_json(text) == results
    empty = replace(results, means={"into en": {"accuracy": math.nan}})
    again = BitextResults.from_json(empty.to_json())
    assert math.isnan(again.means["into en"]["accuracy"])
    for bad in ("{", "[]", '{"task": 1}', text.replace('"sentences": [60, ', '"sentences": [')):
        with pytest.raises(ValueError, match="not a bitext result file"):
            BitextResults.from_json(bad)


def test_a_report_is_four_files_and_its_queries_add_up(tmp_path):
    results = results_of()
    paths = results.write(tmp_path / "new" / "out.json")
    assert [path.name for path in paths] == ["out.json", "out.md", "out.png", "out.queries.npz"]
    assert all(path.stat().st_size for path in paths)
    queries = PerQuery.read(paths[3])
    assert len(set(queries.ids)) == len(queries.ids) == 360
    for source, target, accuracy, margin in zip(
        results.sources, results.targets, results.measures["accuracy"], results.measures["margin"], strict=True
    ):
        own = np.array(queries.languages) == f"{source}>{target}"
        assert queries.measures["accuracy"][own].mean() == pytest.approx(accuracy)
        assert queries.measures["margin"][own].mean() == pytest.approx(margin)


def test_lines_are_one_question_in_all_languages_where_they_are_translations_of_each_other(tmp_path):
    folder = write(tmp_path, {f"{a}-en.{x}": "a\nb\n" for a in ("de", "fr") for x in (a, "en")})
    encoder = Encoder({"a": np.ones(2), "b": np.arange(2)})
    ids = evaluate_bitext(encoder, load_bitext(folder), log=None).queries.ids
    assert [name.partition("|")[0] for name in ids] == ["de-en:1", "de-en:2"] * 2 + ["en-fr:1", "en-fr:2"] * 2
    assert {name.partition("|")[0] for name in results_of().queries.ids} == {str(i) for i in range(1, 61)}


def test_of_very_many_directions_queries_hold_the_mean_over_targets(monkeypatch):
    whole = results_of().queries
    monkeypatch.setattr(bitext, "MOST_QUERIES", 359)
    short = results_of().queries
    assert sorted(set(short.languages)) == ["de>*", "en>*", "fr>*"]
    for language in ("de", "en", "fr"):
        for measure in ("accuracy", "same text", "margin"):
            own = [values for name, values in zip(whole.languages, whole.measures[measure], strict=True)
                   if name.startswith(f"{language}>")]  # fmt: skip
            part = short.measures[measure][np.array(short.languages) == f"{language}>*"]
            np.testing.assert_allclose(part, np.reshape(own, (2, 60)).mean(axis=0))


def test_a_page_has_the_matrix_of_few_languages_and_lines_of_many():
    page = results_of(groups={"few": ["de", "fr"]}).to_markdown()
    assert "| into en |" in page
    assert "| few: within |" in page
    assert "by source (rows) and target" in page
    many = many_results(31)
    assert "by source (rows) and target" not in many.to_markdown()
    assert sum(line.startswith("| l") for line in many.to_markdown().splitlines()) == 31 + 1


def many_results(n: int) -> BitextResults:
    codes = [f"l{i:02d}" for i in range(n)]
    directions = [(a, b) for a in codes for b in codes if a != b]
    values = np.random.default_rng(0).random(len(directions)).tolist()
    measures = dict.fromkeys(("accuracy", "same text", "margin"), values)
    means = {"all directions": dict.fromkeys(measures, 0.5)}
    sources, targets = (list(side) for side in zip(*directions, strict=True))
    return BitextResults("made", "", sources, targets, [9] * len(values), measures, means)


def test_pictures_are_drawn_of_pairs_and_of_128_languages(tmp_path):
    from matplotlib.image import imread

    folder = write(tmp_path, {f"{a}-en.{x}": "a\nb\n" for a in ("de", "fr") for x in (a, "en")})
    pairs = evaluate_bitext(Encoder({"a": np.ones(2), "b": np.arange(2)}), load_bitext(folder), log=None)
    for name, results in (("pairs", pairs), ("many", many_results(128))):
        draw(results, tmp_path / f"{name}.png")
        height, width, _ = imread(tmp_path / f"{name}.png").shape
        assert min(height, width) >= (500 if name == "pairs" else 2500)
