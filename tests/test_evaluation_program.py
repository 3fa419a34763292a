"""Claims about the evaluation program: its tasks and options, vectors kept on disk, what it writes."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from programs import status
from test_evaluation_tasks import paragraph, write

from hbt_fast import evaluate as program
from hbt_fast.encoder import EncoderError
from hbt_fast.encoder.export import export
from hbt_fast.evaluation.lareqa import xquad_r
from hbt_fast.evaluation.queries import PerQuery
from hbt_fast.evaluation.report import heat_map, language_bars, write_report
from hbt_fast.evaluation.results import Results
from hbt_fast.evaluation.run import EvaluationError, encode_distinct, evaluate, unnamed_file


@dataclass
class WordEncoder:
    """Vectors from words: a text's language is its first word, its matter the rest; remembers what it was asked."""

    calls: list = field(default_factory=list)
    break_text: str | None = None
    query_dimension: int = 64

    def encode(self, texts, prompt="", progress=False):
        self.calls.append((prompt, list(texts)))
        vectors = []
        for text in texts:
            rng = np.random.default_rng(list(text.encode()))
            vectors.append(rng.standard_normal(self.query_dimension if text.endswith("?") else 64))
            if text == self.break_text:
                vectors[-1][5] = np.nan
        vectors = np.array(vectors, dtype=np.float32)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m").mkdir()  # the model, of whose prompts the program asks
    return tmp_path / "xdg" / "hbt_fast" / "embeddings"


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    return write(folder, en=paragraph("en"), de=paragraph("de"))


@pytest.fixture
def results(folder):
    return evaluate(WordEncoder(), xquad_r(folder), model="words", device="cpu", log=None)


def test_prompts_reach_the_encoder_and_equal_texts_are_encoded_once(tmp_path):
    content = paragraph("en")
    content["sentences"][0] = content["sentences"][1]
    encoder = WordEncoder()
    evaluate(encoder, xquad_r(write(tmp_path, en=content)), "ask: ", "tell: ", device="cpu", log=None)
    assert encoder.calls == [("ask: ", ["en q1?", "en q2?"]), ("tell: ", ["en two.", "en three."])]


def test_bad_encoders_are_named(folder):
    task = xquad_r(folder)
    with pytest.raises(EvaluationError, match=r"1 of 6 candidate vectors hold NaN .* 'en two\.'"):
        evaluate(WordEncoder(break_text="en two."), task, log=None)
    with pytest.raises(EvaluationError, match="query vectors have 32 dimensions, candidate vectors 64"):
        evaluate(WordEncoder(query_dimension=32), task, log=None)


def test_results_survive_json(results):
    holes = replace(results, cr=math.nan, matrix=[[0.1, math.nan], [1 / 3, 1.0]])
    assert "NaN" not in holes.to_json()
    again = Results.from_json(holes.to_json())
    assert math.isnan(again.cr)
    assert math.isnan(again.matrix[0][1])
    assert again.to_json() == holes.to_json()
    assert Results.from_json(results.to_json()) == results
    with pytest.raises(ValueError, match="not a result file"):
        Results.from_json('{"loss": 1}')


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("task", 3),
        ("languages", "de"),
        ("languages", ["de", 3]),
        ("queries", 4.5),
        ("queries", "4"),
        ("mo", "0.5"),
        pytest.param("mo", 10**400, id="mo-large"),
        ("mo", [0.5]),
        ("matrix", [[0.5, "x"], [0.5, 0.5]]),
        ("matrix", [[0.5], [0.5, 0.5]]),
        ("mul_by_language", [0.5]),
        ("by_language", {"mo": [0.5]}),
        ("by_language", {"mo": {"de": 0.5}}),
        ("cutoffs", {"own": {"ndcg@10": "x"}}),
        ("cutoffs", []),
        ("group_languages", {"low": [3]}),
        ("settings", {"max_length": [8]}),
        ("unheard-of", 3),
    ],
)
def test_results_of_another_form_are_refused(results, name, value):
    whole = json.loads(results.to_json())
    with pytest.raises(ValueError, match=rf"{name}|differ in length"):
        Results.from_json(json.dumps({**whole, name: value}))


def test_results_nested_too_deeply_are_refused():
    with pytest.raises(ValueError, match="not a result file"):
        Results.from_json("[" * 100_000)


