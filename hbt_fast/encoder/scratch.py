"""A tokenizer and a small XLM-R-shaped encoder from nothing, for data without a pretrained checkpoint."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from hbt_fast.base.ranges import ranges, whole
from hbt_fast.encoder.model import Encoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPECIALS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]  # XLM-R's, in its order


@ranges(vocabulary=whole(16, 2**24), hidden=whole(1, 2**16), layers=whole(1, 1000), heads=whole(1, 2**16))
@dataclass(frozen=True)
class ScratchConfig:
    """The shape of an encoder that is trained from nothing.

    Args:
        vocabulary: tokens of the BPE tokenizer that is trained on the training texts.
        hidden: width.
        layers: transformer layers.
        heads: attention heads.
    """

    vocabulary: int = 8000
    hidden: int = 192
    layers: int = 3
    heads: int = 6


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A SentencePiece-like BPE tokenizer with XLM-R's special tokens, as a fast Hugging Face tokenizer.

    BPE rather than XLM-R's unigram model: its trainer gives the same tokenizer for the same texts, so that a seed fixes
    a whole run (the unigram trainer of tokenizers 0.23 does not, even in one thread). Characters beyond the most
    frequent vocabulary / 2 become `<unk>`.

    Args:
        texts: what to train on, prompts included.
        vocabulary: number of tokens, special tokens included.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.normalizer = normalizers.NFKC()
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=SPECIALS, limit_alphabet=vocabulary // 2, show_progress=False
    )
    core.train_from_iterator(texts, trainer)
    ends = [("<s>", core.token_to_id("<s>")), ("</s>", core.token_to_id("</s>"))]
    core.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    names = {"bos": "<s>", "eos": "</s>", "cls": "<s>", "sep": "</s>", "pad": "<pad>", "unk": "<unk>", "mask": "<mask>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=core, model_max_length=512, **{f"{name}_token": token for name, token in names.items()}
    )


def encoder_from_scratch(
    tokenizer: PreTrainedTokenizerFast, shape: ScratchConfig, *, max_length: int, dropout: float, seed: int
) -> Encoder:
    """An XLM-R of the given shape with random weights (a function of the seed), mean pooling and no prompts set.

    Args:
        tokenizer: from `train_tokenizer`.
        shape: its size.
        max_length: the longest text, in tokens.
        dropout: dropout probability of hidden states and attention.
        seed: of the random weights.
    """
    from transformers import XLMRobertaConfig, XLMRobertaModel

    config = XLMRobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        intermediate_size=4 * shape.hidden,
        max_position_embeddings=max_length + 2,  # positions of XLM-R start at padding_idx + 1 = 2
        type_vocab_size=1,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = XLMRobertaModel(config, add_pooling_layer=False)
    return Encoder(model, tokenizer, max_length=max_length)
