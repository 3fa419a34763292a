"""A whole training step with gradient caching, beside one forward, one backward and one update of the same texts.

Lengths are those of XQuAD: short questions, long passages. The same model, texts, optimizer and token budget for all;
the others get their texts tokenised and padded already, as their collators do it.
"""

import numpy as np
import pytest
import torch
from steps import (
    PASSAGE,
    QUESTION,
    RATE,
    WORLD,
    Setting,
    batch_of,
    grad_cache,
    made_text,
    make_store,
    ours,
    sentence_transformers,
)

from hbt_fast.encoder.export import export
from hbt_fast.encoder.scratch import ScratchConfig, encoder_from_scratch, train_tokenizer
from hbt_fast.engine.memory import reuse_freed_memory

BATCH, BUDGET, ROUNDS = 48, 2048, 5
SHAPE = ScratchConfig(200, 256, 3, 8)
FLOOR = "one forward, one backward, one update"


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    reuse_freed_memory()  # as in a run; everything here gains by it
    rng = np.random.default_rng(0)
    pairs = [(made_text(rng, QUESTION), made_text(rng, PASSAGE)) for _ in range(4 * BATCH)]
    tokenizer = train_tokenizer((text for pair in pairs for text in pair), 200)
    folder = tmp_path_factory.mktemp("bench")
    encoder = encoder_from_scratch(tokenizer, SHAPE, max_length=512, dropout=0.0, seed=0)
    export(encoder, folder / "model")
    store = make_store(folder / "source", pairs, tokenizer)
    return Setting(store, encoder.to(WORLD.device).train(), folder / "model", BATCH, BUDGET)


def ideal(setting):
    """The floor: every text forward and backward once, in the same micro-batches, and an update."""
    batch, optimizer = batch_of(setting), torch.optim.AdamW(setting.encoder.parameters(), lr=RATE, fused=True)

    def floor():
        for micro in batch.micro_batches:
            arrays = (torch.from_numpy(x).to(WORLD.device) for x in (micro.tokens, micro.cu_seqlens))
            setting.encoder(*arrays).sum().backward()
        torch.nn.utils.clip_grad_norm_(setting.encoder.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return floor


WAYS = {
    "no graph fits": lambda s: ours(s, 0),
    "half of them fit": lambda s: ours(s, 0.5),
    "all fit": lambda s: ours(s, 1.01),
    "sentence-transformers, 32 rows": lambda s: sentence_transformers(s, mini_batch_size=32),
    "sentence-transformers, as many tokens": lambda s: sentence_transformers(s, mini_batch_num_tokens=BUDGET),
    "GradCache, 16 rows": lambda s: grad_cache(s, 16),
}


@pytest.mark.parametrize("way", WAYS)
def test_step(against_floor, setting, way):
    against_floor(WAYS[way](setting), ideal(setting), FLOOR, rounds=ROUNDS)
