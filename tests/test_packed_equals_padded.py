"""Texts that lie one after the other, without padding, give what padded rows give: vectors, gradients, dropout."""

import copy
import sys

import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    ModernBertConfig,
    ModernBertModel,
    Qwen3Config,
    Qwen3Model,
    XLMRobertaConfig,
    XLMRobertaModel,
)

from hbt_fast.encoder import Encoder, packed
from hbt_fast.encoder.packed import Sequences, packed_attention
from hbt_fast.encoder.pooling import POOLINGS, pool

LENGTHS = [50, 33, 33, 20, 9, 9, 9, 5, 3, 1, 9]  # together more than there are positions
SHAPE = {"vocab_size": 200, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
         "intermediate_size": 128}  # fmt: skip
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
QWEN = {**SHAPE, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64, "pad_token_id": 0}
MODELS = {
    "XLM-R": lambda: XLMRobertaModel(
        XLMRobertaConfig(**SHAPE, **DROPOUT, max_position_embeddings=66, pad_token_id=1, type_vocab_size=1),
        add_pooling_layer=False,
    ),
    "BERT": lambda: BertModel(BertConfig(**SHAPE, **DROPOUT, max_position_embeddings=64), add_pooling_layer=False),
    "ModernBERT": lambda: ModernBertModel(
        ModernBertConfig(
            **SHAPE, **SPECIAL, local_attention=8, global_attn_every_n_layers=2, max_position_embeddings=64
        )
    ),
    "Qwen3": lambda: Qwen3Model(Qwen3Config(**QWEN)),
    "Qwen3 with a window": lambda: Qwen3Model(
        Qwen3Config(**QWEN, use_sliding_window=True, sliding_window=6, max_window_layers=1)
    ),
}


def made(name: str, pooling: str = "mean") -> tuple[Encoder, Encoder]:
    """An encoder that packs, and the same in transformers' own way, with padding."""
    torch.manual_seed(0)
    model = MODELS[name]()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1 if p.ndim > 1 else 0.3)
    stock = copy.deepcopy(model)
    padding, packing = Encoder(stock, None, pooling=pooling), Encoder(model, None, pooling=pooling)
    padding.packs = False
    stock.set_attn_implementation("eager")
    assert packing.packs
    return packing.eval(), padding.eval()


def texts(lengths=LENGTHS) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(3, 200, (sum(lengths),), generator=torch.Generator().manual_seed(1))
    return tokens, torch.tensor([0, *lengths]).cumsum(0)


def gradients(encoder: Encoder, weights: torch.Tensor) -> torch.Tensor:
    encoder.zero_grad()
    (encoder(*texts()) * weights).sum().backward()
    return torch.cat([p.grad.flatten() for p in encoder.parameters() if p.grad is not None])


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("name", MODELS)
def test_vectors_and_all_gradients_are_those_of_padded_rows(name, pooling):
    packing, padding = made(name, pooling)
    out, truth = packing(*texts()), padding(*texts())
    assert (out - truth).abs().max() < 1e-5
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    ours, theirs = gradients(packing, weights), gradients(padding, weights)
    assert (ours - theirs).norm() < 1e-5 * theirs.norm()
    assert theirs.norm() > 1e-3


@pytest.mark.parametrize("name", MODELS)
def test_a_text_does_not_see_its_neighbours(name):
    packing, _ = made(name)
    tokens, cu_seqlens = texts()
    whole = packing(tokens, cu_seqlens)
    for i, text in enumerate(tokens.split(LENGTHS)):
        alone = packing(text, torch.tensor([0, len(text)]))
        assert (whole[i] - alone[0]).abs().max() < 1e-5


@pytest.mark.parametrize("name", MODELS)
def test_bf16_is_as_near_to_float32_as_padded_rows_are(name):
    packing, padding = made(name)
    truth = padding(*texts())
    packing.autocast = padding.autocast = torch.bfloat16
    ours, theirs = ((encoder(*texts()) - truth).norm() for encoder in (packing, padding))
    assert ours < 1.5 * theirs
    assert theirs > 1e-4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MODELS)
def test_a_gpu_in_half_precision_is_as_near_to_float32_as_padded_rows_are(name, dtype):
    packing, padding = made(name)
    tokens, cu_seqlens = texts()
    weights = torch.randn(len(LENGTHS), 64, generator=torch.Generator().manual_seed(2))

    def both(encoder, device):
        encoder.zero_grad()
        out = encoder(tokens.to(device), cu_seqlens)
        (out * weights.to(device)).sum().backward()
        return out.detach().cpu(), torch.cat(
            [p.grad.flatten().cpu() for p in encoder.parameters() if p.grad is not None]
        )

    truth = both(padding, "cpu")
    packing.autocast = padding.autocast = dtype
    ours, again, theirs = (both(encoder.cuda(), "cuda") for encoder in (packing, packing, padding))
    for exact, one, _again, other in zip(truth, ours, again, theirs, strict=True):
        assert (one - exact).norm() < 1.5 * (other - exact).norm()
        assert (other - exact).norm() > 1e-5 * exact.norm()
    assert torch.equal(ours[0], again[0])


