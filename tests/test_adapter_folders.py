"""A LoRA adapter's folder gives the vectors of base and adapter, merged, or says what is missing; never the base's."""

import json
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from hbt_fast.encoder import Encoder, EncoderError
from hbt_fast.encoder.export import export
from hbt_fast.encoder.load import load_tokenizer
from hbt_fast.encoder.prompts import choose_prompts

peft = pytest.importorskip("peft")
from transformers import AutoModel, XLMRobertaForMaskedLM  # noqa: E402

TEXTS = ["en the red blue 7", "de which green", "x"]


@pytest.fixture
def base(make_encoder, tmp_path):
    encoder = make_encoder()
    encoder.pooling, encoder.prompts = "cls", {"query": "Q: ", "passage": "P: "}
    return export(encoder, tmp_path / "base")


@pytest.fixture
def make(base, tmp_path):
    """Trains (at random) and saves an adapter; returns its folder and the vectors of base and adapter, merged."""

    def made(model=None, tokens=(), **settings):
        model = AutoModel.from_pretrained(base) if model is None else model
        expected = Encoder.from_pretrained(base)
        if tokens:
            expected.tokenizer.add_tokens(list(tokens))
            expected.tokenizer.save_pretrained(tmp_path / "adapter")
            torch.manual_seed(2)
            model.resize_token_embeddings(len(expected.tokenizer))
        settings = {"r": 2, "target_modules": ["query", "value"], **settings}
        wrapped = peft.get_peft_model(model, peft.LoraConfig(**settings))
        torch.manual_seed(1)
        for name, weight in wrapped.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(weight, 0, 0.3)
        wrapped.save_pretrained(tmp_path / "adapter", save_embedding_layers=bool(tokens))
        merged = wrapped.merge_and_unload()
        expected.model.resize_token_embeddings(merged.get_input_embeddings().num_embeddings)
        whole = getattr(merged, "roberta", merged).state_dict()
        expected.model.load_state_dict({name: w for name, w in whole.items() if not name.startswith("pooler.")})
        return tmp_path / "adapter", expected.encode([*TEXTS, *tokens])

    return made


def rewrite(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def refused(folder, message):
    with pytest.raises(EncoderError, match=message):
        Encoder.from_pretrained(folder)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True, "lora_alpha": 3, "rank_pattern": {"value": 1}},
        {"use_dora": True},
        {"target_modules": "all-linear", "bias": "all"},
        {"layers_to_transform": [1], "task_type": "FEATURE_EXTRACTION", "init_lora_weights": "gaussian"},
    ],
    ids=str,
)
def test_an_adapter_is_merged_into_the_base_that_it_names(make, base, settings):
    folder, expected = make(**settings)
    encoder = Encoder.from_pretrained(folder)
    np.testing.assert_allclose(encoder.encode(TEXTS), expected, atol=1e-6)
    assert np.abs(encoder.encode(TEXTS) - Encoder.from_pretrained(base).encode(TEXTS)).max() > 1e-3
    assert all(p.requires_grad for p in encoder.parameters())  # it can be trained whole
    assert not any("lora" in name for name, _ in encoder.named_parameters())
    assert not encoder.training


def test_what_the_adapter_has_not_is_its_bases(make, base, tmp_path):
    folder, expected = make()
    encoder = Encoder.from_pretrained(folder)
    assert (encoder.pooling, encoder.prompts) == ("cls", {"query": "Q: ", "passage": "P: "})
    assert choose_prompts(str(folder), {}).texts == ("Q: ", "P: ")
    assert load_tokenizer(folder)(TEXTS) == load_tokenizer(base)(TEXTS)
    again = Encoder.from_pretrained(export(encoder, tmp_path / "again"))
    np.testing.assert_allclose(again.encode(TEXTS), expected, atol=1e-6)


def test_modules_beside_the_adapter_are_the_adapters(make, base):
    folder, expected = make()
    for file in ("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"):
        (folder / file).write_bytes((base / file).read_bytes())
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode": "mean"}')
    rewrite(folder / "config_sentence_transformers.json", prompts={"query": "other: ", "document": ""})
    encoder = Encoder.from_pretrained(folder)
    assert (encoder.pooling, encoder.prompts) == ("mean", {"query": "other: ", "passage": ""})
    encoder.pooling = "cls"
    np.testing.assert_allclose(encoder.encode(TEXTS), expected, atol=1e-6)


def test_tokens_that_came_with_the_adapter_have_its_embeddings(make):
    tokens = ("[A]", "[B]")
    folder, expected = make(tokens=tokens)
    encoder = Encoder.from_pretrained(folder)
    assert len(encoder.tokenizer("[A]", add_special_tokens=False)["input_ids"]) == 1
    np.testing.assert_allclose(encoder.encode([*TEXTS, *tokens]), expected, atol=1e-6)


