"""pytorch_model.bin and 0_Transformer give what newer layouts give, in every dtype; no pickle is run."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from hbt_fast.encoder import Encoder, EncoderError
from hbt_fast.encoder.export import export
from hbt_fast.encoder.load import load_tokenizer

TEXTS = ["en the red blue 7", "de which green", "x"]


@pytest.fixture
def folder(make_encoder, tmp_path):
    """An export with a Dense layer, and prompts."""
    encoder = make_encoder()
    torch.manual_seed(0)
    encoder.dense, encoder.prompts = nn.Sequential(nn.Linear(32, 8), nn.Tanh()), {"query": "Q: ", "passage": "P: "}
    return export(encoder, tmp_path / "model")


def to_pickle(folder, shards=1, **options):
    """The weights as transformers wrote them once."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    if shards == 1:
        torch.save(weights, folder / "pytorch_model.bin", **options)
        return
    files = {name: f"pytorch_model-{1 + i % shards:05}-of-{shards:05}.bin" for i, name in enumerate(names)}
    for file in set(files.values()):
        torch.save({name: weights[name] for name in names if files[name] == file}, folder / file, **options)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


def cast(file, dtype):
    save_file({name: w.to(dtype) for name, w in load_file(file).items()}, file, {"format": "pt"})


class Code:
    """Runs where it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("zipped", [True, False])  # False: as torch wrote before 1.6
def test_a_pickle_of_tensors_is_read(folder, shards, zipped):
    expected = Encoder.from_pretrained(folder).encode(TEXTS)
    to_pickle(folder, shards, _use_new_zipfile_serialization=zipped)
    np.testing.assert_array_equal(Encoder.from_pretrained(folder).encode(TEXTS), expected)


@pytest.mark.parametrize("where", ["pytorch_model.bin", "2_Dense/pytorch_model.bin"])
@pytest.mark.parametrize("what", ["code", "list", "damaged"])
def test_a_pickle_of_anything_else_is_refused_and_not_run(folder, tmp_path, where, what):
    file = folder / where
    (file.parent / "model.safetensors").unlink()
    torch.save({"weight": Code(tmp_path / "ran")} if what == "code" else [torch.zeros(2)], file)
    if what == "damaged":
        file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(EncoderError, match=rf"{where}: more than tensors is in it, or less, and no pickle is run here"):
        Encoder.from_pretrained(folder)
    assert not (tmp_path / "ran").exists()


def test_safetensors_come_before_a_pickle(folder, tmp_path):
    torch.save(Code(tmp_path / "ran"), folder / "pytorch_model.bin")
    Encoder.from_pretrained(folder)
    assert not (tmp_path / "ran").exists()


def test_shards_that_leave_the_folder_are_refused(folder):
    to_pickle(folder, 2)
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(index.read_text().replace("pytorch_model-00001", "../pytorch_model-00001"))
    with pytest.raises(EncoderError, match="leaves the checkpoint's folder"):
        Encoder.from_pretrained(folder)


def test_a_pickle_of_another_size_is_refused(folder):
    to_pickle(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 10**6}))
    with pytest.raises(EncoderError, match=r"config.json describes a model of .*, and its files of weights"):
        Encoder.from_pretrained(folder)


def older(folder, name="0_Transformer"):
    """As sentence-transformers 0.x to 2 laid a checkpoint out."""
    (folder / name).mkdir()
    for file in folder.iterdir():
        if file.is_file() and file.name not in ("modules.json", "config_sentence_transformers.json"):
            file.rename(folder / name / file.name)
    modules = json.loads((folder / "modules.json").read_text())
    modules[0]["path"] = name
    (folder / "modules.json").write_text(json.dumps(modules))


@pytest.mark.parametrize("pickled", [False, True])
def test_a_transformer_in_a_folder_of_its_own_is_found(folder, tmp_path, pickled):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 6, "do_lower_case": true}')
    expected = Encoder.from_pretrained(folder)
    if pickled:
        to_pickle(folder)
    older(folder)
    encoder = Encoder.from_pretrained(folder)
    assert (encoder.max_length, encoder.prompts) == (6, expected.prompts)
    texts = [text.upper() for text in TEXTS]
    np.testing.assert_array_equal(encoder.encode(texts), expected.encode(texts))
    theirs = sentence_transformers.SentenceTransformer(str(folder), device="cpu").encode(texts)
    np.testing.assert_allclose(encoder.encode(texts), theirs, atol=1e-6)
    assert load_tokenizer(folder)(TEXTS) == load_tokenizer(folder / "0_Transformer")(TEXTS)
    again = Encoder.from_pretrained(export(encoder, tmp_path / "again"))
    np.testing.assert_array_equal(again.encode(texts), expected.encode(texts))


def test_a_transformer_in_a_folder_of_its_own_is_found_in_the_hubs_cache(folder, tmp_path, monkeypatch):
    from huggingface_hub import constants

    expected = Encoder.from_pretrained(folder).encode(TEXTS)
    older(folder)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    repository = tmp_path / "cache" / "models--someone--encoder"
    shutil.copytree(folder, repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    np.testing.assert_array_equal(Encoder.from_pretrained("someone/encoder").encode(TEXTS), expected)


@pytest.mark.parametrize("inner", ["../model", "/etc", "0_Transformer/../.."])
def test_a_transformer_outside_of_the_folder_is_refused(folder, inner):
    older(folder)
    modules = (folder / "modules.json").read_text()
    (folder / "modules.json").write_text(modules.replace("0_Transformer", inner))
    with pytest.raises(EncoderError, match="leaves the checkpoint's folder"):
        Encoder.from_pretrained(folder)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("two", [False, True])  # modules: neither Dense nor Normalize
def test_every_dtype_is_read_as_float32(folder, dtype, pickled, two):
    files = [folder / "model.safetensors", *([] if two else [folder / "2_Dense" / "model.safetensors"])]
    if two:
        modules = json.loads((folder / "modules.json").read_text())
        (folder / "modules.json").write_text(json.dumps(modules[:2]))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": str(dtype).removeprefix("torch.")}))
    for file in files:
        cast(file, dtype)
    expected = Encoder.from_pretrained(folder).encode(TEXTS)
    for file in files:  # the same values in float32
        cast(file, torch.float32)
    np.testing.assert_array_equal(Encoder.from_pretrained(folder).encode(TEXTS), expected)
    for file in files:
        cast(file, dtype)
        if pickled:
            to_pickle(file.parent)
    encoder = Encoder.from_pretrained(folder)
    assert {p.dtype for p in encoder.parameters()} == {torch.float32}
    assert encoder.dimension == (32 if two else 8)
    np.testing.assert_array_equal(encoder.encode(TEXTS), expected)


def test_tokens_without_rows_are_named(folder):
    tokenizer = load_tokenizer(folder)
    rows = len(tokenizer)
    tokenizer.add_tokens([f"[T{i}]" for i in range(5)])
    tokenizer.save_pretrained(folder)
    said = rf"no rows for 5 of its tokenizer's tokens, '\[T0\]' \({rows}\), '\[T1\]' .*, \.\.\.: .*resize_token"
    with pytest.raises(EncoderError, match=said):
        load_tokenizer(folder)
