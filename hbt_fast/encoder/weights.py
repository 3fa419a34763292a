"""Files of weights: which a checkpoint has, what is in them, and their tensors. No pickle is run.

safetensors come first. pytorch_model.bin is a pickle, of which torch's weights_only unpickler takes tensors and plain
containers alone; whatever else is in it is refused.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from hbt_fast.encoder.checkpoint_files import find, read_fields, refusals, shown
from hbt_fast.encoder.model import EncoderError

NAMES = ("model.safetensors", "pytorch_model.bin")  # the second only where the first is in no form there
DAMAGED = "perhaps a download that stopped, or git without git-lfs; fetch it again"
TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def weight_files(name: str) -> list[Path]:
    """The files of a checkpoint's weights: one, or those that an index names; empty where there are none.

    Args:
        name: folder or hub name.

    Raises:
        EncoderError: the index cannot be read, or names what is not there.
    """
    for whole in NAMES:
        if (file := find(name, whole)) is not None:
            return [file]
        if (index := read_fields(name, f"{whole}.index.json")) is not None:
            names = index.object("weight_map").values.values()
            return [_part(name, index.where, part) for part in dict.fromkeys(map(_text, names))]
    return []


def contents(file: Path) -> Iterator[tuple[str, tuple[int, ...], torch.dtype | str]]:
    """Name, shape and dtype of each tensor in a file of weights; of safetensors nothing more is read.

    Args:
        file: .safetensors or .bin.

    Raises:
        EncoderError: the file is damaged, or a pickle of more than tensors.
    """
    if file.suffix == ".bin":
        for name, tensor in read_weights(file).items():
            yield name, tuple(tensor.shape), tensor.dtype
        return
    from safetensors import safe_open

    with refusals(str(file), "its weights are no safetensors that can be read", DAMAGED), safe_open(file, "pt") as all_:
        for name in all_.keys():  # noqa: SIM118 - not a dict
            part = all_.get_slice(name)
            yield name, tuple(part.get_shape()), TYPES.get(part.get_dtype(), part.get_dtype())


def read_weights(file: Path) -> dict[str, Tensor]:
    """The tensors of a file of weights, on the CPU, as they are there.

    Args:
        file: .safetensors or .bin.

    Raises:
        EncoderError: the file is damaged, or a pickle of more than tensors.
    """
    if file.suffix != ".bin":
        from safetensors.torch import load_file

        with refusals(str(file), "not a safetensors file that can be read"):
            return load_file(file)
    instead = f"take a checkpoint with {NAMES[0]}, or {DAMAGED}"
    with refusals(str(file), "more than tensors is in it, or less, and no pickle is run here", instead):
        found = torch.load(file, "cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
        if not isinstance(found, dict) or not all(isinstance(tensor, Tensor) for tensor in found.values()):
            raise TypeError("not a dictionary of tensors")
    return {str(name): tensor for name, tensor in found.items()}


def _part(name: str, where: str, part: str) -> Path:
    if (file := find(name, part)) is None:
        raise EncoderError(f"{where}: it names {part}, which is not there; fetch it again")
    return file


def _text(name: object) -> str:
    return name if isinstance(name, str) else shown(name)
