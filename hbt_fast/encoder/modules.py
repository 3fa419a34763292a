"""What a sentence-transformers checkpoint says of itself: the modules after the transformer, length limit and prompts.

Files are found in a folder or, by a hub name, in the hub and its cache. Modules that are not known are refused: vectors
without them would be wrong.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import NamedTuple

from torch import nn

from hbt_fast.encoder.model import EncoderError
from hbt_fast.encoder.pooling import POOLINGS, Pooling

RECORDED = {  # by sentence-transformers: its name of the pooling, and the switch that older ones have
    "mean": ("mean", "pooling_mode_mean_tokens"),
    "cls": ("cls", "pooling_mode_cls_token"),
    "last": ("lasttoken", "pooling_mode_lasttoken"),
    "weighted_mean": ("weightedmean", "pooling_mode_weightedmean_tokens"),
}
PLACES = {  # in sentence-transformers 6; older ones have them all in sentence_transformers.models
    "Transformer": "base.modules.transformer",
    "Pooling": "sentence_transformer.modules.pooling",
    "Dense": "base.modules.dense",
    "Normalize": "base.modules.normalize",
}
TYPES = {f"sentence_transformers.{place}.{kind}": kind for kind, new in PLACES.items() for place in ("models", new)}
ORDER = re.compile("TPD*N?")  # by first letters
ACTIVATIONS = {kind.__name__: kind for kind in (nn.Tanh, nn.Identity, nn.GELU, nn.ReLU, nn.SiLU, nn.Sigmoid)}
SETTINGS = [  # of the transformer, by the names that sentence-transformers has given it
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
]
AGAIN = "load it in sentence-transformers and save it again"


class Recorded(NamedTuple):
    """What is recorded; None: nothing.

    Attributes:
        pooling: see `Encoder`.
        dense: see `Encoder`; float32.
        max_length: see `Encoder`.
        prompts: see `Encoder`.
    """

    pooling: Pooling | None
    dense: nn.Sequential | None
    max_length: int | None
    prompts: dict[str, str] | None


def read_recorded(name: str) -> Recorded:
    """Read the sentence-transformers files of a checkpoint.

    Args:
        name: folder or hub name.

    Raises:
        EncoderError: a module or a setting of one that is not supported, or a file that cannot be read.
    """
    pooling, layers = None, []
    modules = _json(name, "modules.json", list)
    if modules is not None:
        pooling, layers = _modules(name, modules)
    elif not Path(name).is_dir() and not _known_to_be_absent(name, "modules.json"):
        print(
            f"{name}: no modules.json in the cache, and the hub cannot be asked for one; what is not given (pooling, "
            "length limit, prompts) is the default",
            file=sys.stderr,
        )
    length = _settings(name).get("max_seq_length")
    return Recorded(pooling, nn.Sequential(*layers) if layers else None, length, recorded_prompts(name))


def lower_cases(name: str) -> bool:
    """Whether a checkpoint's texts are put into lower case before they are tokenised.

    Args:
        name: folder or hub name.

    Raises:
        EncoderError: the file cannot be read.
    """
    return bool(_settings(name).get("do_lower_case"))


def recorded_prompts(name: str) -> dict[str, str] | None:
    """Prompts that a checkpoint was trained with, "query" and "passage"; None if it names neither.

    Where it names one, the other has none, as in sentence-transformers. An empty prompt that is recorded counts.

    Args:
        name: folder or hub name.

    Raises:
        EncoderError: the file cannot be read.
    """
    prompts = (_json(name, "config_sentence_transformers.json") or {}).get("prompts") or {}
    found = prompts.get("query"), prompts.get("passage", prompts.get("document"))
    return None if found == (None, None) else {"query": found[0] or "", "passage": found[1] or ""}


def _settings(name: str) -> dict:
    """What is recorded with the transformer: max_seq_length and do_lower_case. The first file that says something."""
    older = SETTINGS[1:] if _json(name, "modules.json", list) else []  # others are not asked for six files in vain
    return next(filter(None, (_json(name, file) for file in (SETTINGS[0], *older))), {})


def _modules(name: str, modules: list) -> tuple[Pooling, list[nn.Module]]:
    """The pooling, and the dense layers with their activations in turns."""
    where = f"{name}/modules.json"
    if not all(
        isinstance(m, dict) and isinstance(m.get("type"), str) and isinstance(m.get("path"), str) for m in modules
    ):
        raise EncoderError(f'{where}: every module must have a "type" and a "path"; {AGAIN}')
    for module in modules:
        if module["type"] not in TYPES:
            raise EncoderError(
                f"{where}: the module {module['path']!r} is a {module['type']}, which is not supported, and vectors "
                f"without it would be others; take a checkpoint of {', '.join(PLACES)} alone"
            )
    kinds = [TYPES[m["type"]] for m in modules]
    if not ORDER.fullmatch("".join(kind[0] for kind in kinds)):
        raise EncoderError(
            f"{where}: the modules are {', '.join(kinds)}; supported are a Transformer, a Pooling, any number of Dense "
            "and then at most one Normalize, in this order"
        )
    if modules[0]["path"]:
        raise EncoderError(
            f"{where}: the transformer is in {modules[0]['path']}; move its files beside modules.json and write "
            '"path": "" there'
        )
    layers = []
    for module, kind in zip(modules[2:], kinds[2:], strict=True):
        config = _json(name, f"{module['path']}/config.json") or {}
        ends = {config.get(f"module_{end}_name") for end in ("input", "output")} - {None, "sentence_embedding"}
        if ends:
            raise EncoderError(
                f"{name}/{module['path']}/config.json: a {kind} of {', '.join(map(str, ends))} is not supported; it "
                "can be of sentence_embedding alone"
            )
        if kind == "Dense":
            layers += _dense(name, module["path"], config)
    for before, after in zip(layers[::2], layers[2::2], strict=False):
        if before.out_features != after.in_features:
            raise EncoderError(
                f"{where}: a Dense that gives {before.out_features} dimensions is followed by one that takes "
                f"{after.in_features}; fetch the checkpoint again"
            )
    return _pooling(name, modules[1]["path"]), layers


def _pooling(name: str, folder: str) -> Pooling:
    config = _json(name, f"{folder}/config.json") or {}
    modes = config.get("pooling_mode") or [key for key, on in config.items() if key.startswith("pooling_mode_") and on]
    modes = [modes] if isinstance(modes, str) else modes
    names = {recorded: ours for ours, both in RECORDED.items() for recorded in both}
    if len(modes) != 1 or modes[0] not in names or not config.get("include_prompt", True):
        raise EncoderError(
            f"{name}/{folder}/config.json: a pooling that is not supported; it can be one of {', '.join(POOLINGS)}, "
            "prompt included"
        )
    return names[modes[0]]


def _dense(name: str, folder: str, config: dict) -> tuple[nn.Linear, nn.Module]:
    """A linear layer and its activation."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    where = f"{name}/{folder}"
    activation = str(config.get("activation_function", "torch.nn.modules.activation.Tanh"))
    kind = ACTIVATIONS.get(activation.rpartition(".")[2]) if activation.startswith("torch.nn.") else None
    if kind is None:
        raise EncoderError(
            f"{where}/config.json: the activation {activation} is not supported; it can be one of torch.nn's "
            f"{', '.join(ACTIVATIONS)}"
        )
    if config.get("use_residual"):
        raise EncoderError(
            f"{where}/config.json: a Dense with use_residual is not supported; take a checkpoint without"
        )
    path = _file(name, f"{folder}/model.safetensors")
    if path is None:
        raise EncoderError(f"{where}: no model.safetensors, and weights in other files are not read; {AGAIN}")
    try:
        weights = {key.removeprefix("linear."): tensor for key, tensor in load_file(path).items()}
    except (SafetensorError, OSError) as error:
        raise EncoderError(f"{path}: not a safetensors file that can be read ({error}); fetch it again") from error
    size = config.get("out_features"), config.get("in_features")
    wanted = {"weight": size, "bias": size[:1]} if config.get("bias", True) else {"weight": size}
    found = {key: tuple(tensor.shape) for key, tensor in weights.items()}
    if found != wanted:
        raise EncoderError(f"{path} has {found}, and config.json beside it says {wanted}; fetch both again")
    linear = nn.utils.skip_init(nn.Linear, size[1], size[0], bias="bias" in wanted)  # it would draw random numbers
    linear.load_state_dict(weights)
    return linear, kind()


def _json(name: str, path: str, kind: type = dict) -> dict | list | None:
    """What a file of the checkpoint says; None if it has no such file."""
    file = _file(name, path)
    if file is None:
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise EncoderError(f"{name}/{path}: not valid JSON ({error}); fetch it again") from error
    if not isinstance(content, kind):
        raise EncoderError(f"{name}/{path}: not a JSON {'list' if kind is list else 'object'}; fetch it again")
    return content


def _file(name: str, path: str) -> Path | None:
    """Where a file of the checkpoint is on this machine; None if there is none."""
    from transformers.utils import cached_file

    try:
        found = cached_file(name, path, _raise_exceptions_for_missing_entries=False)
    except OSError as error:
        raise EncoderError(f"{name}/{path}: cannot be fetched: {error}") from error
    return found and Path(found)


def _known_to_be_absent(name: str, path: str) -> bool:
    """Whether the hub has said that the checkpoint has no such file."""
    from huggingface_hub import try_to_load_from_cache

    return try_to_load_from_cache(name, path) is not None
