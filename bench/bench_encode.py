"""Encoding texts, beside the matrix products that it consists of, and beside sentence-transformers and a padded loop.

multilingual-e5-small and XQuAD-R's texts where they are at hand (models/e5-small, ../shared/data), else an encoder of
its shape with made-up texts of XQuAD's lengths. The floor is every product of every layer on the tokens that there are,
in micro-batches of as many tokens.
"""

from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from steps import PASSAGE, QUESTION, WORLD, made_text, products

from hbt_fast.encode import native_dtype
from hbt_fast.encoder import Encoder
from hbt_fast.encoder.onnx import in_8_bits
from hbt_fast.encoder.scratch import ScratchConfig, encoder_from_scratch, train_tokenizer

ROOT = Path(__file__).resolve().parents[1]
MODEL, DATA = ROOT / "models" / "e5-small", ROOT.parent / "shared" / "data" / "xquad-r"
COUNT, TOKENS, ROUNDS = 300, 8192, 3
DEVICE = WORLD.device.type
FLOOR = "the products of every layer, without padding"


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """An encoder, its folder, and texts in no order: questions and sentences."""
    rng = np.random.default_rng(0)
    if DATA.is_dir():
        from hbt_fast.evaluation.lareqa import xquad_r

        task = xquad_r(DATA)
        every = [*task.queries, *task.candidates]
        texts = [every[i] for i in rng.choice(len(every), COUNT, replace=False)]
    else:
        texts = [made_text(rng, length) for length in (QUESTION, PASSAGE) for _ in range(COUNT // 2)]
    folder = MODEL
    if not folder.is_dir():
        from hbt_fast.encoder.export import export

        tokenizer = train_tokenizer(texts, 1000)
        folder = tmp_path_factory.mktemp("bench") / "model"
        shape = ScratchConfig(1000, 384, 12, 12)
        export(encoder_from_scratch(tokenizer, shape, max_length=512, dropout=0.0, seed=0), folder)
    encoder = Encoder.from_pretrained(folder).to(DEVICE).eval()
    encoder.autocast = torch.bfloat16 if DEVICE == "cuda" else None
    return encoder, folder, [texts[i] for i in rng.permutation(len(texts))]


def ours(setting):
    encoder, _, texts = setting
    return lambda: [torch.from_numpy(encoder.encode(texts, "query: ", batch_tokens=TOKENS))]


def ours_padded(setting):
    encoder, _, texts = setting

    def run():
        encoder.packs = False
        encoder.encode(texts, "query: ", batch_tokens=TOKENS)
        encoder.packs = True

    return run


def ours_bf16(setting):
    """In bf16, beside the products in float32."""
    if native_dtype(DEVICE) != torch.bfloat16 or DEVICE != "cpu":
        pytest.skip("a GPU, which is in bf16 already, or no bf16 in this CPU")
    encoder, *others = setting
    return ours((deepcopy(encoder).to(torch.bfloat16), *others))


def ours_int8(setting):
    """In 8 bits by onnxruntime, beside the products in float32."""
    pytest.importorskip("onnxruntime")
    encoder, *others = setting
    return ours((in_8_bits(deepcopy(encoder).cpu()), *others))


def sentence_transformers(setting):
    library = pytest.importorskip("sentence_transformers")
    _, folder, texts = setting
    model = library.SentenceTransformer(str(folder), device=DEVICE)
    if DEVICE == "cuda":
        model.to(torch.bfloat16)
    return lambda: [model.encode(texts, prompt="query: ", batch_size=32, convert_to_tensor=True)]


def loop(setting):
    """The loop of a model card: AutoModel, batches of 32 in the order of the texts."""
    from transformers import AutoModel

    encoder, folder, texts = setting
    model = AutoModel.from_pretrained(folder, add_pooling_layer=False).to(DEVICE).eval()

    @torch.inference_mode()
    def run():
        for i in range(0, len(texts), 32):
            batch = ["query: " + text for text in texts[i : i + 32]]
            tokens = encoder.tokenizer(batch, padding=True, truncation=True, max_length=512, return_tensors="pt")
            tokens = tokens.to(DEVICE)
            with torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda"):
                hidden = model(**tokens).last_hidden_state
            mask = tokens["attention_mask"][..., None]
            torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1).cpu().numpy()

    return run


WAYS = {
    "hbt_fast": ours,
    "hbt_fast, bf16": ours_bf16,
    "hbt_fast, int8": ours_int8,
    "hbt_fast, padded": ours_padded,
    "sentence-transformers": sentence_transformers,
    "AutoModel, 32 texts at once": loop,
}


@pytest.mark.parametrize("way", WAYS)
@torch.inference_mode()
def test_encode(against_floor, setting, way):
    encoder, _, texts = setting
    tokens = len(encoder.tokenise(texts, "query: ")[0])
    floor, work = products(encoder.model.config, tokens, TOKENS, encoder.autocast or torch.float32)
    against_floor(WAYS[way](setting), floor, FLOOR, rounds=ROUNDS, work=work)