def test_an_adapter_of_the_model_with_its_head_fits_the_encoder(make, base):
    folder, expected = make(XLMRobertaForMaskedLM.from_pretrained(base))
    assert any(".roberta." in name for name in load_file(folder / "adapter_model.safetensors"))
    np.testing.assert_allclose(Encoder.from_pretrained(folder).encode(TEXTS), expected, atol=1e-6)


@pytest.mark.parametrize("named", ["base", "../base", "./base"])
def test_a_base_may_be_named_from_here_or_from_the_adapters_folder(make, tmp_path, monkeypatch, named):
    folder, expected = make()
    rewrite(folder / "adapter_config.json", base_model_name_or_path=named)
    monkeypatch.chdir(tmp_path if named != "../base" else "/")
    np.testing.assert_allclose(Encoder.from_pretrained(folder).encode(TEXTS), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_model_name_or_path": None}, '"base_model_name_or_path" is missing; write the folder or hub name'),
        ({"base_model_name_or_path": "/no/such"}, '"base_model_name_or_path", which a LoRA .*: /no/such: no such fold'),
        ({"base_model_name_or_path": "some/base"}, "some/base: no such folder, and as a hub name it is not in the cac"),
        ({"base_model_name_or_path": 5}, '"base_model_name_or_path" is 5; it must be a text'),
        ({"peft_type": "IA3"}, '"peft_type" is "IA3"; LORA alone is read'),
        ({"init_lora_weights": "pissa"}, '"init_lora_weights" is "pissa", which changes the base; merge it with peft'),
        ({"layer_replication": [[0, 1]]}, '"layer_replication" is a list of 1 entries, which is not supported'),
        ({"megatron_config": {"a": 1}, "megatron_core": "os"}, '"megatron_co.*, which is not supported'),
        ({"target_modules": ["nothing"]}, "adapter_config.json: peft does not take it for this base"),
        ({"r": "many"}, "adapter_config.json: peft does not take it for this base"),
        ({"r": 3}, r"adapter_model.safetensors: 8 weights do not fit the base that .*lora_A.weight, .*, \.\.\.\)"),
        ({"target_modules": ["query"]}, r"4 weights do not fit the base"),
        ({"target_modules": ["query", "value", "key"]}, r"4 weights do not fit the base"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(make, changes, message):
    folder, _ = make()
    rewrite(folder / "adapter_config.json", **changes)
    refused(folder, message)


def test_an_adapter_of_an_adapter_and_a_model_beside_one_are_refused(make, base):
    folder, _ = make()
    rewrite(folder / "adapter_config.json", base_model_name_or_path=str(folder))
    with pytest.raises(EncoderError, match="is an adapter itself; merge that into its base first"):
        Encoder.from_pretrained(folder)
    (base / "adapter_config.json").write_bytes((folder / "adapter_config.json").read_bytes())
    refused(base, "an adapter .* and a whole model .* are in one folder, and which is meant cannot be told")


def test_only_safetensors_of_an_adapter_are_read_and_the_command_that_writes_them_is_said(make, monkeypatch):
    folder, expected = make()
    file = folder / "adapter_model.safetensors"
    torch.save(load_file(file), folder / "adapter_model.bin")
    file.unlink()
    with pytest.raises(EncoderError, match=r"no adapter_model.safetensors there, .*where you trust") as caught:
        Encoder.from_pretrained(folder)
    program, path = str(caught.value).split('python -c "')[1].split('" ')
    monkeypatch.setattr(sys, "argv", ["-c", path.strip("'")])
    exec(program, {})
    np.testing.assert_allclose(Encoder.from_pretrained(folder).encode(TEXTS), expected, atol=1e-6)
    (folder / "adapter_model.bin").unlink()
    file.unlink()
    refused(folder, "no adapter_model.safetensors there, and adapters in other files are not read; fetch it again")


def test_weights_of_an_adapter_that_are_not_finite_are_refused(make):
    folder, _ = make()
    weights = load_file(folder / "adapter_model.safetensors")
    next(iter(weights.values()))[0, 0] = float("nan")
    save_file(weights, folder / "adapter_model.safetensors", {"format": "pt"})
    refused(folder, "adapter_model.safetensors: .* holds NaN or infinity")


def test_without_peft_what_to_do_is_said(make, monkeypatch):
    folder, _ = make()
    monkeypatch.setitem(sys.modules, "peft", None)
    refused(folder, r'a LoRA adapter, and merging it into its base needs peft: pip install "peft>=0.17"; or merge it')
    load_tokenizer(folder)  # for which nothing has to be merged


def test_loading_an_adapter_draws_no_random_numbers(make):
    folder, _ = make()
    state = torch.get_rng_state()
    Encoder.from_pretrained(folder)
    assert torch.equal(torch.get_rng_state(), state)
