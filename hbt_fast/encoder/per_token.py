"""What a checkpoint has per token: tables of embeddings, rows of heads, ids in its settings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hbt_fast.encoder.checkpoint_files import Fields, read_fields, refusals
from hbt_fast.encoder.load import _load_config
from hbt_fast.encoder.model import EncoderError
from hbt_fast.encoder.weights import read_weights, weight_files

if TYPE_CHECKING:
    from transformers import PretrainedConfig

TOKEN_IDS = ("_token_id", "_token_ids")  # ends of keys of config.json


@dataclass(frozen=True)
class Layout:
    """Where a checkpoint has something per token.

    Attributes:
        rows: tokens that its tables have a row for.
        tables: name of each such tensor, as the model's classes have it -> the dimension that counts tokens.
        inputs: the name of the table of embeddings among these.
        fixed: ids below this stay where they are: positions of RoBERTa's kin are counted from the padding token's id.
        specials: the fields of config.json that hold token ids, those too that have the values of their class.
    """

    rows: int
    tables: Mapping[str, int]
    inputs: str
    fixed: int
    specials: Mapping[str, Any]

    @property
    def special_ids(self) -> set[int]:
        """The token ids that config.json names, and that have a row."""
        found: set[int] = set()
        renumbered(dict(self.specials), found.add)
        return {number for number in found if 0 <= number < self.rows}

    def table_of(self, name: str, tensor_shape: tuple[int, ...]) -> str | None:
        """The name by which classes know a tensor of a file, if it is one of `tables`; heads have a prefix there."""
        names = (table for table in self.tables if name == table or name.endswith(f".{table}"))
        table = min(names, key=len, default=None)
        return table if table and tensor_shape[self.tables[table]] == self.rows else None


def read_layout(path: str) -> Layout:
    """Find what a checkpoint has per token: its classes are made with one token more, without memory, and compared.

    Args:
        path: folder or hub name.

    Raises:
        EncoderError: not a checkpoint that can be loaded, or a model without a table of embeddings of vocab_size rows.
    """
    import transformers

    fields = read_fields(path, "config.json")
    if fields is None:
        raise EncoderError(f"{path}: no config.json there; give a checkpoint folder or a hub name")
    config = _load_config(path, fields)
    rows = getattr(config, "vocab_size", None)
    if not isinstance(rows, int):
        raise EncoderError(f'{fields.where}: no "vocab_size", so its vocabulary cannot be cut; use the model whole')
    larger = deepcopy(config)
    larger.vocab_size = rows + 1
    tables = {}
    with refusals(f"{path}/config.json", "no model can be made from it"), torch.device("meta"):
        for kind in (transformers.AutoModel.from_config, *_with_head(fields, config)):
            small, large = kind(deepcopy(config)), kind(deepcopy(larger))
            shapes = {name: tensor.shape for name, tensor in large.state_dict().items()}
            for name, tensor in small.state_dict().items():
                changed = [i for i, size in enumerate(tensor.shape) if shapes[name][i] != size]
                tables |= {name: changed[0]} if changed else {}
        model = transformers.AutoModel.from_config(config)
        inputs = next((n for n, p in model.named_parameters() if p is model.get_input_embeddings().weight), None)
    if tables.get(inputs) != 0:
        raise EncoderError(
            f"{path}: the vocabulary of {config.model_type} cannot be cut, for its embeddings are no table of "
            "vocab_size rows; use the model whole"
        )
    counted = [
        module.padding_idx % module.num_embeddings + 1
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and module.padding_idx is not None and f"{name}.weight" not in tables
    ]
    given = config.to_dict().items()
    specials = {key: value for key, value in given if key.endswith(TOKEN_IDS) and value is not None}
    return Layout(rows, tables, inputs, max(counted, default=0), specials)


def read_tables(path: str, layout: Layout) -> dict[str, Tensor]:
    """The tensors of `Layout.tables` that a checkpoint's files have, by these names.

    Raises:
        EncoderError: a file that cannot be read, or no table of embeddings of the size that config.json says.
    """
    found = {}
    for name, tensor in tensors(path):
        if (table := layout.table_of(name, tuple(tensor.shape))) is not None:
            found[table] = tensor
    if layout.inputs not in found:
        raise EncoderError(
            f"{path}: no table of embeddings ({layout.inputs}) of {layout.rows:,} rows (vocab_size in config.json) in "
            "its files of weights; fetch the checkpoint again"
        )
    return found


def tensors(path: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a checkpoint's files by name, one after the other.

    Args:
        path: folder or hub name.

    Raises:
        EncoderError: no files of weights, or broken ones.
    """
    from safetensors import safe_open

    files = weight_files(path)
    if not files:
        raise EncoderError(
            f"{path}: no file named model.safetensors or pytorch_model.bin there; save the model with transformers' "
            "save_pretrained"
        )
    for file in files:
        if file.suffix == ".bin":
            yield from read_weights(file).items()
            continue
        with refusals(str(file), "its weights are no safetensors that can be read"), safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a dict
                yield name, opened.get_tensor(name)


def renumbered(settings: Any, new: Callable[[int], int | None], named: bool = False) -> Any:
    """Settings with other token ids.

    Args:
        settings: of config.json.
        new: the new id of an old one; None: it has none, and null is written.
        named: whether `settings` itself is an id, or a list of them.
    """
    if isinstance(settings, dict):
        return {key: renumbered(value, new, key.endswith(TOKEN_IDS)) for key, value in settings.items()}
    if isinstance(settings, list):
        return [renumbered(value, new, named) for value in settings]
    return new(settings) if named and isinstance(settings, int) and not isinstance(settings, bool) else settings


def _with_head(fields: Fields, config: PretrainedConfig) -> list[Callable[[PretrainedConfig], nn.Module]]:
    """The class that a checkpoint was saved from, which may have a head with something per token."""
    import transformers

    names = fields.values.get("architectures")
    names = [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
    kinds = [getattr(transformers, name, None) for name in names]
    return [k for k in kinds if isinstance(k, type) and isinstance(config, getattr(k, "config_class", None) or ())]
