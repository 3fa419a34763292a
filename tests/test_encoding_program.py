"""`python -m hbt_fast.encode` writes the vectors of files of texts."""

import gzip
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from programs import status

from hbt_fast import encode
from hbt_fast.encoder import Encoder
from hbt_fast.encoder.export import export

LINES = ["en the red blue 7", "", "fr the old new", "de which green"]


@pytest.fixture
def model(make_encoder, tmp_path):
    encoder = make_encoder()
    encoder.prompts = {"query": "Q: ", "passage": "P: "}
    return export(encoder, tmp_path / "model")


def test_every_line_is_a_text(model, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("\n".join(LINES[:2]) + "\n", encoding="utf-8")
    with gzip.open(tmp_path / "b.txt.gz", "wt", encoding="utf-8") as file:
        file.write("\n".join(LINES[2:]))
    out = tmp_path / "v.npy"
    files = [str(tmp_path / "a.txt"), str(tmp_path / "b.txt.gz")]
    encode.main([str(model), *files, "--as", "query", "--out", str(out), "--precision", "fp32"])  # auto may be bf16
    np.testing.assert_array_equal(np.load(out), Encoder.from_pretrained(model).encode(LINES, "Q: "))
    assert f"{out}: 4 vectors of 32 dimensions, float32; " in capsys.readouterr().out


def test_fields_of_json_lines_are_joined(model, tmp_path):
    rows = [{"id": 1, "title": "red", "text": "blue"}, {"id": 2, "title": "", "text": "green"}]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    out = tmp_path / "v.npy"
    command = [sys.executable, "-m", "hbt_fast.encode", str(model), str(tmp_path / "*.jsonl"), "--out", str(out)]
    options = [
        "--field",
        "title",
        "--field",
        "text",
        "--prompt",
        "x: ",
        "--dimensions",
        "8",
        "--dtype",
        "float16",
        "--precision",
        "fp32",
    ]
    subprocess.run([*command, *options], check=True, timeout=200)
    expected = Encoder.from_pretrained(model).encode(["red blue", "green"], "x: ", dimensions=8, dtype="float16")
    np.testing.assert_array_equal(np.load(out), expected)


def test_devices_and_precision(model, tmp_path):
    (tmp_path / "a.txt").write_text("\n".join(LINES), encoding="utf-8")
    out = tmp_path / "v.npy"
    options = ["--as", "passage", "--precision", "bf16", "--devices", "cpu,cpu", "--out", str(out)]
    assert status(encode.main, [str(model), str(tmp_path / "a.txt"), *options]) == 0
    whole = Encoder.from_pretrained(model).encode(LINES, "P: ")
    assert 0 < np.abs(np.load(out) - whole).max() < 0.03


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (None, [], "corpus.jsonl: no such file"),
        ('{"text": "red"}\n{"title": "x"}', ["--field", "text"], "corpus.jsonl:2: no text in field text; the fields"),
        ('{"text": "red"}', [], "corpus.jsonl: holds JSON Lines; say which field is the text, as --field text"),
        ('{"text": ""}', ["--field", "text"], "corpus.jsonl:1: no text in field text; it is empty; the fields are"),
        ('{"text": 3}', ["--field", "text"], "corpus.jsonl:1: no text in field text"),
        ("not json", ["--field", "text"], "corpus.jsonl:1: not JSON"),
        ("red", ["--dimensions", "64"], "dimensions is 64; the encoder has 32"),
        ("red", ["--devices", "tpu"], "devices: 'tpu': "),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(model, tmp_path, capsys, text, options, message):
    if text is not None:
        (tmp_path / "corpus.jsonl").write_text(text, encoding="utf-8")
    arguments = [str(model), str(tmp_path / "corpus.jsonl"), "--prompt", "", "--out", str(tmp_path / "v.npy"), *options]
    assert status(encode.main, arguments) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("v.npy*"))


def test_a_prompt_that_is_not_recorded_is_not_made_up(model, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("\n".join(LINES), encoding="utf-8")
    options = [str(model), str(tmp_path / "a.txt"), "--out", str(tmp_path / "v.npy"), "--as", "passage"]
    assert status(encode.main, options) == 0
    assert "passage prompt 'P: ' (recorded with the model)" in capsys.readouterr().out
    (model / "config_sentence_transformers.json").unlink()
    assert status(encode.main, options) == 2
    said = f"no prompt is recorded with {model}; in place of --as passage give --prompt with what its model card says"
    assert said in capsys.readouterr().err


def test_8_bits_are_for_the_cpu_also_where_there_are_gpus(model, tmp_path, capsys, monkeypatch):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    (tmp_path / "a.txt").write_text("\n".join(LINES), encoding="utf-8")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    options = [str(model), str(tmp_path / "a.txt"), "--out", str(tmp_path / "v.npy"), "--as", "query"]
    assert status(encode.main, [*options, "--precision", "int8"]) == 0
    assert status(encode.main, [*options, "--precision", "int8", "--devices", "cuda:0,cuda:1"]) == 2
    said = "--precision int8 runs on the CPU, in one process, and --devices is cuda:0,cuda:1; leave one out"
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [
        ("flags : fpu avx512f avx512bw avx512vl", "float32"),
        ("flags : fpu avx512f avx512_bf16", "bfloat16"),
        ("flags : amx_bf16 amx_tile", "bfloat16"),
        ("Features : asimd bf16 i8mm", "bfloat16"),
        (None, "float32"),
    ],
)
def test_bf16_is_taken_where_the_cpu_multiplies_it(tmp_path, monkeypatch, flags, dtype):
    if flags is not None:
        (tmp_path / "cpuinfo").write_text(f"processor : 0\n{flags}\n\n", encoding="utf-8")
    monkeypatch.setattr(encode, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    assert encode.native_dtype("cpu") == getattr(torch, dtype)


def test_a_prompt_must_be_chosen(capsys):
    with pytest.raises(SystemExit):
        encode.parse(["model", "file", "--out", "v.npy"])
    assert "one of the arguments --as --prompt is required" in capsys.readouterr().err
