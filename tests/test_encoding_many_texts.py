"""Encoding: any iterable, in order, here or in processes, into memory or a file that an interruption does not lose."""

import copy
import json
import os
import signal
import subprocess
import sys
import time
from itertools import islice

import numpy as np
import pytest
import torch
from conftest import WORDS
from tokenizers import processors

from hbt_fast.encoder import Encoder, EncoderError, encoding, vector_file
from hbt_fast.encoder.export import export


@pytest.fixture(scope="module")
def texts():
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(WORDS, n)) + f" {i}" for i, n in enumerate(rng.integers(1, 20, 300))]


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(encoding, "PIECE", 64)
    monkeypatch.setattr(vector_file, "SECONDS", 0)


def one_by_one(encoder, texts, prompt=""):
    return np.concatenate([encoder.encode([text], prompt) for text in texts])


def test_vectors_come_in_the_order_of_the_texts(make_encoder, texts, small_pieces):
    encoder = make_encoder()
    expected = one_by_one(encoder, texts, "Query: ")
    for given in (texts, iter(texts), tuple(texts)):
        found = encoder.encode(given, "Query: ", batch_tokens=100)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, atol=1e-6)
    assert encoder.training


def test_few_texts_are_held_at_a_time(make_encoder, tmp_path, small_pieces):
    taken = done = 0

    def endless():
        nonlocal taken
        for i in range(1000):
            taken += 1
            assert taken - done <= 4 * 64, "texts are taken before they are needed"
            yield f"red {i}"

    class Counting(encoding.VectorFile):
        def append(self, vectors_nd):
            nonlocal done
            done += len(vectors_nd)
            super().append(vectors_nd)

    encoding.VectorFile, original = Counting, encoding.VectorFile
    try:
        vectors = make_encoder().encode(endless(), out=tmp_path / "v.npy")
    finally:
        encoding.VectorFile = original
    assert isinstance(vectors, np.memmap)
    assert vectors.shape == (1000, 32)
    assert [p.name for p in tmp_path.iterdir()] == ["v.npy"]


def test_first_dimensions_are_normalised_again(make_encoder, texts):
    encoder = make_encoder()
    whole, first = encoder.encode(texts), encoder.encode(texts, dimensions=8)
    np.testing.assert_allclose(first, whole[:, :8] / np.linalg.norm(whole[:, :8], axis=1, keepdims=True), atol=1e-6)
    half = encoder.encode(texts, dtype="float16")
    assert half.dtype == np.float16
    np.testing.assert_allclose(half, whole, atol=1e-3)


def test_weights_may_be_bfloat16(make_encoder, texts):
    encoder = make_encoder()
    whole = encoder.encode(texts)
    half = encoder.to(torch.bfloat16).encode(texts)
    assert half.dtype == np.float32
    assert np.abs(half - whole).max() > 0
    np.testing.assert_allclose(half, whole, atol=0.03)


def test_processes_find_what_one_does(make_encoder, texts, small_pieces, tmp_path):
    encoder = make_encoder()
    encoder.pooling, encoder.prompts = "cls", {"query": "Q: ", "passage": "P: "}
    expected = encoder.encode(texts, "Q: ", dimensions=16)
    options = {"dimensions": 16, "devices": ["cpu", "cpu"], "progress": True}
    np.testing.assert_allclose(encoder.encode(iter(texts), "Q: ", **options), expected, atol=1e-6)
    found = encoder.encode(texts, "Q: ", **options, out=tmp_path / "v.npy")
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_processes_have_the_weights_dtype_too(make_encoder, texts, small_pieces):
    encoder = make_encoder().to(torch.bfloat16)
    expected = encoder.encode(texts)
    np.testing.assert_allclose(encoder.encode(texts, devices=["cpu"]), expected, atol=1e-6)


def test_an_error_in_a_process_is_raised_here(make_encoder, texts, small_pieces, monkeypatch):
    encoder = make_encoder()
    encoder.tokenizer = copy.deepcopy(encoder.tokenizer)
    encoder.tokenizer.backend_tokenizer.post_processor = processors.Sequence([])  # adds no <s>
    for devices in (None, ["cpu"]):
        with pytest.raises(EncoderError, match=r"no token is left of text 300 \(''\); leave it out"):
            encoder.encode([*texts, ""], devices=devices)


