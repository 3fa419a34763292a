"""What a sentence-transformers checkpoint says of itself: the modules after the transformer, length limit and prompts.

Files are found in a folder or, by a hub name, in the hub and its cache. Modules that are not known are refused: vectors
without them would be wrong.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

from torch import nn

from hbt_fast.encoder.checkpoint_files import Fields, find, read_fields, read_list, shown
from hbt_fast.encoder.layout import places
from hbt_fast.encoder.model import EncoderError, check_finite
from hbt_fast.encoder.pooling import POOLINGS, Pooling
from hbt_fast.encoder.weights import NAMES, read_weights

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
UNLIMITED = 2**31  # tokens; tokenizers without a limit say 1e30
AGAIN = "load it in sentence-transformers and save it again"


class RecordedPrompts(NamedTuple):
    """Prompts as sentence-transformers records them.

    Attributes:
        named: all that have a name there.
        default: the name of the one that is put before texts where none is named; None: nothing is.
    """

    named: dict[str, str]
    default: str | None

    def of(self, kind: str) -> str | None:
        """The prompt of "query" or "passage"; None if the checkpoint names neither.

        Where it names one, the other has its default, else none, as in sentence-transformers. An empty prompt that is
        recorded counts.
        """
        found = self.named.get("query"), self.named.get("passage", self.named.get("document"))
        if found == (None, None) and self.default is None:
            return None
        own = found[kind == "passage"]
        return self.named.get(self.default, "") if own is None else own


class Recorded(NamedTuple):
    """What is recorded; None: nothing.

    Attributes:
        pooling: see `Encoder`.
        dense: see `Encoder`; float32.
        max_length: see `Encoder`.
        prompts: see there.
    """

    pooling: Pooling | None
    dense: nn.Sequential | None
    max_length: int | None
    prompts: RecordedPrompts


def read_recorded(name: str) -> Recorded:
    """Read the sentence-transformers files of a checkpoint.

    Args:
        name: folder or hub name.

    Raises:
        EncoderError: a module or a setting of one that is not supported, or a file that cannot be read.
    """
    name, (pooling, layers) = places(name).recorded, (None, [])
    modules = read_list(name, "modules.json")
    if modules is not None:
        pooling, layers = _modules(name, modules)
    elif not Path(name).is_dir() and not _known_to_be_absent(name, "modules.json"):
        print(
            f"{name}: no modules.json in the cache, and the hub cannot be asked for one; what is not given (pooling, "
            "length limit, prompts) is the default",
            file=sys.stderr,
        )
    length = _settings(name).whole("max_seq_length")
    length = None if length is None or length >= UNLIMITED else length
    return Recorded(pooling, nn.Sequential(*layers) if layers else None, length, recorded_prompts(name))


def lower_cases(name: str) -> bool:
    """Whether a checkpoint's texts are put into lower case before they are tokenised.

    Args:
        name: folder or hub name.

    Raises:
        EncoderError: the file cannot be read.
    """
    return _settings(name).flag("do_lower_case")


def recorded_prompts(name: str) -> RecordedPrompts:
    """The prompts that a checkpoint records.

    Args:
        name: folder or hub name.

    Raises:
        EncoderError: the file cannot be read.
    """
    settings = read_fields(places(name).recorded, "config_sentence_transformers.json")
    if settings is None:
        return RecordedPrompts({}, None)
    prompts = settings.object("prompts")
    named = {key: prompts.text(key) for key in prompts.values}
    default = settings.text("default_prompt_name")
    if default is not None and named.get(default) is None:
        names = ", ".join(map(shown, named))
        raise EncoderError(
            f'{settings.where}: "default_prompt_name" is {shown(default)}, and "prompts" has {names or "none"}; write '
            "null or one of these"
        )
    return RecordedPrompts({key: prompt for key, prompt in named.items() if prompt is not None}, default)


def _settings(name: str) -> Fields:
    """What is recorded with the transformer: max_seq_length and do_lower_case. The first file that says something."""
    parts = places(name)
    older = SETTINGS[1:] if read_list(parts.recorded, "modules.json") else []  # six files not asked for in vain
    found = (read_fields(parts.recorded, os.path.join(parts.inner, file)) for file in (SETTINGS[0], *older))
    return next((fields for fields in found if fields and fields.values), Fields(name, {}))


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
    layers = []
    for module, kind in zip(modules[2:], kinds[2:], strict=True):
        config = _config(name, module["path"])
        ends = {config.text(f"module_{end}_name") for end in ("input", "output")} - {None, "sentence_embedding"}
        if ends:
            raise EncoderError(
                f"{config.where}: a {kind} of {', '.join(ends)} is not supported; it can be of sentence_embedding alone"
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


def _config(name: str, folder: str) -> Fields:
    """The settings of a module; empty where there are none."""
    path = f"{folder}/config.json"
    return read_fields(name, path) or Fields(f"{name}/{path}", {})


def _pooling(name: str, folder: str) -> Pooling:
    config = _config(name, folder)
    modes = config.values.get("pooling_mode")
    if modes is None:
        modes = [key for key in config.values if key.startswith("pooling_mode_") and config.flag(key)]
    modes = modes if isinstance(modes, list) else [modes]
    names = {recorded: ours for ours, both in RECORDED.items() for recorded in both}
    known = len(modes) == 1 and isinstance(modes[0], str) and modes[0] in names
    if not known or not config.flag("include_prompt", True):
        raise EncoderError(
            f"{config.where}: a pooling that is not supported; it can be one of {', '.join(POOLINGS)}, prompt included"
        )
    return names[modes[0]]


def _dense(name: str, folder: str, config: Fields) -> tuple[nn.Linear, nn.Module]:
    """A linear layer and its activation."""
    where = f"{name}/{folder}"
    activation = config.text("activation_function") or "torch.nn.modules.activation.Tanh"
    kind = ACTIVATIONS.get(activation.rpartition(".")[2]) if activation.startswith("torch.nn.") else None
    if kind is None:
        raise EncoderError(
            f"{config.where}: the activation {activation} is not supported; it can be one of torch.nn's "
            f"{', '.join(ACTIVATIONS)}"
        )
    if config.flag("use_residual"):
        raise EncoderError(f"{config.where}: a Dense with use_residual is not supported; take a checkpoint without")
    path = next(filter(None, (find(name, f"{folder}/{file}") for file in NAMES)), None)
    if path is None:
        raise EncoderError(f"{where}: no {' or '.join(NAMES)}, and weights in other files are not read; {AGAIN}")
    weights = {key.removeprefix("linear."): tensor for key, tensor in read_weights(path).items()}
    size = config.whole("out_features"), config.whole("in_features")
    wanted = {"weight": size, "bias": size[:1]} if config.flag("bias", True) else {"weight": size}
    found = {key: tuple(tensor.shape) for key, tensor in weights.items()}
    if found != wanted:
        raise EncoderError(f"{path} has {found}, and config.json beside it says {wanted}; fetch both again")
    check_finite(weights.items(), str(path))
    linear = nn.utils.skip_init(nn.Linear, size[1], size[0], bias="bias" in wanted)  # it would draw random numbers
    linear.load_state_dict(weights)
    return linear, kind()


def _known_to_be_absent(name: str, path: str) -> bool:
    """Whether the hub has said that the checkpoint has no such file."""
    from huggingface_hub import try_to_load_from_cache

    return try_to_load_from_cache(name, path) is not None
