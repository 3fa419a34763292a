"""Reading a checkpoint's tokenizer and transformer, and refusing those that cannot be used as they are.

No code of a checkpoint is run, and every weight must be there and fit: transformers would make up what is missing
(weights, and a tokenizer of five tokens), and vectors would be wrong without a word.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from hbt_fast.encoder.adapters import merge_adapter
from hbt_fast.encoder.checkpoint_files import Fields, find, read_fields, refusals, shown
from hbt_fast.encoder.hub import cache_only
from hbt_fast.encoder.layout import VOCABULARIES, places
from hbt_fast.encoder.model import EncoderError, check_finite
from hbt_fast.encoder.modules import lower_cases
from hbt_fast.encoder.weights import NAMES, TYPES, contents, weight_files

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerFast

    from hbt_fast.encoder.model import Encoder

SHOWN = 3  # names of weights in a message
PROBES = [
    "What is 1 + 1?",
    "\u00dcber die Br\u00fccke\n\t",
    "\u0639\u0631\u0628\u064a \u4e2d\u6587 \u0939\u093f \U0001f600",
    " ",
    "a" * 200,
]
COUNTS = ("layer", "group", "expert")  # in a key of config.json: so many modules are made one by one
MODULES, LABELS, LARGEST = 1 << 10, 1 << 17, 1 << 31  # the largest such numbers, of labels, and of anything
IGNORED = (  # of config.json: they name kernels on the hub, ways to quantise, and files of weights to read in place
    "quantization_config",
    "compression_config",
    "transformers_weights",
    "auto_map",
)


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
    """The fast tokenizer of a checkpoint; it lower-cases where sentence-transformers' settings say so.

    Args:
        path: folder or hub name.

    Raises:
        EncoderError: no such checkpoint, no fast tokenizer, one that cannot be read, or one with tokens that the
            model's config.json has no place for.
    """
    from transformers import AutoTokenizer

    name = str(path)
    parts = places(name)
    _check_place(name)
    path = parts.tokenizer
    fields = read_fields(parts.transformer, "config.json")
    config = None if fields is None else _load_config(parts.transformer, fields)
    if config is None and find(path, "tokenizer.json") is None:
        raise EncoderError(f"{path}: not a checkpoint that can be loaded (no config.json there); give its folder")
    settings = read_fields(path, "tokenizer_config.json")
    limit = None if settings is None else settings.values.get("model_max_length")
    if limit is not None and not (isinstance(limit, int | float) and not isinstance(limit, bool) and limit >= 1):
        raise EncoderError(f'{settings.where}: "model_max_length" is {shown(limit)}; it must be a number from 1 on')
    what = "its tokenizer (tokenizer.json, tokenizer_config.json) cannot be loaded"
    with refusals(path, what):
        tokenizer = AutoTokenizer.from_pretrained(
            path, config=config, local_files_only=cache_only(path), trust_remote_code=False
        )
        fast = tokenizer.is_fast
    if not fast:
        raise EncoderError(f"{path}: no fast tokenizer (tokenizer.json); convert it with transformers first")
    _check_there(path, tokenizer)
    with refusals(path, what):
        found = tokenizer(PROBES, verbose=False)["input_ids"]
        names = tokenizer.get_vocab()
        specials = tokenizer.all_special_ids
    used = {token for ids in found for token in ids} | set(specials)
    if unknown := sorted(used - set(names.values())):
        raise EncoderError(
            f"{path}/tokenizer.json: it puts the token {unknown[0]:,} into texts, which its vocabulary does not have "
            '("post_processor" names it); fetch the checkpoint again'
        )
    rows = None if fields is None else fields.values.get("vocab_size")
    if isinstance(rows, int) and parts.adapter is None:  # an adapter may bring embeddings of further tokens
        _check_vocabulary(path, names, rows, '"vocab_size" in config.json')
    if lower_cases(name):
        _lower_case(tokenizer)
    return tokenizer


def load_transformer(path: str, dropout: float | None = None) -> nn.Module:
    """The transformer of a checkpoint in float32, in evaluation mode, without the pooler that some types have.

    Args:
        path: folder or hub name.
        dropout: replaces every dropout probability of the checkpoint's config.

    Raises:
        EncoderError: no such checkpoint, or one that is damaged, incomplete, not finite or not an encoder.
    """
    from transformers import AutoModel

    name, parts = path, places(path)
    path = parts.transformer
    fields = read_fields(path, "config.json")
    if fields is None:
        raise EncoderError(f"{path}: no config.json there; give a checkpoint folder or a hub name")
    config = _load_config(path, fields)
    for key, value in vars(config).items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if dropout is not None and "dropout" in key and number:
            setattr(config, key, dropout)
    # an unused pooler would sit in the optimizer without ever getting a gradient
    poolers = {"add_pooling_layer": False} if _pooler_is_optional(config) else {}
    files = _check_sizes(path, config, poolers)
    options = {"config": config, "dtype": torch.float32, "weights_only": True, "trust_remote_code": False}
    options["use_safetensors"] = files[0].suffix == ".safetensors"
    try:
        with refusals(path, "not a checkpoint that can be loaded"), _quiet():
            model, info = AutoModel.from_pretrained(files[0].parent, **options, **poolers, output_loading_info=True)
    except EncoderError as error:
        if "ignore_mismatched_sizes" in str(error.__cause__):
            raise EncoderError(
                f"{path}: its weights have other sizes than its config.json says; fetch both again"
            ) from error
        raise
    missing = sorted(key for key in info["missing_keys"] if not key.startswith("pooler."))
    if missing:
        raise EncoderError(
            f"{path}: {len(missing)} of the model's weights are not in the checkpoint ({_some(missing)}); fetch it "
            "again, or save it from transformers' AutoModel"
        )
    if unused := sorted(key for key in info["unexpected_keys"] if not key.startswith("pooler.")):
        print(f"{path}: weights that are no part of an encoder and are not used: {_some(unused)}", file=sys.stderr)
    if isinstance(getattr(model, "pooler", None), nn.Module):
        model.pooler = nn.Identity()  # not None: types without the option call it
    check_finite(model.named_parameters(), path)
    if parts.adapter is not None:
        model = merge_adapter(model, parts.adapter)
    model.name_or_path = model.config._name_or_path = name  # not the cache's folder: peft writes it down
    return model


def try_out(encoder: Encoder, path: str) -> None:
    """See that the tokenizer fits the model, and that a text of three tokens gets a vector.

    Args:
        encoder: on the CPU.
        path: of its checkpoint.

    Raises:
        EncoderError: one or the other is not so: a setting of config.json is of a wrong type, for one.
    """
    table = encoder.model.get_input_embeddings()
    rows = getattr(table, "num_embeddings", None)
    if rows is not None:
        _check_vocabulary(path, encoder.tokenizer.get_vocab(), rows, "the model's table of embeddings")
    training, length = encoder.training, min(3, encoder.max_length, rows or 3)
    with refusals(path, "a text of three tokens cannot be embedded: is a setting of its config.json wrong?"):
        encoder.eval()
        with torch.inference_mode():
            vector = encoder(torch.arange(length, dtype=torch.int32), torch.tensor([0, length]))
        finite = bool(vector.isfinite().all())
        encoder.train(training)
    if not finite:
        raise EncoderError(
            f"{path}: the vector of a text of three tokens holds NaN or infinity: a setting of its config.json is "
            "wrong, or its weights are; fetch both again"
        )


def _check_place(path: str) -> None:
    """Refuse what is no checkpoint, and say where one is."""
    if not (Path(path) / "config.json").exists() and (Path(path) / "query" / "config.json").exists():
        raise EncoderError(f"{path} holds two encoders; give {path}/query for queries or {path}/passage for passages")
    if not (Path(path) / "config.json").exists() and (Path(path) / "model" / "config.json").exists():
        raise EncoderError(f"{path} is the folder of a run; give {path}/model, the encoder that it exported")


def _check_there(path: str, tokenizer: PreTrainedTokenizerFast) -> None:
    """See that the tokenizer is the checkpoint's, and was not made up by transformers where files are missing."""
    own = [name for key, name in type(tokenizer).vocab_files_names.items() if key != "tokenizer_file"]
    if any(find(path, name) for name in VOCABULARIES) or (own and all(find(path, name) for name in own)):
        return
    if Path(path).is_dir() and any(Path(path).glob("*.tiktoken")):
        return
    raise EncoderError(
        f"{path}: no tokenizer there (tokenizer.json{' or ' if own else ''}{' and '.join(own)}); copy the tokenizer of "
        "the model that it was trained from into it: AutoTokenizer.from_pretrained(...).save_pretrained(...)"
    )