def test_a_process_that_dies_is_no_silent_loss(make_encoder, texts, small_pieces, monkeypatch):
    def dying(self, *arguments):
        original(self, *arguments)
        self.processes[0].kill()

    original = encoding.Workers.__init__
    monkeypatch.setattr(encoding.Workers, "__init__", dying)
    with pytest.raises(EncoderError, match="a process that encodes ended with status -9"):
        make_encoder().encode(texts, devices=["cpu", "cpu"])


class Stop(Exception):
    pass


def until(texts, count):
    yield from islice(texts, count)
    raise Stop


def test_an_interrupted_encoding_goes_on(make_encoder, texts, small_pieces, tmp_path, monkeypatch):
    encoder, file = make_encoder(), tmp_path / "v.npy"
    whole = encoder.encode(texts)
    with pytest.raises(Stop):
        encoder.encode(until(texts, 200), out=file)
    assert not file.exists()
    state = json.loads((tmp_path / "v.npy.partial" / "state.json").read_text())
    assert state["texts"] in (64, 128)  # one or two pieces were under way

    embedded = []
    original = encoding._embedded
    monkeypatch.setattr(encoding, "_embedded", lambda e, m, h, b: embedded.append(len(m)) or original(e, m, h, b))
    np.testing.assert_array_equal(encoder.encode(texts, out=file), whole)
    assert len(embedded) == 5 - state["texts"] // 64
    assert [p.name for p in tmp_path.iterdir()] == ["v.npy"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"texts": "others"}, "the texts are not those of the interrupted encoding in .*v.npy.partial, of which 192"),
        ({"texts": "fewer"}, "the texts are not those of the interrupted encoding"),
        ({"prompt": "Query: "}, "an interrupted encoding that differs in prompt; delete it, or write to another file"),
        ({"dimensions": 8}, "differs in dimensions"),
        ({"seed": 1}, "differs in weights"),
        ({"damage": True}, "damaged since an interrupted run wrote it; delete .*partial"),
    ],
)
def test_what_was_interrupted_is_not_mixed_with_other_things(
    make_encoder, texts, small_pieces, tmp_path, change, message
):
    file = tmp_path / "v.npy"
    with pytest.raises(Stop):
        make_encoder().encode(until(texts, 256), out=file)
    now = {"others": [*texts[:100], "another", *texts[101:]], "fewer": texts[:100]}.get(change.get("texts"), texts)
    if "damage" in change:
        with open(tmp_path / "v.npy.partial" / "vectors.npy", "r+b") as vectors:
            vectors.seek(1000)
            vectors.write(b"x")
    options = {"prompt": change.get("prompt", ""), "dimensions": change.get("dimensions")}
    with pytest.raises(ValueError, match=message):
        make_encoder(change.get("seed", 0)).encode(now, **options, out=file)
    if "damage" not in change:  # nothing is lost
        expected = make_encoder().encode(texts)
        np.testing.assert_array_equal(make_encoder().encode(iter(texts), out=file), expected)


def test_a_killed_encoding_goes_on(make_encoder, texts, tmp_path):
    folder, file = export(make_encoder(), tmp_path / "m"), tmp_path / "v.npy"
    program = """
import sys, time
from hbt_fast.encoder import Encoder, encoding, vector_file
encoding.PIECE, vector_file.SECONDS = 64, 0
def slowly():
    for i, text in enumerate(open(sys.argv[2]).read().splitlines()):
        if i == 256 and len(sys.argv) > 4:
            time.sleep(60)
        yield text
Encoder.from_pretrained(sys.argv[1]).encode(slowly(), out=sys.argv[3])
"""
    (tmp_path / "texts").write_text("\n".join(texts))
    command = [sys.executable, "-c", program, str(folder), str(tmp_path / "texts"), str(file)]
    with subprocess.Popen([*command, "slowly"]) as process:
        state = tmp_path / "v.npy.partial" / "state.json"
        deadline = time.monotonic() + 120
        while not (state.exists() and json.loads(state.read_text())["texts"] >= 128):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        with pytest.raises(EncoderError, match=r"another process is writing .*v\.npy"):
            make_encoder().encode(texts, out=file)
        os.kill(process.pid, signal.SIGKILL)
    (state.parent / "state.json.1.begun").touch()  # as a kill leaves it in the middle of a note
    assert not file.exists()
    subprocess.run(command, check=True, timeout=120)
    np.testing.assert_allclose(np.load(file), make_encoder().encode(texts), atol=1e-6)


