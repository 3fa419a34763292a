"""A checkpoint of any encoder loads whole, without what is not used; one that cannot be used as it is is refused."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AlbertConfig,
    AlbertModel,
    AutoModel,
    BertConfig,
    BertModel,
    CamembertConfig,
    CamembertModel,
    MPNetConfig,
    MPNetModel,
    SqueezeBertConfig,
    SqueezeBertModel,
    T5Config,
    T5Model,
)

from hbt_fast.config import ModelConfig
from hbt_fast.encoder import Encoder, EncoderError
from hbt_fast.encoder.export import export
from hbt_fast.encoder.towers import LoraConfig, Towers, make_towers
from hbt_fast.engine.backends import TorchEngine, adamw

TEXTS = ["en the red blue 7", "de which green", "fr the old new big small", "x"]
SHAPE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
WITH_POOLER = {
    "bert": (BertConfig, BertModel, {}),
    "camembert": (CamembertConfig, CamembertModel, {}),
    "mpnet": (MPNetConfig, MPNetModel, {}),
    "albert": (AlbertConfig, AlbertModel, {"embedding_size": 16}),
    "squeezebert": (SqueezeBertConfig, SqueezeBertModel, {"embedding_size": 16}),  # which cannot do without one
}


@pytest.fixture
def save(tokenizer, tmp_path):
    """Writes a checkpoint with a pooler and 66 rows of positions."""

    def made(name: str):
        config, model, more = WITH_POOLER[name]
        torch.manual_seed(0)
        settings = {**SHAPE, **more, "vocab_size": len(tokenizer), "max_position_embeddings": 66, "pad_token_id": 1}
        model(config(**settings)).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        return tmp_path / name

    return made


def rewrite(file, **changes):
    """Change some entries of a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("name", WITH_POOLER)
def test_an_unused_pooler_is_dropped_and_training_can_be_resumed(save, name):
    encoder = Encoder.from_pretrained(save(name))
    assert [key for key, _ in encoder.named_parameters() if "pooler" in key] == []
    engine = TorchEngine(encoder, adamw(encoder, 1e-3, 0.01), 1.0)
    tokens, offsets = map(torch.from_numpy, encoder.tokenise(TEXTS))
    engine.backward(engine(tokens, offsets)[:, 0].sum(), True)
    engine.step()
    _, moments = engine.state()
    engine.restore(moments, 1)
    assert engine.updates == 1


def test_a_parameter_that_never_had_a_gradient_is_restored_without_moments():
    torch.manual_seed(0)
    used, unused = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    module = torch.nn.ModuleList([used, unused])
    engine = TorchEngine(module, adamw(module, 1e-3, 0.01), 1.0)
    engine.backward(used(torch.ones(1, 2)).sum(), True)
    engine.step()
    _, moments = engine.state()
    again = TorchEngine(module, adamw(module, 1e-3, 0.01), 1.0)
    again.restore(moments, 1)
    assert unused.weight not in again.optimizer.state
    assert torch.equal(again.optimizer.state[used.weight]["exp_avg"], moments["0.weight.exp_avg"])


@pytest.mark.parametrize("name", ["bert", "camembert", "mpnet", "albert"])
def test_adapters_are_not_put_on_a_pooler(save, tokenizer, name):
    pytest.importorskip("peft")
    settings = ModelConfig(path=str(save(name)), passage_max_length=64, lora=LoraConfig(rank=2))
    trained = [key for key, p in make_towers(settings, tokenizer).named_parameters() if p.requires_grad]
    assert trained
    assert [key for key in trained if "pooler" in key] == []