@pytest.mark.parametrize("name", ["XLM-R", "BERT", "ModernBERT"])
def test_padded_rows_go_through_the_same_model_as_ever(name):
    packing, padding = made(name)
    packing.packs = False
    assert (packing(*texts()) - padding(*texts())).abs().max() < 1e-5


def test_a_model_that_was_put_in_later_or_has_another_attention_is_padded():
    packing, padding = made("XLM-R")
    truth = padding(*texts())
    packing.model = copy.deepcopy(padding.model)
    assert (packing(*texts()) - truth).abs().max() < 1e-5
    packing, _ = made("XLM-R")
    packing.model.set_attn_implementation("sdpa")
    assert (packing(*texts()) - truth).abs().max() < 1e-5


@pytest.mark.parametrize("name", MODELS)
def test_autocast_gives_attention_one_dtype(name, monkeypatch):
    seen = []
    dense = packed._dense
    monkeypatch.setattr(packed, "_dense", lambda *qkv: seen.append({x.dtype for x in qkv[:3]}) or dense(*qkv))
    packing, _ = made(name)
    packing.autocast = torch.bfloat16
    packing(*texts())
    assert seen
    assert all(dtypes == {torch.bfloat16} for dtypes in seen)  # or a GPU would take the way of float32


@pytest.mark.parametrize(("capability", "taken"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_attention_of_all_texts_at_once_is_left_to_gpus_that_have_it(monkeypatch, capability, taken):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    gpu = torch.device("cuda", 0)
    assert packed._takes_varlen(gpu, torch.bfloat16) == packed._takes_varlen(gpu, torch.float16) == taken
    assert not packed._takes_varlen(gpu, torch.float32)
    assert not packed._takes_varlen(torch.device("cpu"), torch.bfloat16)


def test_a_flash_attn_that_cannot_be_imported_is_not_used(tmp_path, monkeypatch):
    (tmp_path / "flash_attn.py").write_text("raise ImportError('undefined symbol: _ZN3c10')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    packed._flash_attn.cache_clear()
    try:
        assert packed._flash_attn() is None
    finally:
        packed._flash_attn.cache_clear()


@pytest.mark.parametrize("padding", [None, -1])
def test_a_model_without_a_padding_token_takes_padded_rows(padding):
    packing, _ = made("Qwen3")
    truth = packing(*texts())
    packing.packs, packing.model.config.pad_token_id = False, padding
    assert (packing(*texts()) - truth).abs().max() < 1e-5


def test_dropout_of_attention_is_drawn_for_every_text():
    generator = torch.Generator().manual_seed(0)
    lengths, heads, size, p = [6] * 400 + [3] * 400, 2, 4, 0.25
    query, key = (torch.randn(1, heads, sum(lengths), size, generator=generator) for _ in range(2))
    value = torch.ones(1, heads, sum(lengths), size)
    sequences = Sequences.of(torch.tensor([0, *lengths]).cumsum(0), query.device)
    torch.manual_seed(3)
    out, _ = packed_attention(torch.nn.Module(), query, key, value, None, dropout=p, sequences=sequences)
    whole, _ = packed_attention(torch.nn.Module(), query, key, value, None, sequences=sequences)
    torch.testing.assert_close(whole, torch.ones_like(whole))
    assert float(out.mean()) == pytest.approx(1, abs=0.02)  # what is kept is scaled up
    first, last = out[0, :6].clone(), out[0, 6:12].clone()
    assert not torch.equal(first, last)
    three = out[0, 2400:].reshape(400, 3, heads, size)[..., 0]
    assert float((three == 0).float().mean()) == pytest.approx(p**3, abs=0.01)  # all three tokens dropped


def test_an_architecture_that_is_not_known_is_padded_and_said(capsys):
    shape = {"vocab_size": 200, "dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128, "dropout": 0.0}
    encoder = Encoder(DistilBertModel(DistilBertConfig(**shape, attention_dropout=0.0)), None).eval()
    assert not encoder.packs
    assert "distilbert is not known to run without padding" in capsys.readouterr().err
    tokens, cu_seqlens = texts()
    whole = encoder(tokens, cu_seqlens)
    for i, text in enumerate(tokens.split(LENGTHS)):
        alone = encoder.model(text[None]).last_hidden_state[0].mean(0)
        assert (whole[i] - alone / alone.norm()).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pooling_is_its_definition(dtype):
    lengths = [4, 1, 7]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    text_T = torch.arange(3).repeat_interleave(torch.tensor(lengths))
    hidden = torch.randn(12, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    parts = hidden.double().split(lengths)
    position = [torch.arange(1, n + 1).double()[:, None] for n in lengths]
    truth = {
        "mean": torch.stack([x.mean(0) for x in parts]),
        "cls": torch.stack([x[0] for x in parts]),
        "last": torch.stack([x[-1] for x in parts]),
        "weighted_mean": torch.stack([(x * w).sum(0) / w.sum() for x, w in zip(parts, position, strict=True)]),
    }
    for how in POOLINGS:
        out = pool(hidden, cu_seqlens, text_T, how)
        assert out.dtype == torch.float32
        torch.testing.assert_close(out.double(), truth[how], rtol=1e-5, atol=1e-6)
    exact = hidden.double().requires_grad_()
    for how in POOLINGS:
        assert torch.autograd.gradcheck(lambda x, how=how: pool(x, cu_seqlens, text_T, how), exact)
