"""No text is longer than the model has positions: limits are cut down to these and said, or refused before a step."""

import json

import pytest
import torch
from transformers import (
    AlbertConfig,
    AlbertModel,
    BertConfig,
    BertModel,
    CamembertConfig,
    CamembertModel,
    MPNetConfig,
    MPNetModel,
)

from hbt_fast.config import ModelConfig
from hbt_fast.encoder import Encoder, EncoderError
from hbt_fast.encoder.export import export
from hbt_fast.encoder.model import room
from hbt_fast.encoder.scratch import ScratchConfig
from hbt_fast.encoder.towers import make_towers

LONG = "en the red blue 7 " * 60
SHAPE = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
TYPES = {  # and tokens for which 66 rows are positions: those of padding, and before it, hold no text
    "bert": (BertConfig, BertModel, {}, 66),
    "albert": (AlbertConfig, AlbertModel, {"embedding_size": 16}, 66),
    "camembert": (CamembertConfig, CamembertModel, {}, 64),
    "mpnet": (MPNetConfig, MPNetModel, {}, 64),
}


@pytest.fixture
def save(tokenizer, tmp_path):
    """Writes a checkpoint with 66 rows of positions."""

    def made(name: str):
        config, model, more, _ = TYPES[name]
        torch.manual_seed(0)
        settings = {**SHAPE, **more, "vocab_size": len(tokenizer), "max_position_embeddings": 66, "pad_token_id": 1}
        model(config(**settings)).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        return tmp_path / name

    return made


@pytest.mark.parametrize("name", TYPES)
def test_the_limit_is_what_the_model_has_room_for(save, name, capsys):
    encoder = Encoder.from_pretrained(save(name))
    assert encoder.max_length == room(encoder.model) == TYPES[name][3]
    assert "length limit" not in capsys.readouterr().err
    assert encoder.encode([LONG, "x"]).shape == (2, 16)
    encoder.max_length += 1
    with pytest.raises(EncoderError, match="the model has positions for"):
        encoder.encode([LONG])


def test_a_limit_beyond_the_positions_is_cut_and_said_and_exported_so(save, tmp_path, capsys):
    folder = save("camembert")
    encoder = Encoder.from_pretrained(folder, max_length=512)
    assert "is 512, and the model has positions for 64: texts are cut off there" in capsys.readouterr().err
    exported = export(encoder, tmp_path / "exported")
    recorded = exported / "sentence_bert_config.json"
    assert json.loads(recorded.read_text())["max_seq_length"] == 64
    recorded.write_text(json.dumps({"max_seq_length": 500}))  # as a folder of another program may say
    again = Encoder.from_pretrained(exported)
    assert "is 500, and the model has positions for 64" in capsys.readouterr().err
    assert again.max_length == Encoder(encoder.model, encoder.tokenizer).max_length == 64


@pytest.mark.parametrize("setting", ["query_max_length", "passage_max_length"])
def test_longer_texts_of_training_are_refused_before_a_step(save, tokenizer, setting):
    limits = {"query_max_length": 64, "passage_max_length": 64}
    path = str(save("mpnet"))
    assert make_towers(ModelConfig(path=path, **limits), tokenizer).queries.max_length == 64
    with pytest.raises(EncoderError, match=rf"model.{setting} is 65, and the model has positions for 64; write 64 or"):
        make_towers(ModelConfig(path=path, **{**limits, setting: 65}), tokenizer)


def test_longer_texts_than_an_encoder_from_nothing_shall_take_are_refused(tokenizer):
    settings = ModelConfig(scratch=ScratchConfig(300, 16, 1, 2), max_length=128)
    with pytest.raises(EncoderError, match=r"model.passage_max_length is 256, .* model.max_length, which can be"):
        make_towers(settings, tokenizer)


def test_an_encoder_in_8_bits_has_the_same_room(save):
    for package in ("onnxruntime", "onnxscript"):
        pytest.importorskip(package)
    from hbt_fast.encoder.onnx import in_8_bits

    encoder = in_8_bits(Encoder.from_pretrained(save("camembert")))
    encoder.max_length = 65
    with pytest.raises(EncoderError, match="a text of 65 tokens, and the model has positions for 64"):
        encoder.encode([LONG])


def test_gradient_checkpointing_is_refused_where_transformers_has_none(save, tokenizer):
    settings = ModelConfig(path=str(save("mpnet")), passage_max_length=64, gradient_checkpointing=True)
    with pytest.raises(EncoderError, match=r"model.gradient_checkpointing: transformers' mpnet does not support it"):
        make_towers(settings, tokenizer)