def _check_vocabulary(path: str, names: dict[str, int], rows: int, what: str) -> None:
    beyond = sorted((number, token) for token, number in names.items() if number >= rows)
    if not beyond:
        return
    tokens = _some([f"{token!r} ({number:,})" for number, token in beyond])
    raise EncoderError(
        f"{path}: the model has no rows for {len(beyond):,} of its tokenizer's tokens, {tokens}: {what} ends at "
        f"{rows - 1:,}; if they were added to the tokenizer alone, give the model rows for them, which are then to be "
        "trained (model.resize_token_embeddings(len(tokenizer)) and its save_pretrained); else take the tokenizer of "
        "the model"
    )


def _load_config(path: str, fields: Fields) -> PretrainedConfig:
    """The settings of a checkpoint, without those that would have transformers act on more than an architecture."""
    from transformers import AutoConfig

    _check_config(fields)
    with refusals(fields.where, "transformers does not take it"):
        config = AutoConfig.from_pretrained(find(path, "config.json").parent, trust_remote_code=False)
        if getattr(config, "is_encoder_decoder", False):
            raise EncoderError(
                f"{path}: {config.model_type} has an encoder and a decoder, which is not supported; take a model that "
                "is one of them alone, such as xlm-roberta-base"
            )
        config._attn_implementation = config._experts_implementation = None  # which the configs in it get too
        for one in (config, *(getattr(config, key, None) for key in config.sub_configs)):
            for key in IGNORED:
                vars(one or config).pop(key, None)
    return config


