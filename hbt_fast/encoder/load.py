"""Reading a checkpoint's tokenizer and transformer, and refusing those that cannot be used as they are.

No code of a checkpoint is run, only safetensors are read, and every weight must be there and fit: transformers would
make up what is missing, and vectors would differ from one loading to the next.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from hbt_fast.encoder.model import EncoderError
from hbt_fast.encoder.modules import lower_cases

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerFast

SHOWN = 3  # names of weights in a message


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
    """The fast tokenizer of a checkpoint; it lower-cases where sentence-transformers' settings say so.

    Args:
        path: folder or hub name.

    Raises:
        EncoderError: no such checkpoint, no fast tokenizer, or one that cannot be read.
    """
    from transformers import AutoTokenizer

    path = str(path)
    if (path.startswith((".", "/", "~")) or path.count("/") > 1) and not Path(path).is_dir():
        raise EncoderError(f"{path}: no such folder; give a checkpoint folder or a hub name such as xlm-roberta-base")
    if not (Path(path) / "config.json").exists() and (Path(path) / "query" / "config.json").exists():
        raise EncoderError(f"{path} holds two encoders; give {path}/query for queries or {path}/passage for passages")
    if not (Path(path) / "config.json").exists() and (Path(path) / "model" / "config.json").exists():
        raise EncoderError(f"{path} is the folder of a run; give {path}/model, the encoder that it exported")
    with _refusals(path):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    if not tokenizer.is_fast:
        raise EncoderError(f"{path}: no fast tokenizer (tokenizer.json); convert it with transformers first")
    if lower_cases(path):
        _lower_case(tokenizer)
    return tokenizer


def load_transformer(path: str, dropout: float | None = None) -> nn.Module:
    """The transformer of a checkpoint in float32, in evaluation mode, without the pooler that some types have.

    Args:
        path: folder or hub name.
        dropout: replaces every dropout probability of the checkpoint's config.

    Raises:
        EncoderError: no such checkpoint, or one that is damaged, incomplete or not an encoder.
    """
    from transformers import AutoConfig, AutoModel

    with _refusals(path):
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        if getattr(config, "is_encoder_decoder", False):
            raise EncoderError(
                f"{path}: {config.model_type} has an encoder and a decoder, which is not supported; take a model that "
                "is one of them alone, such as xlm-roberta-base"
            )
        for name, value in vars(config).items():
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if dropout is not None and "dropout" in name and number:
                setattr(config, name, dropout)
        options = {"config": config, "dtype": torch.float32, "use_safetensors": True, "trust_remote_code": False}
        # an unused pooler would sit in the optimizer without ever getting a gradient
        options |= {"add_pooling_layer": False} if _pooler_is_optional(config) else {}
        model, info = AutoModel.from_pretrained(path, **options, output_loading_info=True)
    missing = sorted(key for key in info["missing_keys"] if not key.startswith("pooler."))
    if missing:
        raise EncoderError(
            f"{path}: {len(missing)} of the model's weights are not in the checkpoint ({_some(missing)}); fetch it "
            "again, or save it from transformers' AutoModel"
        )
    if isinstance(getattr(model, "pooler", None), nn.Module):
        model.pooler = nn.Identity()  # not None: types without the option call it
    return model


def _pooler_is_optional(config: PretrainedConfig) -> bool:
    from transformers import MODEL_MAPPING

    kind = MODEL_MAPPING.get(type(config), None)
    return inspect.isclass(kind) and "add_pooling_layer" in inspect.signature(kind.__init__).parameters


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


@contextmanager
def _refusals(path: str) -> Iterator[None]:
    """What transformers, tokenizers and safetensors raise for a checkpoint that cannot be loaded, as EncoderError."""
    from safetensors import SafetensorError

    try:
        yield
    except EncoderError:
        raise
    except SafetensorError as error:
        raise EncoderError(
            f"{path}: its weights are no safetensors that can be read ({error}): perhaps a download that stopped, or "
            "git without git-lfs; fetch it again"
        ) from error
    except (OSError, ValueError) as error:
        if "trust_remote_code" in str(error):
            raise EncoderError(
                f"{path}: its own Python code would have to be run, which hbt_fast never does; take a checkpoint of an "
                "architecture that transformers has"
            ) from error
        again = "; fetch it again" if isinstance(error, json.JSONDecodeError) or "valid JSON" in str(error) else ""
        raise EncoderError(f"{path}: not a checkpoint that can be loaded: {error}{again}") from error
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise EncoderError(
            f"{path}: its weights have other sizes than its config.json says; fetch both again"
        ) from error


def _lower_case(tokenizer: PreTrainedTokenizerFast) -> None:
    """Lower case first, as sentence-transformers puts it; it is saved with the tokenizer."""
    from tokenizers.normalizers import Lowercase, Sequence

    core = tokenizer.backend_tokenizer
    core.normalizer = Sequence([Lowercase(), *([core.normalizer] if core.normalizer else [])])
