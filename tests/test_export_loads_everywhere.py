"""The exported folder: AutoModel and SentenceTransformer load it and give the embeddings of training."""

import json
import logging

import numpy as np
import pytest
import torch

from hbt_fast.config import ModelConfig
from hbt_fast.encoder import Encoder, EncoderError
from hbt_fast.encoder.export import export
from hbt_fast.encoder.towers import LoraConfig, make_towers

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
    assert ours == plain | {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 32}
    again = Encoder.from_pretrained(tmp_path / "m").tokenizer
    assert type(again) is type(encoder.tokenizer)
    assert again(TEXTS) == encoder.tokenizer(TEXTS)


@pytest.fixture
def warnings():
    """What transformers says while a checkpoint is loaded."""
    records = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: records.append(record.getMessage())
    logging.getLogger("transformers").addHandler(handler)
    yield records
    logging.getLogger("transformers").removeHandler(handler)


def test_nobody_is_told_of_weights_that_are_missing_or_not_used(make_encoder, tmp_path, warnings, capsys):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from transformers import AutoModel

    folder = str(export(make_encoder(), tmp_path / "model"))
    model, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not model.pooler.dense.weight.any()  # nothing that looks like a vector comes from it
    sentence_transformers.SentenceTransformer(folder, device="cpu")
    Encoder.from_pretrained(folder)
    assert warnings == []
    assert "not used" not in capsys.readouterr().err


@pytest.mark.parametrize("recorded", [512, 16, 10**30])
def test_transformers_cuts_a_long_text_off_where_the_model_ends(make_encoder, tmp_path, recorded):
    from transformers import AutoModel, AutoTokenizer

    encoder = make_encoder()
    before, encoder.tokenizer.model_max_length = encoder.tokenizer.model_max_length, recorded
    try:
        folder = export(encoder, tmp_path / "model")
    finally:
        encoder.tokenizer.model_max_length = before  # all tests have this one
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.model_max_length == 32
    inputs = tokenizer(["red " * 500], truncation=True, return_tensors="pt")
    assert AutoModel.from_pretrained(folder)(**inputs).last_hidden_state.isfinite().all()


def test_a_limit_below_the_models_stays(make_encoder, tmp_path):
    encoder = make_encoder()
    encoder.max_length = 24
    assert json.loads((export(encoder, tmp_path / "m") / "tokenizer_config.json").read_text())["model_max_length"] == 32


def test_what_a_tokenizer_was_last_called_with_is_not_exported(make_encoder, tmp_path):
    encoder = make_encoder()
    encoder.encode(TEXTS)
    encoder.tokenizer(TEXTS, truncation=True, max_length=7, padding="max_length")
    again = Encoder.from_pretrained(export(encoder, tmp_path / "m"))
    again.encode(TEXTS)
    first, second = tmp_path / "m", export(again, tmp_path / "again")
    core = json.loads((first / "tokenizer.json").read_text())
    assert core["truncation"] is core["padding"] is None
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


@pytest.mark.parametrize("lora", [False, True])
def test_no_file_of_an_export_says_where_the_base_was(make_encoder, tmp_path, lora):
    base = export(make_encoder(), tmp_path / "private" / "base")
    if lora:
        pytest.importorskip("peft")
    settings = ModelConfig(path=str(base), passage_max_length=32, query_max_length=32, lora=LoraConfig(rank=2 * lora))
    (folder,) = make_towers(settings, make_encoder().tokenizer).export(tmp_path / "model")
    files = [p for p in folder.rglob("*") if p.is_file()]
    assert len(files) > 6
    assert [p.name for p in files if b"private" in p.read_bytes()] == []
    if lora:
        assert json.loads((folder / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == "base"


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