def test_an_encoding_killed_as_it_finished_can_be_started_again(make_encoder, texts, small_pieces, tmp_path):
    encoder, file = make_encoder(), tmp_path / "v.npy"
    expected = encoder.encode(texts)
    remove = vector_file.VectorFile._remove
    try:
        vector_file.VectorFile._remove = lambda self: os._exit(9)
        if not (child := os.fork()):
            encoder.encode(texts, out=file)
        os.waitpid(child, 0)
    finally:
        vector_file.VectorFile._remove = remove
    assert file.exists()
    assert (tmp_path / "v.npy.partial" / "state.json").exists()
    np.testing.assert_array_equal(encoder.encode(texts, out=file), expected)
    assert [p.name for p in tmp_path.iterdir()] == ["v.npy"]


def test_nothing_is_left_of_an_encoding_that_did_nothing(make_encoder, tmp_path):
    with pytest.raises(EncoderError, match="text 1 is of type float, not a string"):
        make_encoder().encode(["red", float("nan")], out=tmp_path / "v.npy")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ("red", {}, "texts is one string; give a list of them"),
        (["red"], {"dimensions": 33}, "dimensions is 33; the encoder has 32"),
        (["red"], {"dimensions": 0}, "dimensions is 0"),
        (["red"], {"batch_tokens": 0}, "batch_tokens is 0; it must be at least 1"),
        (["red"], {"dtype": "int8"}, "dtype is int8; it can be float32 or float16"),
        (["red"], {"dtype": "bogus"}, "dtype is bogus; it can be float32 or float16"),
        (["red"], {"out": "v.bin"}, "out is v.bin; its name must end in .npy"),
        (["red"], {"devices": "cpu"}, 'devices is "cpu"; give a list'),
        (["red"], {"devices": ["gpu7"]}, "devices: 'gpu7': "),
        (["red"], {"devices": ["cuda:99"]}, r"devices: 'cuda:99', but torch sees \d+ GPUs"),
    ],
)
def test_settings_that_cannot_be_met_are_named(make_encoder, texts, options, message):
    with pytest.raises(EncoderError, match=message):
        make_encoder().encode(texts, **options)


def test_a_text_longer_than_the_model_has_positions_is_named(make_encoder, tmp_path):
    from transformers import BertConfig, BertModel

    encoder = make_encoder()
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    config = BertConfig(vocab_size=len(encoder.tokenizer), max_position_embeddings=16, **shape)
    bert = Encoder(BertModel(config, add_pooling_layer=False), encoder.tokenizer)
    bert.max_length = 20
    with pytest.raises(EncoderError, match=r"a text of 20 tokens, and the model has positions for 16; lower"):
        bert.encode(["a text " * 40])
    bert.model.save_pretrained(tmp_path)
    encoder.tokenizer.save_pretrained(tmp_path)
    assert Encoder.from_pretrained(tmp_path).max_length == 16  # not BERT's 512
    encoder.max_length = 100
    with pytest.raises(EncoderError, match=r"positions for 32;"):  # XLM-R's table has 34: the first text is at 2
        encoder.encode(["a text " * 40])


def test_a_text_that_is_not_unicode_is_named(make_encoder):
    with pytest.raises(EncoderError, match=r"text 1 \('half \\ud83d'\) is not valid Unicode"):
        make_encoder().encode(["whole", "half \ud83d"])


def test_no_texts(make_encoder, tmp_path):
    encoder = make_encoder()
    for none in ([], iter([])):
        assert encoder.encode(none).shape == (0, 32)
    assert encoder.encode([], dimensions=8, out=tmp_path / "v.npy").shape == (0, 8)
    assert np.load(tmp_path / "v.npy").shape == (0, 8)
