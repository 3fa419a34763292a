"""A whole training step with gradient caching, beside one forward, one backward and one update of the same texts.

Lengths are those of XQuAD: short questions, long passages. The same model, texts, optimizer and padding-free token
budget for all; the others get their texts tokenised and padded already, as their collators do it.
"""

import importlib
import importlib.util
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hbt_fast.config import BatchConfig, Config, TrainConfig
from hbt_fast.data.build import build_source
from hbt_fast.data.rows import Row
from hbt_fast.data.store import Role, Store
from hbt_fast.encoder.export import export
from hbt_fast.encoder.scratch import ScratchConfig, encoder_from_scratch, train_tokenizer
from hbt_fast.encoder.towers import Towers
from hbt_fast.engine.launch import World, make_engine
from hbt_fast.engine.memory import reuse_freed_memory
from hbt_fast.engine.step import Stepper
from hbt_fast.train import make_feed, make_planner

BATCH, BUDGET, ROUNDS = 48, 2048, 5
QUESTION, PASSAGE = (14, 0.35, 6, 40), (150, 0.4, 30, 384)  # tokens: median, spread of the logarithm, least, most
SHAPE = ScratchConfig(200, 256, 3, 8)
WORDS = [a + b for a in "bcdfghjklmnp" for b in ("a", "e", "i", "o", "u", "an", "en")]
WORLD = World(0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
FLOOR = "one forward, one backward, one update"


def made_text(rng, length) -> str:
    median, spread, least, most = length
    count = int(np.clip(rng.lognormal(np.log(median), spread), least, most)) - 2  # <s> and </s>
    return " ".join(rng.choice(WORDS, max(count, 1)))


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """A store of one batch's size and more, an encoder, and that encoder as a folder."""
    reuse_freed_memory()  # as in a run; everything here gains by it
    rng = np.random.default_rng(0)
    rows = [Row({"en": made_text(rng, QUESTION)}, {"en": made_text(rng, PASSAGE)}) for _ in range(4 * BATCH)]
    tokenizer = train_tokenizer((t for row in rows for t in (row.queries["en"], row.passages["en"])), 200)
    folder = tmp_path_factory.mktemp("bench")
    role = Role("", 512)
    source = build_source(folder / "source", "made", rows, tokenizer, role, role, progress=False)
    encoder = encoder_from_scratch(tokenizer, SHAPE, max_length=512, dropout=0.0, seed=0)
    export(encoder, folder / "model")
    return Store((source,), (None,)), encoder.to(WORLD.device).train(), folder / "model"


def ours(setting, keep: float) -> tuple[Stepper, object]:
    """A stepper with room for so large a share of the graphs (beside that of one micro-batch), and a batch."""
    store, encoder, _ = setting
    train = TrainConfig(micro_batch_tokens=BUDGET, engine="torch", precision="fp32")
    config = Config(batch=BatchConfig(size=BATCH, strategy="mono"), train=train)
    stepper = Stepper(make_engine(Towers([encoder]), train, WORLD), config, WORLD)
    with make_feed(make_planner(store, config), store, config, WORLD, budget=BUDGET) as feed:
        batch = next(feed)
    stepper(batch, 1e-6)  # measures
    stepper.graphs.limit = int(keep * stepper.graphs.expected(batch.micro_batches).sum())
    return stepper, batch


def texts_of(batch, store) -> tuple[list, list]:
    """The token ids of the batch's queries and of its passages."""
    source = store.sources[batch.plan.source]
    ids = [torch.from_numpy(source.text_tokens(text).astype(np.int64)) for text in batch.texts]
    return ids[:BATCH], ids[BATCH : 2 * BATCH]


def features(ids, pad: int) -> dict:
    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=pad).to(WORLD.device)
    lengths = torch.tensor([len(x) for x in ids], device=WORLD.device)
    mask = torch.arange(padded.shape[1], device=WORLD.device) < lengths[:, None]
    return {"input_ids": padded, "attention_mask": mask.long()}


def ideal(setting):
    """The floor: every text forward and backward once, in the same micro-batches, and an update."""
    _, encoder, _ = setting
    stepper, batch = ours(setting, 0)

    def floor():
        for micro in batch.micro_batches:
            arrays = (torch.from_numpy(x).to(WORLD.device) for x in (micro.tokens, micro.cu_seqlens))
            encoder(*arrays).sum().backward()
        stepper.engine.step()

    return floor


def sentence_transformers(setting, batch, **options):
    pytest.importorskip("sentence_transformers")
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss

    store, encoder, folder = setting
    model = SentenceTransformer(str(folder), device=str(WORLD.device)).train()
    loss = CachedMultipleNegativesRankingLoss(model, scale=20.0, **options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    pad = encoder.tokenizer.pad_token_id
    columns = [features(ids, pad) for ids in texts_of(batch, store)]

    def step():
        loss([dict(column) for column in columns], None).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def grad_cache(setting, batch, chunk):
    """luyug/GradCache's own step, as published: chunks of so many rows of the padded columns."""
    if importlib.util.find_spec("grad_cache") is None:
        sys.modules.setdefault("grad_cache", pytest.importorskip("gradcache"))
    cache = importlib.import_module(f"{sys.modules['grad_cache'].__name__}.grad_cache").GradCache
    store, encoder, folder = setting

    class Tower(torch.nn.Module):
        def __init__(self):
            super().__init__()
            from transformers import AutoModel

            self.model = AutoModel.from_pretrained(folder, add_pooling_layer=False).to(WORLD.device).train()

        def forward(self, input_ids, attention_mask):
            hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            mask = attention_mask[..., None]
            return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)

    def loss(q, p):
        return F.cross_entropy(20.0 * q @ p.T, torch.arange(len(q), device=q.device))

    tower = Tower()
    step_of = cache(models=[tower, tower], chunk_sizes=chunk, loss_fn=loss)
    optimizer = torch.optim.AdamW(tower.parameters(), lr=1e-6)
    pad = encoder.tokenizer.pad_token_id
    columns = [features(ids, pad) for ids in texts_of(batch, store)]

    def step():
        step_of(*columns)
        torch.nn.utils.clip_grad_norm_(tower.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


@pytest.mark.parametrize("keep", [0, 0.5, 1.01], ids=["no graph fits", "half of them fit", "all fit"])
def test_step(against_floor, setting, keep):
    stepper, batch = ours(setting, keep)
    against_floor(lambda: stepper(batch, 1e-6), ideal(setting), FLOOR, rounds=ROUNDS)


OTHERS = {
    "sentence-transformers, 32 rows": lambda s, b: sentence_transformers(s, b, mini_batch_size=32),
    "sentence-transformers, as many tokens": lambda s, b: sentence_transformers(s, b, mini_batch_num_tokens=BUDGET),
    "GradCache, 16 rows": lambda s, b: grad_cache(s, b, 16),
}


@pytest.mark.parametrize("other", OTHERS)
def test_other(against_floor, setting, other):
    _, batch = ours(setting, 0)
    against_floor(OTHERS[other](setting, batch), ideal(setting), FLOOR, rounds=ROUNDS)
