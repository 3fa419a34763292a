"""A training step with gradient caching, beside one forward and backward of the same texts without any loss."""

import numpy as np
import pytest
import torch

from hbt_fast.config import BatchConfig, Config, TrainConfig
from hbt_fast.data.build import build_source
from hbt_fast.data.rows import Row
from hbt_fast.data.store import Role, Store
from hbt_fast.encoder.scratch import ScratchConfig, encoder_from_scratch, train_tokenizer
from hbt_fast.engine.launch import World, make_engine
from hbt_fast.train import make_feed, make_planner, run_step

BATCH, BUDGET = 64, 1024


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    rng = np.random.default_rng(0)
    words = "red blue green old new big small fast slow cat dog bird house tree river stone wind fire moon star".split()  # noqa: SIM905
    text = [" ".join(rng.choice(words, rng.integers(4, 40))) for _ in range(1000)]
    rows = [Row({"en": text[2 * i]}, {"en": f"{i} {text[2 * i + 1]}"}) for i in range(500)]
    tokenizer = train_tokenizer(text, 200)
    folder = tmp_path_factory.mktemp("bench") / "source"
    store = Store((build_source(folder, "made", rows, tokenizer, Role("", 64), Role("", 64), progress=False),), (None,))
    encoder = encoder_from_scratch(tokenizer, ScratchConfig(200, 256, 4, 4), max_length=64, dropout=0.0, seed=0)
    return store, encoder.train()


@pytest.mark.parametrize("keep", [0, 10**9], ids=["cached", "graphs kept"])
def test_step(against_floor, setting, keep):
    store, encoder = setting
    train = TrainConfig(micro_batch_tokens=BUDGET, keep_tokens=keep, engine="torch", precision="fp32")
    config = Config(batch=BatchConfig(size=BATCH, strategy="mono"), train=train)
    world = World(0, 1, torch.device("cpu"))
    engine = make_engine(encoder, train, world)
    with make_feed(make_planner(store, config), store, config, world) as feed:
        batch = next(feed)

    def floor():
        for micro in batch.micro_batches:
            encoder(torch.from_numpy(micro.tokens), torch.from_numpy(micro.cu_seqlens)).sum().backward()

    against_floor(lambda: run_step(engine, batch, config, world), floor, "one forward and backward of each text")
