"""Claims about search, results on disk, and the evaluation program from the command line."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from test_evaluation_tasks import paragraph, write

from hbt_fast import evaluate as program
from hbt_fast.data.rows import DataError
from hbt_fast.encoder.export import export
from hbt_fast.evaluation.lareqa import xquad_r
from hbt_fast.evaluation.metrics import Results
from hbt_fast.evaluation.report import heat_map, write_report
from hbt_fast.evaluation.run import EvaluationError, evaluate


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
    status = program.main(
        [str(tmp_path), "--data", str(folder), "--out", str(out), "--device", "cpu"], lambda args, device: WordEncoder()
    )
    printed = capsys.readouterr().out
    results = Results.from_json(out.read_text())
    assert status == 0
    assert f"Mo {results.mo:.4f}  Cr {results.cr:.4f}  Mul {results.mul:.4f}  RD {results.rank_distance:.1f}" in printed
    assert "query prompt 'Query: ' (default" in printed
    assert out.with_suffix(".md").is_file()
    assert out.with_suffix(".png").is_file()


def test_program_takes_the_first_dimensions(folder, tmp_path, capsys, make_encoder):
    model = str(export(make_encoder(), tmp_path / "model"))
    printed = []
    for more in ([], ["--dimensions", "4"]):
        assert program.main([model, "--data", str(folder), "--precision", "fp32", *more]) == 0
        printed.append(capsys.readouterr().out)
    assert "32 dimensions" in printed[0]
    assert " 4 dimensions" in printed[1]
    assert program.main([model, "--data", str(folder), "--dimensions", "64"]) == 2
    assert "dimensions is 64; the encoder has 32" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("recorded", "flags", "expected"),
    [
        (None, [], ("Query: ", "Passage: ")),
        ({"query": "query: ", "document": "passage: "}, [], ("query: ", "passage: ")),
        ({"query": "", "passage": "p", "document": "d"}, [], ("", "p")),
        ({"query": "query: "}, ["--passage-prompt", ""], ("query: ", "")),
    ],
)
def test_prompts_come_from_the_command_line_then_the_model_then_the_paper(tmp_path, recorded, flags, expected):
    if recorded is not None:
        (tmp_path / "config_sentence_transformers.json").write_text(json.dumps({"prompts": recorded}))
    assert program.choose_prompts(program.parse([str(tmp_path), "--data", "d", *flags]))[0] == expected


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
    assert program.main(["some-model", *flags], lambda args, device: WordEncoder()) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error


def test_program_names_a_bad_encoder_and_a_bad_model(folder, tmp_path, capsys):
    assert program.main(["m", "--data", str(folder)], lambda args, device: WordEncoder(break_text="de one.")) == 2
    assert "hold NaN" in capsys.readouterr().err
    assert program.main([str(tmp_path / "no-model"), "--data", str(folder)]) == 2
    assert "no-model" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        program.parse(["m", "--data", "d", "--out", "results.txt"])


def test_a_broken_prompt_record_is_named(tmp_path):
    (tmp_path / "config_sentence_transformers.json").write_text("{")
    with pytest.raises(DataError, match="not valid JSON"):
        program.recorded_prompts(tmp_path)


def test_program_evaluates_a_real_encoder(folder, tmp_path, make_encoder, capsys):
    """The whole way: an exported folder, its recorded prompts, its vectors."""
    from hbt_fast.encoder.export import export

    export(make_encoder(), tmp_path / "model")
    assert program.main([str(tmp_path / "model"), "--data", str(folder), "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "(recorded with the model)" in printed
    assert "Mo " in printed
