"""The folder of a checkpoint with the rows of some tokens alone, and the whole checkpoint again after training.

Tensors, settings and module files are taken over as they are; what has a row per token is cut to the tokens that are
kept, and every token id is numbered anew.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from hbt_fast.encoder.checkpoint_files import find, read_fields, read_list
from hbt_fast.encoder.kept import KEPT, Kept, table_hash, vocabulary_hash
from hbt_fast.encoder.model import EncoderError
from hbt_fast.encoder.modules import SETTINGS
from hbt_fast.encoder.per_token import Layout, read_layout, read_tables, renumbered, tensors
from hbt_fast.encoder.vocabulary import Core, cut_core, names_by_id

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def write_cut(
    path: str, folder: Path, tokenizer: PreTrainedTokenizerFast, core: Core, layout: Layout, old_k: np.ndarray
) -> tuple[int, int]:
    """Write a checkpoint with some of its tokens.

    Args:
        path: of the whole one, folder or hub name.
        folder: that is there, and empty.
        tokenizer: of the whole one, from `load_tokenizer`.
        core: its JSON.
        layout: see `read_layout`.
        old_k: (k,) the ids that are kept, ascending; see `hbt_fast.encoder.vocabulary`.

    Returns:
        parameters before and after.

    Raises:
        EncoderError: see `read_tables`.
    """
    index = torch.from_numpy(old_k)
    kept = Kept(
        model=Path(path).resolve().name if Path(path).is_dir() else path,  # nobody else's folders are of interest
        rows=layout.rows,
        vocabulary=vocabulary_hash(names_by_id(core)),
        table=table_hash(read_tables(path, layout)[layout.inputs]),
        ids=Kept.runs(old_k),
    )
    counts = [0, 0]

    def cut(name: str, tensor: Tensor) -> Tensor:
        table = layout.table_of(name, tuple(tensor.shape))
        made = tensor if table is None else tensor.index_select(layout.tables[table], index)
        counts[0] += tensor.numel()
        counts[1] += made.numel()
        return made

    _write_tensors(path, folder, cut)
    new = {old: number for number, old in enumerate(old_k.tolist())}
    _write_config(path, folder, layout, len(old_k), new.get)
    _copy_modules(path, folder)
    fields = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # others build theirs anew, from other files too
        "model_input_names": tokenizer.model_input_names,
        KEPT: asdict(kept),
    }
    _write_tokenizer(tokenizer, folder, cut_core(core, old_k.tolist()), fields)
    return counts[0], counts[1]


def write_restored(path: str, full: str, folder: Path, core: Core, tokenizers: tuple[Any, Any]) -> int:
    """Write a whole checkpoint: that which was trained, with the rows of all tokens that had been cut.

    Args:
        path: folder of the trained one.
        full: of the whole one, folder or hub name.
        folder: that is there, and empty.
        core: the whole one's tokenizer, as JSON.
        tokenizers: the trained one's and the whole one's, from `load_tokenizer`.

    Returns:
        rows that were trained.

    Raises:
        EncoderError: the two do not belong together.
    """
    kept, small, large = Kept.read(path), read_layout(path), read_layout(full)
    old_k, names = kept.old_k, names_by_id(core)
    if vocabulary_hash(names) != kept.vocabulary or large.rows != kept.rows:
        raise EncoderError(
            f"{full}: its vocabulary ({len(names):,} tokens, {large.rows:,} rows) is not that of {kept.model}, from "
            f"which {path} was cut ({kept.rows:,} rows); give that model"
        )
    mine = names_by_id(json.loads(tokenizers[0].backend_tokenizer.to_str()))
    if small.rows != len(old_k) or mine != {new: names[old] for new, old in enumerate(old_k.tolist())}:
        raise EncoderError(
            f'{path}: it has {len(mine):,} tokens and {small.rows:,} rows, and "{KEPT}" in tokenizer_config.json is of '
            f"{len(old_k):,} tokens, or of others; tokens that were added after the cut cannot be restored"
        )
    whole = read_tables(full, large)
    if table_hash(whole[large.inputs]) != kept.table:
        raise EncoderError(
            f"{full}: its vocabulary is that of {kept.model}, from which {path} was cut, but its table of embeddings "
            "is another (trained further, or of another dtype); give the very model"
        )
    index = torch.from_numpy(old_k)

    def restore(name: str, tensor: Tensor) -> Tensor:
        table = small.table_of(name, tuple(tensor.shape))
        if table is None:
            return tensor
        if table not in whole:
            raise EncoderError(f"{full}: it has no {table}, which {path} has; give the model that it was cut from")
        dtype = torch.promote_types(tensor.dtype, whole[table].dtype)  # either way no bit is lost
        return whole[table].to(dtype, copy=True).index_copy_(small.tables[table], index, tensor.to(dtype))

    _write_tensors(path, folder, restore)
    ids = old_k.tolist()
    _write_config(path, folder, small, kept.rows, lambda new: ids[new] if 0 <= new < len(ids) else None)
    _copy_modules(path, folder)
    tokenizers[1].model_max_length = tokenizers[0].model_max_length
    _write_tokenizer(tokenizers[1], folder, core, {})
    return len(ids)


def _write_tensors(path: str, folder: Path, change: Callable[[str, Tensor], Tensor]) -> None:
    from safetensors.torch import save_file

    made = {name: change(name, tensor).contiguous() for name, tensor in tensors(path)}
    save_file(made, folder / "model.safetensors", {"format": "pt"})


def _write_config(path: str, folder: Path, layout: Layout, rows: int, new: Callable[[int], int | None]) -> None:
    values = read_fields(path, "config.json").values | layout.specials
    _write_json(folder / "config.json", {**renumbered(values, new), "vocab_size": rows})


def _write_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path, core: Core, fields: dict[str, Any]) -> None:
    """Write a tokenizer with the core and the fields of its settings that are given."""
    before = set(folder.iterdir())
    tokenizer.save_pretrained(folder)
    for file in set(folder.iterdir()) - before:
        if file.name not in TOKENIZER_FILES:
            file.unlink()  # the vocabulary in another form, with the whole model's ids
    (folder / "tokenizer.json").write_text(json.dumps(core, ensure_ascii=False), encoding="utf-8")
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")) | fields
    settings.pop("added_tokens_decoder", None)  # tokenizer.json has these, with their ids
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # the same, by the name that transformers 4 has too
    _write_json(folder / "tokenizer_config.json", settings)


def _copy_modules(path: str, folder: Path) -> None:
    """Copy what sentence-transformers has beside the transformer."""
    modules = read_list(path, "modules.json") or []
    places = [module["path"] for module in modules if isinstance(module, dict) and module.get("path")]
    inner = [f"{place}/{name}" for place in places for name in ("config.json", "model.safetensors")]
    for name in ("modules.json", "config_sentence_transformers.json", "README.md", *SETTINGS, *inner):
        if (file := find(path, name)) is not None:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(file.read_bytes())
    for name in SETTINGS:
        settings = read_fields(str(folder), name)
        if settings is not None and settings.values.get("do_lower_case"):
            _write_json(folder / name, {**settings.values, "do_lower_case": False})  # tokenizer.json does it now
    for place in places:
        (folder / place).mkdir(parents=True, exist_ok=True)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