def test_a_checkpoint_that_lacks_weights_is_refused_and_they_are_named(save):
    folder = save("camembert")
    weights = load_file(folder / "model.safetensors")
    del weights["encoder.layer.1.output.dense.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(EncoderError, match=r"1 of the model's weights .*\(encoder\.layer\.1\.output\.dense\.weight\)"):
        Encoder.from_pretrained(folder)
    save_file({f"wrapper.{key}": w for key, w in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        EncoderError, match=r"of the model's weights are not in the checkpoint \(.*, \.\.\.\); fetch it"
    ):
        Encoder.from_pretrained(folder)


@pytest.mark.parametrize("name", WITH_POOLER)
def test_a_pooler_need_not_be_in_the_checkpoint(save, name):
    folder = save(name)
    whole = Encoder.from_pretrained(folder).encode(TEXTS)
    weights = {k: w for k, w in load_file(folder / "model.safetensors").items() if not k.startswith("pooler.")}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    np.testing.assert_array_equal(Encoder.from_pretrained(folder).encode(TEXTS), whole)


@pytest.mark.parametrize("name", WITH_POOLER)
def test_an_export_has_every_weight_that_automodel_looks_for(save, tmp_path, name):
    encoder = Encoder.from_pretrained(save(name))
    model, info = AutoModel.from_pretrained(export(encoder, tmp_path / "model"), output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert any("pooler" in key for key in model.state_dict())
    np.testing.assert_array_equal(Encoder.from_pretrained(tmp_path / "model").encode(TEXTS), encoder.encode(TEXTS))


def test_weights_that_are_not_used_are_said(save, capsys):
    folder = save("camembert")
    weights = load_file(folder / "model.safetensors")
    Encoder.from_pretrained(folder)
    assert "not used" not in capsys.readouterr().err  # of the pooler
    save_file(weights | {"lm_head.bias": torch.zeros(3)}, folder / "model.safetensors", {"format": "pt"})
    Encoder.from_pretrained(folder)
    assert "weights that are no part of an encoder and are not used: lm_head.bias" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("pointer", "its weights are no safetensors that can be read .* git without git-lfs; fetch it again"),
        ("truncated", "its weights are no safetensors that can be read .* fetch it again"),
        ("size", "its weights have other sizes than its config.json says; fetch both again"),
        ("config", "camembert/config.json: not valid JSON .*; fetch it again"),
        ("tokenizer", "its tokenizer .*tokenizer.json.* cannot be loaded .*; fetch it again"),
    ],
)
def test_a_damaged_checkpoint_is_to_be_fetched_again(save, damage, message):
    folder = save("camembert")
    weights = (folder / "model.safetensors").read_bytes()
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 12345\n"
    if damage == "size":
        rewrite(folder / "config.json", hidden_size=32)
    else:
        name, content = {
            "pointer": ("model.safetensors", pointer),
            "truncated": ("model.safetensors", weights[: len(weights) // 2]),
            "config": ("config.json", b"{"),
            "tokenizer": ("tokenizer.json", pointer),
        }[damage]
        (folder / name).write_bytes(content)
    with pytest.raises(EncoderError, match=message):
        Encoder.from_pretrained(folder)


def test_an_encoder_with_a_decoder_is_refused(tokenizer, tmp_path):
    size = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    T5Model(T5Config(vocab_size=len(tokenizer), **size)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(EncoderError, match="t5 has an encoder and a decoder, which is not supported; take"):
        Encoder.from_pretrained(tmp_path)


def test_code_of_a_checkpoint_is_never_run_nor_asked_about(save, tmp_path, monkeypatch):
    def answer(question):
        raise AssertionError(f"asked: {question}")

    folder = save("bert")
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: pass\n")
    monkeypatch.setattr("builtins.input", answer)
    rewrite(folder / "config.json", model_type="own", auto_map={"AutoConfig": "own.Own", "AutoModel": "own.Own"})
    with pytest.raises(EncoderError, match="its own Python code would have to be run, which hbt_fast never does"):
        Encoder.from_pretrained(folder)
    rewrite(folder / "config.json", model_type="bert")  # a type that transformers has is loaded from there
    rewrite(folder / "tokenizer_config.json", tokenizer_class="Own", auto_map={"AutoTokenizer": ["own.Own", "own.Own"]})
    Encoder.from_pretrained(folder)
    assert not (tmp_path / "ran").exists()


def test_dropout_that_is_a_whole_number_is_replaced_too(save):
    folder = save("bert")
    rewrite(folder / "config.json", hidden_dropout_prob=0, attention_probs_dropout_prob=0)
    assert Encoder.from_pretrained(folder, dropout=0.3).model.config.hidden_dropout_prob == 0.3


def test_a_folder_of_two_encoders_says_which_to_give(make_encoder, tmp_path):
    Towers([make_encoder(), make_encoder(1)]).export(tmp_path / "model")
    with pytest.raises(EncoderError, match=r"model holds two encoders; give .*model/query for queries or .*/passage"):
        Encoder.from_pretrained(tmp_path / "model")
    Encoder.from_pretrained(tmp_path / "model" / "query")


def test_the_folder_of_a_run_is_told_where_its_encoder_is(save, tmp_path):
    (tmp_path / "run").mkdir()
    save("bert").rename(tmp_path / "run" / "model")
    with pytest.raises(EncoderError, match=rf"give {tmp_path}/run/model, the encoder that it exported"):
        Encoder.from_pretrained(tmp_path / "run")