def _check_config(fields: Fields) -> None:
    """Refuse numbers with which transformers would work for hours, or fill the memory, before it finds them wrong."""
    left = [(fields.where, fields.values)]
    while left:
        where, values = left.pop()
        for key, value in values.items():
            if isinstance(value, dict):
                left.append((f'{where}: "{key}"', value))
            number = isinstance(value, int | float) and not isinstance(value, bool)
            low = key.lower()
            most = LABELS if low == "num_labels" else MODULES if any(c in low for c in COUNTS) else LARGEST
            if number and isinstance(value, int) and value > most:
                raise EncoderError(f'{where}: "{key}" is {shown(value)}, and no model has more than {most:,}')
            if number and (low.startswith("vocab") or low.startswith("num_")) and value < 0:
                raise EncoderError(f'{where}: "{key}" is {shown(value)}; it must be a whole number from 1 on')
            if isinstance(value, float) and not math.isfinite(value):
                raise EncoderError(f'{where}: "{key}" is {value}; it must be a finite number')


def _check_sizes(path: str, config: PretrainedConfig, options: dict[str, bool]) -> list[Path]:
    """See that config.json and the files of weights are about one model, before memory is taken for it.

    Returns:
        The files, on this machine.
    """
    from transformers import AutoModel

    if not (files := weight_files(path)):
        raise EncoderError(
            f"{path}: no file named {' or '.join(NAMES)} there, and weights in other files are not read; save "
            "the model with transformers' save_pretrained"
        )
    there = 0
    for file in files:
        for name, shape, dtype in contents(file):
            there += math.prod(shape)
            if name.endswith("weight") and dtype not in TYPES.values():
                raise EncoderError(
                    f"{file}: {name} is quantised (of type {str(dtype).removeprefix('torch.')}), which is not "
                    "supported; take the checkpoint as it was before"
                )
    with refusals(f"{path}/config.json", "no model can be made from it"), torch.device("meta"):
        size = sum(p.numel() for p in AutoModel.from_config(deepcopy(config), **options).parameters())
    if size > 2 * there + (1 << 22):
        raise EncoderError(
            f"{path}: config.json describes a model of {size:,} parameters, and its files of weights hold {there:,}; "
            "fetch both again"
        )
    return files


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' report on weights, of which load_transformer says itself what matters."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _pooler_is_optional(config: PretrainedConfig) -> bool:
    from transformers import MODEL_MAPPING

    kind = MODEL_MAPPING.get(type(config), None)
    return inspect.isclass(kind) and "add_pooling_layer" in inspect.signature(kind.__init__).parameters


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


def _lower_case(tokenizer: PreTrainedTokenizerFast) -> None:
    """Lower case first, as sentence-transformers puts it; it is saved with the tokenizer."""
    from tokenizers.normalizers import Lowercase, Sequence

    core = tokenizer.backend_tokenizer
    core.normalizer = Sequence([Lowercase(), *([core.normalizer] if core.normalizer else [])])
