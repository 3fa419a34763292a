"""The exported folder: AutoModel and SentenceTransformer load it and give the embeddings of training."""

import json

import numpy as np
import pytest
import torch

from hbt_fast.encoder import Encoder, EncoderError
from hbt_fast.encoder.export import export

TEXTS = ["en the red blue 7", "de which green", "fr the old new big small", "x"]


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_sentence_transformers_and_automodel_encode_the_same(make_encoder, tmp_path, pooling):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from transformers import AutoModel, AutoTokenizer

    encoder = make_encoder()
    encoder.pooling, encoder.prompts = pooling, {"query": "Q: ", "passage": "P: "}
    ours = encoder.encode(TEXTS, "Q: ")
    folder = str(export(encoder, tmp_path / "model"))

    theirs = sentence_transformers.SentenceTransformer(folder, device="cpu")
    np.testing.assert_allclose(theirs.encode(TEXTS, prompt_name="query"), ours, atol=2e-6)
    np.testing.assert_allclose(theirs.encode_document(TEXTS), encoder.encode(TEXTS, "P: "), atol=2e-6)

    inputs = AutoTokenizer.from_pretrained(folder)(["Q: " + t for t in TEXTS], padding=True, return_tensors="pt")
    hidden = AutoModel.from_pretrained(folder).eval()(**inputs).last_hidden_state
    mask = inputs["attention_mask"][..., None]
    pooled = hidden[:, 0] if pooling == "cls" else (hidden * mask).sum(1) / mask.sum(1)
    np.testing.assert_allclose(torch.nn.functional.normalize(pooled, dim=-1).detach(), ours, atol=2e-6)

    again = Encoder.from_pretrained(folder)
    assert (again.pooling, again.prompts, again.max_length) == (pooling, encoder.prompts, encoder.max_length)
    np.testing.assert_array_equal(again.encode(TEXTS, "Q: "), ours)
    assert not [p for p in (tmp_path / "model").rglob("*") if p.suffix in (".bin", ".pt", ".pkl", ".py")]


def test_encoding_does_not_depend_on_the_company(make_encoder):
    encoder = make_encoder()
    together = encoder.encode(TEXTS, "Query: ")
    for budget in (1, 16, 10**6):
        np.testing.assert_allclose(encoder.encode(TEXTS, "Query: ", batch_tokens=budget), together, atol=1e-6)
    np.testing.assert_allclose(encoder.encode(TEXTS[::-1], "Query: ")[::-1], together, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-6)
    assert encoder.encode([]).shape == (0, 32)
    assert encoder.training  # left as it was


def test_a_text_longer_than_the_limit_is_cut(make_encoder):
    encoder = make_encoder()
    long, longer = "red " * 500, "red " * 900
    np.testing.assert_array_equal(encoder.encode([long]), encoder.encode([longer]))


def test_encoding_does_not_turn_dropout_on(make_encoder, tmp_path):
    encoder = Encoder.from_pretrained(export(make_encoder(dropout=0.5), tmp_path / "m"))
    encoder.encode(TEXTS)
    inputs = [torch.from_numpy(part) for part in encoder.tokenise(TEXTS)]
    assert torch.equal(encoder(*inputs), encoder(*inputs))
    assert not any(module.training for module in encoder.modules())
    assert all(module.training for module in make_encoder().modules())  # one from nothing is there to be trained


def test_a_checkpoint_in_half_precision_trains_in_float32(make_encoder, tmp_path):
    encoder = make_encoder()
    encoder.model.half()
    export(encoder, tmp_path / "half")
    assert {p.dtype for p in Encoder.from_pretrained(tmp_path / "half").parameters()} == {torch.float32}


def test_the_tokenizer_is_named_as_transformers_4_knows_it(make_encoder, tmp_path):
    encoder = make_encoder()
    encoder.tokenizer.save_pretrained(tmp_path / "plain")
    export(encoder, tmp_path / "m")
    plain, ours = (json.loads((tmp_path / name / "tokenizer_config.json").read_text()) for name in ("plain", "m"))
    assert ours == plain | {"tokenizer_class": "PreTrainedTokenizerFast"}
    again = Encoder.from_pretrained(tmp_path / "m").tokenizer
    assert type(again) is type(encoder.tokenizer)
    assert again(TEXTS) == encoder.tokenizer(TEXTS)


def test_dropout_can_be_replaced(make_encoder, tmp_path):
    export(make_encoder(), tmp_path / "m")
    config = Encoder.from_pretrained(tmp_path / "m", dropout=0.0).model.config
    assert config.hidden_dropout_prob == config.attention_probs_dropout_prob == 0.0


def test_what_cannot_be_loaded_is_said(make_encoder, tmp_path):
    with pytest.raises(EncoderError, match="no such folder"):
        Encoder.from_pretrained("/nowhere/model")
    (tmp_path / "empty").mkdir()
    with pytest.raises(EncoderError, match="not a checkpoint that can be loaded"):
        Encoder.from_pretrained(str(tmp_path / "empty"))
    export(make_encoder(), tmp_path / "m")
    path = tmp_path / "m" / "1_Pooling" / "config.json"
    path.write_text(json.dumps({"pooling_mode_max_tokens": True}))
    with pytest.raises(EncoderError, match="a pooling that is not supported"):
        Encoder.from_pretrained(str(tmp_path / "m"))