@pytest.mark.parametrize("with_before", [False, True])
def test_report_writes_three_files(results, tmp_path, with_before):
    before = replace(results, mo=0.125) if with_before else None
    paths = write_report(results, tmp_path / "new" / "out.json", before)
    assert [p.name for p in paths] == ["out.json", "out.md", "out.png"]
    assert Results.from_json(paths[0].read_text()) == results
    assert ("0.1250" in paths[1].read_text()) == with_before
    assert paths[2].read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="must be equal"):
        heat_map(results, paths[2], replace(results, languages=["xx", "yy"]))


def test_program_prints_and_writes(folder, tmp_path, capsys):
    out = tmp_path / "out.json"
    program.main(
        [str(tmp_path), "--data", str(folder), "--out", str(out), "--device", "cpu"], lambda args, device: WordEncoder()
    )
    printed = capsys.readouterr().out
    results = Results.from_json(out.read_text())
    assert f"Mo {results.mo:.4f}  Cr {results.cr:.4f}  Mul {results.mul:.4f}  RD {results.rank_distance:.1f}" in printed
    assert "query prompt '' (none is recorded with the model)" in printed
    assert out.with_suffix(".md").is_file()
    assert out.with_suffix(".png").is_file()
    table = PerQuery.read(tmp_path / "out.queries.npz")
    assert table.ids == ["q1", "q2", "q1", "q2"]
    assert table.languages == ["de", "de", "en", "en"]
    assert set(table.measures) >= {
        "mo", "cr", "mul", "rank_distance", "ndcg@10", "recall@100", "mrr@10", "accuracy@1", "own-language@1",
    }  # fmt: skip
    for name in ("mo", "mul", "rank_distance"):
        assert table.measures[name].mean() == pytest.approx(getattr(results, name))


def test_program_takes_the_first_dimensions(folder, tmp_path, capsys, make_encoder):
    model = str(export(make_encoder(), tmp_path / "model"))
    printed = []
    for more in ([], ["--dimensions", "4"]):
        assert status(program.main, [model, "--data", str(folder), "--precision", "fp32", *more]) == 0
        printed.append(capsys.readouterr().out)
    assert "32 dimensions" in printed[0]
    assert " 4 dimensions" in printed[1]
    assert status(program.main, [model, "--data", str(folder), "--dimensions", "64"]) == 2
    assert "dimensions is 64; the encoder has 32" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("recorded", "flags", "expected"),
    [
        (None, [], ("", "")),
        ({"query": "query: ", "document": "passage: "}, [], ("query: ", "passage: ")),
        ({"query": "", "passage": "p", "document": "d"}, [], ("", "p")),
        ({"query": "query: "}, [], ("query: ", "")),
        ({"document": "passage: "}, [], ("", "passage: ")),
        ({"query": "query: "}, ["--passage-prompt", "p: "], ("query: ", "p: ")),
        (None, ["--task", "bitext"], ("", "")),
        ({"query": "query: ", "passage": "passage: "}, ["--task", "bitext"], ("query: ", "query: ")),
        (None, ["--task", "bitext", "--query-prompt", "q: "], ("q: ", "q: ")),
    ],
)
def test_prompts_come_from_the_command_line_then_the_model_and_are_not_made_up(tmp_path, recorded, flags, expected):
    if recorded is not None:
        (tmp_path / "config_sentence_transformers.json").write_text(json.dumps({"prompts": recorded}))
    assert program.prompts_of(program.parse([str(tmp_path), "--data", "d", *flags])).texts == expected


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data", "absent"], "no such folder"),
        (["--data", "DATA", "--languages", "en,xx"], "no file for languages ['xx']"),
        (["--data", "DATA", "--before", "absent.json"], "absent.json"),
        (["--data", "DATA", "--before", "DATA/en.json"], "not a result file"),
    ],
)
def test_program_ends_with_a_message_and_2(folder, capsys, flags, message):
    flags = [flag.replace("DATA", str(folder)) for flag in flags]
    assert status(program.main, ["some-model", *flags], lambda args, device: WordEncoder()) == 2
    error = capsys.readouterr().err
    assert error.startswith("hbt_fast.evaluate: ")
    assert message in error


def test_program_names_a_bad_encoder_and_a_bad_model(folder, tmp_path, capsys):
    assert (
        status(program.main, ["m", "--data", str(folder)], lambda args, device: WordEncoder(break_text="de one.")) == 2
    )
    assert "hold NaN" in capsys.readouterr().err
    assert status(program.main, [str(tmp_path / "no-model"), "--data", str(folder)]) == 2
    assert "no-model" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        program.parse(["m", "--data", "d", "--out", "results.txt"])


