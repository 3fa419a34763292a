"""The exported ONNX graph gives the vectors of the encoder, for texts of any number and lengths."""

import builtins

import numpy as np
import pytest
import torch

from hbt_fast.encoder import Encoder, EncoderError
from hbt_fast.encoder import onnx as module
from hbt_fast.encoder.encoding import How, identity
from hbt_fast.encoder.onnx import export_onnx, in_8_bits

TEXTS = ["en the red blue 7", "de which green", "fr the old new big small " * 4, "x", "en which " * 200]


@pytest.fixture(params=["xlm-roberta", "bert"])
def encoder(request, make_encoder, tokenizer):
    if request.param == "xlm-roberta":
        return make_encoder()
    from transformers import BertConfig, BertModel

    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    tokens = {"vocab_size": len(tokenizer), "max_position_embeddings": 32, "pad_token_id": tokenizer.pad_token_id}
    config = BertConfig(**shape, **tokens)
    torch.manual_seed(0)
    return Encoder(BertModel(config, add_pooling_layer=False), tokenizer, max_length=32)


def vectors_of(path, tokenizer, texts=TEXTS):
    """What onnxruntime makes of the texts, pooled and normalised in numpy."""
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [i.name for i in session.get_inputs()] == ["input_ids", "attention_mask"]
    assert [o.name for o in session.get_outputs()] == ["last_hidden_state"]
    rows = tokenizer(texts, truncation=True, max_length=32, padding=True, return_tensors="np")
    inputs = {name: rows[name].astype(np.int64) for name in ("input_ids", "attention_mask")}
    (hidden_nLd,) = session.run(None, inputs)
    mask_nL1 = inputs["attention_mask"][..., None]
    mean_nd = (hidden_nLd * mask_nL1).sum(1) / mask_nL1.sum(1)
    return mean_nd / np.linalg.norm(mean_nd, axis=1, keepdims=True)


def test_the_graph_encodes_as_the_encoder_does(encoder, tmp_path):
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)
    attention, ours = encoder.model.config._attn_implementation, encoder.encode(TEXTS)
    full, small = export_onnx(encoder, tmp_path, int8=True)
    assert (full, small) == (tmp_path / "onnx" / "model.onnx", tmp_path / "onnx" / "model_qint8.onnx")
    np.testing.assert_allclose(vectors_of(full, encoder.tokenizer), ours, atol=1e-5)
    np.testing.assert_allclose(vectors_of(full, encoder.tokenizer, TEXTS[3:4]), ours[3:4], atol=1e-5)
    assert b"MatMulInteger" in small.read_bytes()
    cosines = (vectors_of(small, encoder.tokenizer) * ours).sum(1)
    assert cosines.min() > 0.99
    assert encoder.model.config._attn_implementation == attention
    assert encoder.training
    np.testing.assert_array_equal(encoder.encode(TEXTS), ours)


def test_large_weights_lie_beside_the_graph(make_encoder, tmp_path, monkeypatch):
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)
    monkeypatch.setattr(module, "ONE_FILE", 0)
    encoder = make_encoder()
    paths = export_onnx(encoder, tmp_path, int8=True)
    names = ["model.onnx", "model_qint8.onnx", "model.onnx.data", "model_qint8.onnx.data"]
    assert [p.name for p in paths] == names
    assert all(p.is_file() for p in paths)
    np.testing.assert_allclose(vectors_of(paths[0], encoder.tokenizer), encoder.encode(TEXTS), atol=1e-5)
    assert (vectors_of(paths[1], encoder.tokenizer) * encoder.encode(TEXTS)).sum(1).min() > 0.99


def test_an_encoder_in_8_bits_encodes_as_the_graph_does(make_encoder, tmp_path):
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)
    encoder = make_encoder()
    graph = vectors_of(export_onnx(encoder, tmp_path, int8=True)[1], encoder.tokenizer)
    ours, how = encoder.encode(TEXTS), How("", 8192, 32, "float32")
    before = identity(encoder, how)
    small = in_8_bits(encoder)
    assert identity(small, how)["weights"] != before["weights"]
    in_one_row_each = small.encode(TEXTS, batch_tokens=1)
    cosines = (in_one_row_each * ours).sum(1)
    assert cosines.min() > 0.99
    assert np.abs(in_one_row_each - ours).max() > 1e-4
    # a batch's activations share a scale, so that neighbours and padding move vectors a little
    assert (small.encode(TEXTS) * graph).sum(1).min() > 0.999
    with pytest.raises(EncoderError, match="in 8 bits runs in this process alone"):
        small.encode(TEXTS, devices=["cpu", "cpu"])


def test_a_model_that_cannot_be_exported_is_named(make_encoder, tmp_path):
    for name in ("onnx", "onnxscript"):
        pytest.importorskip(name)
    encoder = make_encoder()
    encoder.model.forward = lambda input_ids, attention_mask: input_ids[input_ids.sum() > 3 and 1]
    with pytest.raises(EncoderError, match="xlm-roberta cannot be exported as ONNX: "):
        export_onnx(encoder, tmp_path)


def test_a_package_that_is_missing_is_named(make_encoder, tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "onnxscript":
            raise ImportError(name=name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(EncoderError, match=r"(onnxscript|onnx) is not installed: pip install .hbt-fast\[onnx\]"):
        export_onnx(make_encoder(), tmp_path)
