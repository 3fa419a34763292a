"""Which folder, or hub name, each part of a checkpoint is read from.

Mostly all from one. Older sentence-transformers keep the transformer in a folder of its own (0_Transformer); a LoRA
adapter is a part of a checkpoint, and what it has not is its base's.
"""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from hbt_fast.encoder.checkpoint_files import Fields, find, read_fields, read_list, shown
from hbt_fast.encoder.hub import cache_only
from hbt_fast.encoder.model import EncoderError
from hbt_fast.encoder.weights import weight_files

VOCABULARIES = ("tokenizer.json", "tekken.json", "tokenizer.model")  # each is a whole tokenizer


class Places(NamedTuple):
    """Folders or hub names.

    Attributes:
        transformer: where config.json and the weights are.
        tokenizer: where the tokenizer's files are.
        recorded: where modules.json and all that it speaks of is.
        inner: the transformer's folder, as modules.json there names it; mostly "".
        adapter: of a LoRA adapter that belongs on the transformer; None: there is none.
    """

    transformer: str
    tokenizer: str
    recorded: str
    inner: str
    adapter: str | None


def places(name: str) -> Places:
    """Where the parts of a checkpoint are.

    Args:
        name: folder or hub name.

    Raises:
        EncoderError: no such checkpoint, or an adapter without a base that can be found.
    """
    adapter = read_fields(name, "adapter_config.json")
    if adapter is None:
        inner = _inner(name)
        transformer = _inside(name, inner) if inner else name
        return Places(transformer, transformer, name, inner, None)
    if find(name, "config.json") is not None and weight_files(name):
        raise EncoderError(
            f"{name}: an adapter (adapter_config.json) and a whole model (config.json and its weights) are in one "
            "folder, and which is meant cannot be told; give each a folder of its own"
        )
    below = _base(name, adapter)
    if read_fields(below, "adapter_config.json") is not None:  # perhaps of this one, and so on
        raise EncoderError(f"{adapter.where}: its base {below} is an adapter itself; merge that into its base first")
    base = places(below)
    tokenizer = name if any(find(name, file) for file in VOCABULARIES) else base.tokenizer
    recorded = (base.recorded, base.inner) if read_list(name, "modules.json") is None else (name, "")
    return Places(base.transformer, tokenizer, *recorded, name)


def _inner(name: str) -> str:
    """The folder of the transformer by modules.json; "" where that does not say."""
    modules = read_list(name, "modules.json") or [None]
    path = modules[0].get("path") if isinstance(modules[0], dict) else None
    return path if isinstance(path, str) else ""


def _inside(name: str, inner: str) -> str:
    """The folder on this machine that is inside a checkpoint's; fetched whole from the hub."""
    if (config := find(name, f"{inner}/config.json")) is None:
        raise EncoderError(f"{name}/modules.json: the transformer is in {shown(inner)}, where no config.json is")
    if not os.path.isdir(name):
        from huggingface_hub import snapshot_download

        pattern = f"{PurePosixPath(inner)}/*"
        found = snapshot_download(name, allow_patterns=pattern, local_files_only=cache_only(name))
        return str(Path(found) / inner)
    return str(config.parent)


def _base(name: str, adapter: Fields) -> str:
    """What an adapter was trained on: a hub name, or a folder from here or from the adapter's folder."""
    key = "base_model_name_or_path"
    base = adapter.text(key)
    if not base:
        raise EncoderError(f'{adapter.where}: "{key}" is missing; write the folder or hub name of the adapter\'s base')
    beside = os.path.join(name, base)
    base = beside if os.path.isdir(beside) and not os.path.isdir(base) else base
    try:
        cache_only(base)
    except EncoderError as error:
        raise EncoderError(
            f'{adapter.where}: "{key}", which a LoRA adapter is nothing without, is not to be had: {error}'
        ) from error
    return base
