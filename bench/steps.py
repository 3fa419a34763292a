"""What the benchmarks of whole steps share: their texts, our step, the steps of others, and the products in them."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hbt_fast.config import BatchConfig, Config, TrainConfig
from hbt_fast.data.build import build_source
from hbt_fast.data.rows import Row
from hbt_fast.data.store import Role, Store
from hbt_fast.encoder import Encoder
from hbt_fast.encoder.towers import Towers
from hbt_fast.engine.launch import World, make_engine
from hbt_fast.engine.step import Stepper
from hbt_fast.train import make_feed, make_planner

QUESTION, PASSAGE = (14, 0.35, 6, 40), (150, 0.4, 30, 384)  # tokens: median, spread of the logarithm, least, most
WORDS = [a + b for a in "bcdfghjklmnp" for b in ("a", "e", "i", "o", "u", "an", "en")]
WORLD = World(0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
PRECISION = "bf16" if torch.cuda.is_available() else "fp32"
SCALE, RATE = 20.0, 1e-6


class Setting(NamedTuple):
    """A store of at least one batch, an encoder, that encoder as a folder, pairs and tokens of (micro-)batches."""

    store: Store
    encoder: Encoder
    folder: Path
    pairs: int
    tokens: int


def made_text(rng: np.random.Generator, length: tuple[float, float, int, int]) -> str:
    median, spread, least, most = length
    count = int(np.clip(rng.lognormal(np.log(median), spread), least, most)) - 2  # <s> and </s>
    return " ".join(rng.choice(WORDS, max(count, 1)))


def make_store(folder: Path, pairs: Sequence[tuple[str, str]], tokenizer, prompts: tuple[str, str] = ("", "")) -> Store:
    rows = [Row({"en": query}, {"en": passage}) for query, passage in pairs]
    source = build_source(folder, "made", rows, tokenizer, *(Role(prompt, 512) for prompt in prompts), progress=False)
    return Store((source,), (None,))


def settings(setting: Setting) -> Config:
    train = TrainConfig(micro_batch_tokens=setting.tokens, engine="torch", precision=PRECISION)
    return Config(batch=BatchConfig(size=setting.pairs, strategy="mono"), train=train)


def batch_of(setting: Setting):
    """The batch that all benchmarks train on."""
    config = settings(setting)
    planner = make_planner(setting.store, config)
    with make_feed(planner, setting.store, config, WORLD, budget=setting.tokens) as feed:
        return next(feed)


def ours(setting: Setting, keep: float) -> Callable[[], object]:
    """Our step, with room for so large a share of the graphs (beside that of one micro-batch)."""
    config, batch = settings(setting), batch_of(setting)
    setting.encoder.autocast = torch.bfloat16 if PRECISION == "bf16" else None
    stepper = Stepper(make_engine(Towers([setting.encoder]), config.train, WORLD), config, WORLD)
    stepper(batch, RATE)  # measures
    stepper.graphs.limit = int(keep * stepper.graphs.expected(batch.micro_batches).sum())
    return lambda: stepper(batch, RATE)


def columns_of(setting: Setting) -> list[dict]:
    """The batch's queries and its passages, tokenised and padded, as other trainers' collators give them."""
    batch = batch_of(setting)
    source = setting.store.sources[batch.plan.source]
    ids = [torch.from_numpy(source.text_tokens(text).astype(np.int64)) for text in batch.texts]
    pad = setting.encoder.tokenizer.pad_token_id
    return [_features(ids[: setting.pairs], pad), _features(ids[setting.pairs : 2 * setting.pairs], pad)]


def _features(ids: list[torch.Tensor], pad: int) -> dict:
    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=pad).to(WORLD.device)
    lengths = torch.tensor([len(x) for x in ids], device=WORLD.device)
    mask = torch.arange(padded.shape[1], device=WORLD.device) < lengths[:, None]
    return {"input_ids": padded, "attention_mask": mask.long()}


def _updating(model: torch.nn.Module, backward: Callable[[], object]) -> Callable[[], None]:
    """A step: `backward`, clipping, AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, fused=True)

    def step():
        with torch.autocast(WORLD.device.type, torch.bfloat16, enabled=PRECISION == "bf16"):
            backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def sentence_transformers(setting: Setting, *, cached: bool = True, **options) -> Callable[[], None]:
    """A step with the cached loss of sentence-transformers, or with its plain one."""
    pytest.importorskip("sentence_transformers")
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import losses

    model = SentenceTransformer(str(setting.folder), device=str(WORLD.device)).train()
    name = "CachedMultipleNegativesRankingLoss" if cached else "MultipleNegativesRankingLoss"
    loss = getattr(losses, name)(model, scale=SCALE, **options)
    columns = columns_of(setting)
    return _updating(model, lambda: loss([dict(column) for column in columns], None).backward())


class MeanTower(torch.nn.Module):
    """AutoModel, mean pooling, normalisation, as model cards have it."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        from transformers import AutoModel

        self.model = AutoModel.from_pretrained(folder, add_pooling_layer=False).to(WORLD.device).train()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[..., None]
        return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def _dense_loss(q: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy((SCALE * q @ p.T).float(), torch.arange(len(q), device=q.device))


def plain_loop(setting: Setting) -> Callable[[], None]:
    """The loop that one writes first: two padded forward passes, cross entropy, one backward pass; no caching."""
    tower, columns = MeanTower(setting.folder), columns_of(setting)
    return _updating(tower, lambda: _dense_loss(*(tower(**column) for column in columns)).backward())


def grad_cache(setting: Setting, chunk: int) -> Callable[[], None]:
    """luyug/GradCache's own step, as published: chunks of so many rows of the padded columns."""
    if importlib.util.find_spec("grad_cache") is None:
        sys.modules.setdefault("grad_cache", pytest.importorskip("gradcache"))
    cache = importlib.import_module(f"{sys.modules['grad_cache'].__name__}.grad_cache").GradCache
    tower, columns = MeanTower(setting.folder), columns_of(setting)
    step_of = cache(models=[tower, tower], chunk_sizes=chunk, loss_fn=_dense_loss)
    return _updating(tower, lambda: step_of(*columns))


def products(config, tokens: int, at_once: int, dtype: torch.dtype, *, backward: bool = False):
    """Every product of every layer's weights with so many tokens, so many at once, and how many operations that is.

    With `backward`, also those that give the gradients of weights and inputs.
    """
    d, wide = config.hidden_size, config.intermediate_size
    shapes = [(d, d)] * 4 + [(d, wide), (wide, d)]
    sizes = [min(at_once, tokens - i) for i in range(0, tokens, at_once)]
    options = {"device": WORLD.device, "dtype": dtype}
    x = {k: torch.randn(min(at_once, tokens), k, **options) for k in (d, wide)}
    weights = [torch.randn(k, m, **options) for k, m in shapes]
    out = {k: torch.empty_like(x[k]) for k in x}
    gradients = [torch.empty_like(w) for w in weights]
    work = config.num_hidden_layers * sum(2 * tokens * k * m for k, m in shapes) * (3 if backward else 1)

    @torch.no_grad()
    def floor():
        for size in sizes:
            for _ in range(config.num_hidden_layers):
                for (k, m), weight, gradient in zip(shapes, weights, gradients, strict=True):
                    torch.mm(x[k][:size], weight, out=out[m][:size])
                    if backward:
                        torch.mm(x[m][:size], weight.T, out=out[k][:size])
                        torch.mm(x[k][:size].T, x[m][:size], out=gradient)

    return floor, work