def test_a_broken_prompt_record_is_named(tmp_path):
    (tmp_path / "config_sentence_transformers.json").write_text("{")
    with pytest.raises(EncoderError, match=r"config_sentence_transformers\.json: not valid JSON"):
        program.prompts_of(program.parse([str(tmp_path), "--data", "d"]))


def test_program_evaluates_a_real_encoder(folder, tmp_path, make_encoder, capsys):
    """The whole way: an exported folder, its recorded prompts, its vectors."""
    from hbt_fast.encoder.export import export

    export(make_encoder(), tmp_path / "model")
    assert status(program.main, [str(tmp_path / "model"), "--data", str(folder), "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "(recorded with the model)" in printed
    assert "Mo " in printed


def test_vectors_in_a_file_stay_in_one_where_texts_repeat(tmp_path):
    class Mapped:
        def encode(self, texts, prompt="", progress=False):
            np.save(tmp_path / "v.npy", np.arange(4.0 * len(texts), dtype=np.float32).reshape(-1, 4))
            return np.load(tmp_path / "v.npy", mmap_mode="c")

    found = encode_distinct(Mapped(), ["a", "b", "a", "c"], "", "query", False)
    assert isinstance(found, np.memmap)
    np.testing.assert_array_equal(found[:, 0], [0, 4, 0, 8])
    there = np.load(tmp_path / "v.npy", mmap_mode="c")
    with pytest.raises(OSError, match=rf"No space left on device: 2048\.00 GiB more vectors: '{tmp_path}'"):
        unnamed_file((2**31, 256), there)  # would kill the process once written to


@pytest.fixture
def miracl(tmp_path):
    """Two languages with two questions and three passages each."""
    for code in ("sw", "en"):
        folder = tmp_path / "miracl" / code
        folder.mkdir(parents=True)
        lines = [{"docid": f"{i}", "title": "t", "text": f"{code} text {i}"} for i in range(3)]
        (folder / "docs-0.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (folder / "topics.dev.tsv").write_text(f"a\t{code} a?\nb\t{code} b?\nc\t{code} c?\n")
        (folder / "qrels.dev.tsv").write_text("a\tQ0\t0\t1\na\tQ0\t1\t2\nb\tQ0\t2\t1\n")
        (folder / "run.txt").write_text("a Q0 0 1 9 bm25\na Q0 2 2 8 bm25\nb Q0 1 1 9 bm25\n")
    return tmp_path / "miracl"


def evaluated(tmp_path, *flags) -> Results:
    out = tmp_path / "out.json"
    arguments = ["m", "--device", "cpu", "--out", str(out), *map(str, flags)]
    assert status(program.main, arguments, lambda args, device: WordEncoder()) == 0
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    return Results.from_json(out.read_text())


def test_program_evaluates_miracl(miracl, tmp_path, capsys):
    groups = tmp_path / "groups.yaml"
    groups.write_text("low: [sw]\nall: [sw, en]\n")
    results = evaluated(tmp_path, "--task", "miracl", "--data", miracl, "--groups", groups)
    printed = capsys.readouterr().out
    own = results.cutoffs["own"]
    line = f"nDCG@10 {own['ndcg@10']:.4f}  Recall@100 1.0000  MRR@10 {own['mrr@10']:.4f}  mAP {results.mo:.4f}"
    assert line in printed
    assert "2 queries have no relevant candidate (judged 0 or not at all, as those of other splits)" in printed
    assert "2 further queries have no relevant candidate (judged 0 or not at all, as those of other splits)" in printed
    assert "nan" not in printed
    assert results.task == "miracl (dev)"
    assert results.left_out == 2
    assert math.isnan(results.cr)
    assert math.isnan(results.rank_distance)
    assert results.groups["low"]["ndcg@10"] == results.by_language["ndcg@10"][1]
    assert results.groups["all"]["ndcg@10"] == pytest.approx(own["ndcg@10"])
    assert PerQuery.read(tmp_path / "out.queries.npz").ids == ["en:a", "en:b", "sw:a", "sw:b"]
    assert set(PerQuery.read(tmp_path / "out.queries.npz").measures).isdisjoint({"cr", "rank_distance"})


def test_program_reranks(miracl, tmp_path, capsys):
    results = evaluated(tmp_path, "--task", "rerank", "--data", miracl, "--groups", "low=sw; high = en")
    printed = capsys.readouterr().out
    assert list(results.cutoffs) == ["re-ranking"]
    assert results.cutoffs["re-ranking"]["mrr@10"] <= 0.5  # the pool of b lacks its answer
    assert f"MRR@10 {results.cutoffs['re-ranking']['mrr@10']:.4f}" in printed.splitlines()[-2]
    assert "nan" not in printed
    assert set(results.groups) == {"low", "high"}
    table = PerQuery.read(tmp_path / "out.queries.npz")
    assert table.measures["mrr@10"][1::2].tolist() == [0, 0]


def test_program_evaluates_one_language_and_own_jsonl(tmp_path, capsys):
    lines = [{"query": f"{i}?", "passage": f"{i}"} for i in range(5)]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    results = evaluated(tmp_path, "--task", "jsonl", "--data", tmp_path / "own.jsonl")
    printed = capsys.readouterr().out
    assert results.languages == ["und"]
    assert f"  mAP {results.mo:.4f}\n" in printed
    assert not any(word in printed for word in ("nan", "Cr", "Mul"))


def test_program_evaluates_bitext(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    for code in ("de", "en"):
        (tmp_path / "data" / f"text.{code}").write_text("".join(f"{code} {i}\n" for i in range(4)))
    arguments = ["m", "--task", "bitext", "--data", str(tmp_path / "data"), "--device", "cpu",
                 "--out", str(tmp_path / "bitext.json")]  # fmt: skip
    encoder = WordEncoder()
    assert status(program.main, arguments, lambda args, device: encoder) == 0
    assert {prompt for prompt, _ in encoder.calls} == {""}
    assert PerQuery.read(tmp_path / "bitext.queries.npz").measures["accuracy"].shape == (8,)


def test_an_approximate_index_has_a_line_of_its_own(tmp_path):
    lines = [{"query": f"{i}", "passage": f"{i}"} for i in range(200)]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = ("--task", "jsonl", "--data", tmp_path / "own.jsonl", "--index")
    exact, approximate = evaluated(tmp_path, *flags, "flat"), evaluated(tmp_path, *flags, "ivf")
    assert list(approximate.cutoffs) == ["own", "all", "all, by ivf"]
    assert "| all, by ivf | 1.0000 |" in approximate.to_markdown()
    assert approximate.cutoffs["all"] == exact.cutoffs["all"]
    assert approximate.bias == exact.bias
    # A question with the very vector of its answer is in the cluster that is looked at.
    assert approximate.cutoffs["all, by ivf"] == pytest.approx({"ndcg@10": 1.0, "recall@100": 1.0, "mrr@10": 1.0})


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--task", "xquad-r", "--split", "dev"],
            "--split is for --task beir, miracl, mr-tydi, rerank, not for xquad-r",
        ),
        (["--task", "beir", "--context"], "--context is for"),
        (["--task", "bitext", "--index", "ivf"], "--index is for"),
        (["--task", "bitext", "--before", "x.json"], "--before is for"),
        (["--task", "trec"], "invalid choice"),
    ],
)
def test_options_that_a_task_has_not_are_refused(flags, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        program.parse(["m", "--data", "d", *flags])
    assert message in capsys.readouterr().err


def test_an_earlier_evaluation_of_another_task_is_refused(results, folder, tmp_path, capsys):
    for changed, message in (
        ({"task": "scifact (test)"}, "is of the task scifact (test), this evaluation of xquad-r"),
        ({"languages": ["de", "fr"]}, "has languages ['de', 'fr'], this evaluation ['de', 'en']"),
    ):
        (tmp_path / "before.json").write_text(replace(results, **changed).to_json())
        arguments = ["m", "--data", str(folder), "--before", str(tmp_path / "before.json")]
        assert status(program.main, arguments, lambda args, device: WordEncoder()) == 2
        assert f"before.json {message}" in capsys.readouterr().err


def test_bars_are_drawn_with_an_earlier_evaluation_beside(miracl, tmp_path):
    results = evaluated(tmp_path, "--task", "miracl", "--data", miracl)
    page = write_report(results, tmp_path / "two.json", replace(results, mo=0.125))[1].read_text()
    assert "| before |" in page
    assert "0.1250" in page
    with pytest.raises(ValueError, match="must be equal"):
        language_bars(results, tmp_path / "two.png", replace(results, languages=["xx", "yy"]))


def test_a_folder_that_cannot_be_made_is_said_before_a_model_is_loaded(folder, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "out.json"
    command = ["m", "--data", str(folder), "--out", str(out)]
    assert status(program.main, command, lambda args, device: pytest.fail("loaded")) == 2
    assert f"{tmp_path / 'file'}: " in capsys.readouterr().err
