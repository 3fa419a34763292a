"""A checkpoint that is wrong is refused at load, by file and field, and is never trained or encoded with in silence."""

import json
import os
import stat

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel, XLMRobertaModel

from hbt_fast.encoder import Encoder, EncoderError
from hbt_fast.encoder import export as exporting
from hbt_fast.encoder.export import export
from hbt_fast.encoder.load import load_tokenizer
from hbt_fast.encoder.towers import Towers

TEXTS = ["en the red blue 7", "de which green"]


@pytest.fixture
def folder(make_encoder, tmp_path):
    return export(make_encoder(), tmp_path / "model")


def rewrite(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def refused(folder, message):
    with pytest.raises(EncoderError, match=message):
        Encoder.from_pretrained(folder)


def test_a_folder_without_a_tokenizer_is_not_given_one_of_five_tokens(tokenizer, tmp_path):
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=300, **shape)).save_pretrained(tmp_path / "bert")
    said = r"bert: no tokenizer there \(tokenizer.json or vocab.txt\); copy the tokenizer"
    refused(tmp_path / "bert", said)
    tokenizer.save_pretrained(tmp_path / "bert")
    Encoder.from_pretrained(tmp_path / "bert")
    (tmp_path / "bert" / "tokenizer.json").unlink()
    with pytest.raises(EncoderError, match=r"no tokenizer there|cannot be loaded"):
        load_tokenizer(tmp_path / "bert")


def test_a_tokenizer_must_fit_the_table_of_embeddings(folder, make_encoder, tokenizer, tmp_path):
    encoder = Encoder.from_pretrained(folder)
    encoder.tokenizer.add_tokens(["added"])
    encoder.tokenizer.save_pretrained(folder)
    last = len(tokenizer)
    said = rf"tokenizer's tokens, 'added' \({last}\): \"vocab_size\" in config.json ends at {last - 1}"
    with pytest.raises(EncoderError, match=said):
        load_tokenizer(folder)  # before anything is tokenised with it
    rewrite(folder / "config.json", vocab_size="many")
    refused(folder, "config.json: transformers does not take it .*vocab_size")
    larger = make_encoder().model
    larger.resize_token_embeddings(last + 8)  # a larger table is fine
    larger.save_pretrained(folder)
    Encoder.from_pretrained(folder)


