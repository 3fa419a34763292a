"""A whole training step beside the matrix products in it: pairs per second, and the share of the machine that is used.

On a CPU multilingual-e5-small and pairs of XQuAD-R where they are at hand (models/e5-small, ../shared/data), else an
encoder of its shape and made-up texts of XQuAD's lengths; on a GPU XLM-R-base's shape, bf16, and batches of 8192 pairs.
The floor is every product of every layer, forward and backward, on the tokens that there are: its operations are those
of the model (recomputed ones do not count), so that the rate beside the device's own is the model FLOP utilisation.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from steps import (
    PASSAGE,
    QUESTION,
    WORLD,
    Setting,
    batch_of,
    columns_of,
    made_text,
    make_store,
    ours,
    plain_loop,
    products,
    sentence_transformers,
)

from hbt_fast.encoder import Encoder
from hbt_fast.encoder.export import export
from hbt_fast.encoder.scratch import ScratchConfig, encoder_from_scratch, train_tokenizer
from hbt_fast.engine.memory import reuse_freed_memory

GPU = WORLD.device.type == "cuda"
ROOT = Path(__file__).resolve().parents[1]
MODEL, DATA = ROOT / "models" / "e5-small", ROOT.parent / "shared" / "data" / "xquad-r"
PAIRS, TOKENS, ROUNDS = (8192, 65536, 3) if GPU else (32, 2048, 3)
SHAPE = ScratchConfig(1000, 768, 12, 12) if GPU else ScratchConfig(1000, 384, 12, 12)
FLOOR = "the products of every layer, forward and backward"


def texts(rng) -> list[tuple[str, str]]:
    if DATA.is_dir() and not GPU:
        from hbt_fast.evaluation.lareqa import xquad_r

        task = xquad_r(DATA)
        rows = rng.choice(len(task.queries), 2 * PAIRS, replace=False)
        return [(task.queries[i], task.candidates[task.relevant[task.offsets[i]]]) for i in rows]
    return [(made_text(rng, QUESTION), made_text(rng, PASSAGE)) for _ in range(2 * PAIRS)]


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    reuse_freed_memory()  # as in a run; everything here gains by it
    pairs = texts(np.random.default_rng(0))
    folder = tmp_path_factory.mktemp("bench")
    if MODEL.is_dir() and not GPU:
        encoder = Encoder.from_pretrained(MODEL, dropout=0.0)
    else:
        tokenizer = train_tokenizer((text for pair in pairs for text in pair), 1000)
        encoder = encoder_from_scratch(tokenizer, SHAPE, max_length=512, dropout=0.0, seed=0)
    export(encoder, folder / "model")
    store = make_store(folder / "source", pairs, encoder.tokenizer, ("query: ", "passage: "))
    return Setting(store, encoder.to(WORLD.device).train(), folder / "model", PAIRS, TOKENS)


def padded(setting):
    step = ours(setting, 1.01)

    def run():
        setting.encoder.packs = False
        step()
        setting.encoder.packs = True

    return run


WAYS = {
    "hbt_fast, all graphs fit": lambda s: ours(s, 1.01),
    "hbt_fast, no graph fits": lambda s: ours(s, 0),
    "hbt_fast, all graphs fit, padded": padded,
    "AutoModel, no caching": plain_loop,
    "sentence-transformers, no caching": lambda s: sentence_transformers(s, cached=False),
    "sentence-transformers, cached, 32 rows": lambda s: sentence_transformers(s, mini_batch_size=32),
    "sentence-transformers, cached, as many tokens": lambda s: sentence_transformers(s, mini_batch_num_tokens=TOKENS),
}
if GPU:  # XLM-R-base's activations of 8192 pairs fit no GPU
    WAYS = {name: way for name, way in WAYS.items() if "no caching" not in name and "all graphs" not in name} | {
        "hbt_fast, a quarter of the graphs fits": lambda s: ours(s, 0.25)
    }


@pytest.mark.parametrize("way", WAYS)
def test_train(against_floor, setting, way):
    dtype = torch.bfloat16 if GPU else torch.float32
    tokens = sum(len(micro.tokens) for micro in batch_of(setting).micro_batches)
    floor, work = products(setting.encoder.model.config, tokens, TOKENS, dtype, backward=True)
    against_floor(WAYS[way](setting), floor, FLOOR, rounds=ROUNDS, work=work)


def test_padding(add_line, setting):
    """How many tokens there are, and on how many the others compute."""
    tokens = sum(len(micro.tokens) for micro in batch_of(setting).micro_batches)
    padded = sum(column["input_ids"].numel() for column in columns_of(setting))
    add_line(benchmark=f"{PAIRS} pairs, {tokens:,} tokens; padded as two columns {padded:,}")
