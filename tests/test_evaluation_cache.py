"""Claims about vectors kept on disk: taken again where nothing changed, and only there."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from test_evaluation_tasks import paragraph, write

from hbt_fast import evaluate as program
from hbt_fast.encoder import EncoderError
from hbt_fast.encoder.export import export
from hbt_fast.evaluation.cache import CachedEncoder
from hbt_fast.evaluation.results import Results


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    return tmp_path / "xdg" / "hbt_fast" / "embeddings"


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    return write(folder, en=paragraph("en"), de=paragraph("de"))


def test_a_second_evaluation_takes_its_vectors_from_the_cache(
    folder, tmp_path, make_encoder, capsys, cache, monkeypatch
):
    model = str(export(make_encoder(), tmp_path / "model"))
    outs = [tmp_path / "first.json", tmp_path / "second.json"]
    printed = []
    for out in outs:
        program.main([model, "--data", str(folder), "--out", str(out), "--device", "cpu"])
        printed.append(capsys.readouterr().out)
        monkeypatch.setattr("hbt_fast.encoder.encoding._embedded", None)  # from now on nothing can be encoded
    assert len(list(cache.glob("*.npy"))) == 2
    assert f"4 vectors kept in {cache}" in printed[0]
    assert f"4 vectors from {cache}" in printed[1]
    first, second = (Results.from_json(out.read_text()) for out in outs)
    assert replace(first, seconds={}) == replace(second, seconds={})
    known = {"precision": "fp32", "pooling": "mean", "max_length": 32, "dimensions": 32, "index": "flat"}
    assert first.settings.items() >= known.items()
    assert f"Settings: {first.settings}" in printed[0]


def test_the_cache_can_be_elsewhere_or_off(folder, tmp_path, make_encoder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = str(export(make_encoder(), tmp_path / "model"))
    program.main([model, "--data", str(folder), "--cache", "none"])
    assert not list(tmp_path.rglob("*.npy"))
    program.main([model, "--data", str(folder), "--cache", str(tmp_path / "here")])
    assert len(list((tmp_path / "here").glob("*.npy"))) == 2


def test_vectors_of_another_encoder_prompt_or_text_are_not_taken(tmp_path, make_encoder):
    import torch

    encoder, said = make_encoder(), []
    texts = ["red cat", "blue dog"]

    def encode(encoder, texts, prompt, dimensions=None):
        return CachedEncoder(encoder, tmp_path, dimensions, said.append).encode(texts, prompt)

    def fresh(encoder, texts, prompt, dimensions=None):
        return np.array_equal(
            encode(encoder, texts, prompt, dimensions), encoder.encode(texts, prompt, dimensions=dimensions)
        )

    assert fresh(encoder, texts, "q: ")
    assert fresh(encoder, texts, "p: ")
    assert fresh(encoder, texts[::-1], "q: ")
    assert fresh(encoder, ["red ca", "tblue dog"], "q: ")
    encoder.max_length = 3
    assert fresh(encoder, texts, "q: ")
    encoder.max_length = 512
    with torch.no_grad():
        next(encoder.parameters()).mul_(1.5)
    assert fresh(encoder, texts, "q: ")
    encoder.model.config.layer_norm_eps *= 2  # a checkpoint with the same weights and another config
    assert fresh(encoder, texts, "q: ")
    assert not any(line.startswith("2 vectors from") for line in said)
    assert fresh(encoder, texts, "q: ")
    assert said[-1].startswith("2 vectors from")
    damaged = max(tmp_path.glob("*.npy"), key=lambda p: p.stat().st_mtime_ns)
    for damage in (lambda: damaged.write_bytes(damaged.read_bytes()[:-8]), lambda: np.save(damaged, np.ones((3, 32)))):
        damage()
        assert fresh(encoder, texts, "q: ")
        assert said[-1].startswith("2 vectors kept")


def test_fewer_dimensions_are_cut_from_the_vectors_that_are_there(tmp_path, make_encoder, monkeypatch):
    encoder, said = make_encoder(), []
    texts = ["red cat", "blue dog", "a"]
    for _ in range(2):
        found = CachedEncoder(encoder, tmp_path, 4, said.append).encode(texts, "q: ")
        np.testing.assert_allclose(found, encoder.encode(texts, "q: ", dimensions=4), atol=1e-6)
        whole = CachedEncoder(encoder, tmp_path, None, said.append).encode(texts, "q: ")
        assert np.array_equal(whole, encoder.encode(texts, "q: "))
    assert [line.split()[2] for line in said] == ["kept", "from", "from", "from"]
    for wrong in (33, -1):
        with pytest.raises(EncoderError, match=f"dimensions is {wrong}; the encoder has 32"):
            CachedEncoder(encoder, tmp_path, wrong)


def test_an_interrupted_encoding_goes_on(tmp_path, make_encoder, monkeypatch):
    from hbt_fast.encoder import encoding

    monkeypatch.setattr(encoding, "PIECE", 4)
    encoder, texts, real, done = make_encoder(), [f"red cat {i}" for i in range(12)], encoding._embedded, []

    def stopping(encoder, packed, *rest):
        done.append(len(packed.piece))
        if len(done) == 3:
            raise KeyboardInterrupt
        return real(encoder, packed, *rest)

    monkeypatch.setattr(encoding, "_embedded", stopping)
    with pytest.raises(KeyboardInterrupt):
        CachedEncoder(encoder, tmp_path, log=str).encode(texts)
    vectors = CachedEncoder(encoder, tmp_path, log=str).encode(texts)
    assert done == [4, 4, 4, 4]  # the third piece twice, the first two once
    monkeypatch.setattr(encoding, "_embedded", real)
    assert np.array_equal(vectors, encoder.encode(texts))