@pytest.mark.parametrize(
    ("special", "message"),
    [
        ({}, "its tokenizer .* cannot be loaded .*PanicException"),
        ({"ids": [99999]}, "puts the token 99,999 into texts"),
    ],
)
def test_tokens_that_encoding_adds_must_exist(folder, special, message):
    special = {"[ZZ]": {"id": "[ZZ]", "tokens": ["[ZZ]"], **special}} if special else {}
    parts = [{"SpecialToken": {"id": "[ZZ]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    added = {"type": "TemplateProcessing", "single": parts, "pair": parts[1:], "special_tokens": special}
    rewrite(folder / "tokenizer.json", post_processor=added)
    refused(folder, message)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_neither_loaded_nor_exported(folder, tmp_path, value):
    encoder = Encoder.from_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    weights["embeddings.word_embeddings.weight"][3, 5] = value
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    refused(folder, "model: embeddings.word_embeddings.weight holds NaN or infinity")
    with torch.no_grad():
        encoder.model.embeddings.word_embeddings.weight[3, 5] = value
    before = (folder / "model.safetensors").read_bytes()
    for write in (lambda: export(encoder, folder), lambda: Towers([encoder]).export(folder)):
        with pytest.raises(EncoderError, match=r"exported: model.embeddings.word_embeddings.weight holds NaN"):
            write()
    state = dict(encoder.named_parameters())
    with pytest.raises(EncoderError, match="holds NaN"):
        export(Encoder.from_pretrained(export(encoder_like(encoder), tmp_path / "other")), tmp_path / "new", state)
    assert not (tmp_path / "new").exists()
    assert (folder / "model.safetensors").read_bytes() == before


def encoder_like(encoder):
    """An encoder of the same shape, with finite weights."""
    torch.manual_seed(0)
    return Encoder(XLMRobertaModel(encoder.model.config, add_pooling_layer=False), encoder.tokenizer, max_length=32)


def test_a_vector_that_is_not_finite_is_an_error_that_names_the_text(make_encoder, tmp_path):
    encoder = make_encoder()
    token = encoder.tokenizer("red", add_special_tokens=False)["input_ids"][-1]
    with torch.no_grad():
        encoder.model.embeddings.word_embeddings.weight[token] = float("nan")
    texts = ["de which green"] * 5000 + ["en the red blue 7"]
    for out in (None, tmp_path / "v.npy"):
        with pytest.raises(EncoderError, match=r"vector of text 5000 \('en the red blue 7'\) holds NaN or infinity"):
            encoder.encode(texts, out=out)
    assert not (tmp_path / "v.npy").exists()


def test_what_a_config_asks_for_besides_an_architecture_is_not_done(folder):
    expected = Encoder.from_pretrained(folder).encode(TEXTS)
    rewrite(
        folder / "config.json",
        attn_implementation="someone/kernel",
        _attn_implementation="someone/kernel",
        quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True},
        transformers_weights="other.safetensors",
    )
    encoder = Encoder.from_pretrained(folder)
    np.testing.assert_array_equal(encoder.encode(TEXTS), expected)
    assert not hasattr(encoder.model.config, "quantization_config")
    assert encoder.model.config._attn_implementation in ("sdpa", "hbt_packed")


def test_quantised_weights_are_not_taken_for_weights(folder):
    weights = load_file(folder / "model.safetensors")
    name = "encoder.layer.0.output.dense.weight"
    weights[name] = weights[name].to(torch.float8_e4m3fn)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    refused(folder, rf"model.safetensors: {name} is quantised \(of type F8_E4M3\), which is not supported")


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("config.json", {"hidden_size": "x"}, "model/config.json: .*hidden_size"),
        ("config.json", {"hidden_size": 10**12}, '"hidden_size" is 1000000000000, and no model has more'),
        ("config.json", {"intermediate_size": 10**9}, "a model of .* parameters, and its files of weights hold"),
        (
            "config.json",
            {"num_hidden_layers": 10**6},
            '"num_hidden_layers" is 1000000, and no model has more than 1,024',
        ),
        ("config.json", {"num_labels": 10**9}, '"num_labels" is 1000000000, and no model has more than'),
        ("config.json", {"vocab_size": -5}, '"vocab_size" is -5; it must be a whole number from 1 on'),
        ("config.json", {"layer_norm_eps": float("nan")}, '"layer_norm_eps" is nan; it must be a finite number'),
        ("config.json", {"num_attention_heads": 0}, "config.json"),
        ("config.json", {"max_position_embeddings": 2}, "model has a table of|other sizes"),
        ("tokenizer_config.json", {"model_max_length": "x"}, 'g.json: "model_max_length" is "x"; it must be a number'),
        ("sentence_bert_config.json", {"max_seq_length": "x"}, 'g.json: "max_seq_length" is "x"; it must be a whole'),
        ("sentence_bert_config.json", {"max_seq_length": 0}, '"max_seq_length" is 0; it must be a whole number'),
        ("sentence_bert_config.json", {"max_seq_length": True}, '"max_seq_length" is true; it must be a whole'),
        ("sentence_bert_config.json", {"do_lower_case": "no"}, '"do_lower_case" is "no"; it must be true or false'),
        ("config_sentence_transformers.json", {"prompts": {"query": 5}}, '"prompts": "query" is 5; it must be a text'),
        ("config_sentence_transformers.json", {"prompts": ["q"]}, '"prompts" is a list of 1 entries; it must be an'),
        ("config_sentence_transformers.json", {"default_prompt_name": "x"}, '"default_prompt_name" is "x", and'),
        ("1_Pooling/config.json", {"pooling_mode_cls_token": "no"}, '"pooling_mode_cls_token" is "no"; it must be'),
        ("1_Pooling/config.json", {"pooling_mode": {"a": 1}}, "1_Pooling/config.json: a pooling that is not sup"),
    ],
)
def test_a_wrong_value_is_named_by_file_and_field(folder, file, changes, message):
    rewrite(folder / file, **changes)
    refused(folder, message)


def test_a_length_without_a_limit_is_no_limit(folder, capsys):
    rewrite(folder / "sentence_bert_config.json", max_seq_length=10**30)
    assert Encoder.from_pretrained(folder).max_length == 32
    assert "length limit" not in capsys.readouterr().err


@pytest.mark.parametrize("path", ["../1_Pooling", "/etc", "1_Pooling/../../x", "..\\x"])
def test_paths_that_leave_the_folder_are_refused(folder, path):
    modules = json.loads((folder / "modules.json").read_text())
    modules[1]["path"] = path
    (folder / "modules.json").write_text(json.dumps(modules))
    refused(folder, "model: the path .* leaves the checkpoint's folder; files elsewhere are not read")


def test_paths_of_weights_that_leave_the_folder_are_refused(folder):
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
    index = {"metadata": {}, "weight_map": {"embeddings.word_embeddings.weight": "../outside.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(folder, r"the path \"../outside.safetensors/?\" leaves the checkpoint's folder")


def test_an_adapter_is_said_to_be_one(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "some/base"}))
    refused(tmp_path, '"base_model_name_or_path", which a LoRA adapter is nothing without, .*: some/base: no such')


def test_an_export_is_whole_and_has_the_modes_of_the_umask(folder, make_encoder, monkeypatch):
    mask = os.umask(0o027)
    try:
        export(make_encoder(1), folder)
    finally:
        os.umask(mask)
    assert {stat.S_IMODE(p.stat().st_mode) for p in folder.rglob("*") if p.is_file()} == {0o640}
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}

    def killed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(exporting.json, "dumps", killed)  # the weights are written by then
    with pytest.raises(KeyboardInterrupt):
        export(make_encoder(2), folder)
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
    assert [p.name for p in folder.parent.iterdir()] == ["model"]


def test_an_export_replaces_nothing_but_an_export(make_encoder, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(EncoderError, match="is there and no earlier export, which alone is replaced; name another"):
        export(make_encoder(), tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
