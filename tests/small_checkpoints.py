"""Folders of tiny checkpoints, one for each kind of tokenizer, with random weights; and files of texts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch

WORDS = "red blue green old new big small fast slow cat dog bird house tree river stone wind fire moon star".split()  # noqa: SIM905
MORE = "straße übung naïve 東京 大阪 привет мир café house's don't running runner reddish bluebird".split()  # noqa: SIM905
CORPUS = [f"{a} {b} {c}" for a in WORDS for b in MORE for c in (*WORDS[:6], "123", "4-5")]
CORPUS += ["< 0 x > A B C D E F 0 1 2 3 4 5 6 7 8 9"]  # so that every character of "<0x4F>" has a token of its own
FILLERS = [word[::-1] for word in WORDS]  # tokens that no text has
TEXTS = [
    "the red cat runs 12",
    "A bluebird, naïve!",
    "привет мир",
    "東京 house's straße\n",
    "q\u00e9 \U0001f600 qz",
    "x",
]
OTHERS = ["old stone river", "大阪 übung don't", "running runner running", "reddish \u0e44\u0e17\u0e22 wind"]
SPECIALS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
NAMES = {"bos": "<s>", "eos": "</s>", "cls": "<s>", "sep": "</s>", "pad": "<pad>", "unk": "<unk>", "mask": "<mask>"}


def unigram(byte_fallback: bool = False, scores: dict[str, float] | None = None):
    """XLM-R's kind: NFKC, metaspace, pieces with scores. The pieces are BPE's, whose trainer draws nothing.

    With bytes or scores of one's own, tokens that no text has stand before the special ones.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    fillers = FILLERS if scores is None else [3 * next(name for name in scores if name.isalpha() and len(name) == 1)]
    first = ["<pad>", *fillers, "<s>", "</s>", "<unk>", "<mask>"] if byte_fallback or scores else SPECIALS
    if scores is None:
        core = Tokenizer(models.BPE())
        core.normalizer, core.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
        core.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=330, show_progress=False))
        scores = {name: -2.0 - number / 30 for name, number in sorted(core.get_vocab().items(), key=lambda one: one[1])}
    scores |= {f"<0x{byte:02X}>": -11.0 for byte in range(256)} if byte_fallback else {}
    pieces = [*((name, 0.0 if name in SPECIALS else -1.0) for name in first), *scores.items()]
    core = Tokenizer(models.Unigram(pieces, first.index("<unk>"), byte_fallback))
    core.normalizer, core.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    core.add_special_tokens(SPECIALS)
    return _ended(core)


def bpe():
    """SentencePiece's BPE, as an encoder from nothing has it; it falls back to bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    core.normalizer, core.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=[*SPECIALS, *bytes_], limit_alphabet=80, show_progress=False
    )
    core.train_from_iterator(CORPUS, trainer)
    parts = json.loads(core.to_str())
    parts["added_tokens"] = [token for token in parts["added_tokens"] if token["content"] in SPECIALS]
    return _ended(Tokenizer.from_str(json.dumps(parts)))


def byte_level():
    """GPT-2's and RoBERTa's kind, with RoBERTa's post-processor and a token that was added after the others."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    first = ["<pad>", *FILLERS, "<s>", "</s>", "<unk>", "<mask>"]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=first, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator(CORPUS, trainer)
    parts = json.loads(core.to_str())
    parts["added_tokens"] = [token for token in parts["added_tokens"] if token["content"] in SPECIALS]
    core = Tokenizer.from_str(json.dumps(parts))
    core.add_tokens([AddedToken("[NEW]", special=True)])
    ends = [(name, core.token_to_id(name)) for name in ("</s>", "<s>")]
    core.post_processor = processors.Sequence([processors.RobertaProcessing(*ends)])
    return _fast(core, NAMES)


def wordpiece():
    """BERT's kind, whose special tokens are not the first ones."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    core = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    core.normalizer, core.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece()
    specials = ["[PAD]", *FILLERS, "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=330, special_tokens=specials, show_progress=False)
    core.train_from_iterator(CORPUS, trainer)
    parts = json.loads(core.to_str())
    parts["added_tokens"] = [token for token in parts["added_tokens"] if token["content"] not in FILLERS]
    core = Tokenizer.from_str(json.dumps(parts))
    ends = [(name, core.token_to_id(name)) for name in ("[SEP]", "[CLS]")]
    core.post_processor = processors.BertProcessing(*ends)
    names = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    return _fast(core, names)


KINDS: dict[str, Callable] = {
    "unigram": unigram,
    "unigram with bytes": lambda: unigram(byte_fallback=True),
    "bpe with bytes": bpe,
    "byte-level bpe": byte_level,
    "wordpiece": wordpiece,
}


def save(folder: Path, tokenizer, kind: str = "AutoModel", **settings) -> Path:
    """A checkpoint of random weights: BERT for WordPiece, else XLM-R; `kind` is the class without its prefix."""
    import transformers

    family = "Bert" if "[CLS]" in tokenizer.get_vocab() else "XLMRoberta"
    special = {
        f"{name}_token_id": number
        for name in ("pad", "bos", "eos")
        if (number := getattr(tokenizer, f"{name}_token_id")) is not None
    }
    config = getattr(transformers, f"{family}Config")(
        **{
            "vocab_size": len(tokenizer),
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "max_position_embeddings": 40 + (tokenizer.pad_token_id or 0),
            **special,
            **settings,
        }
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, family + kind.replace("AutoModel", "Model"))(config)
        for parameter in model.parameters():
            parameter.data.normal_(0, 0.3)  # biases too, and the row of the padding token
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_texts(path: Path, texts: list[str]) -> str:
    """A JSON Lines file of texts, each once."""
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts), encoding="utf-8")
    return str(path)


def _ended(core):
    """With XLM-R's ends of a text."""
    from tokenizers import processors

    ends = [(name, core.token_to_id(name)) for name in ("<s>", "</s>")]
    core.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    return _fast(core, NAMES)


def _fast(core, names):
    from transformers import PreTrainedTokenizerFast

    named = {f"{name}_token": token for name, token in names.items()}
    return PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=32, **named)
