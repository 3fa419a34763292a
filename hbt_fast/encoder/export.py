"""Writing an encoder as a folder that AutoModel and SentenceTransformer both load, with equal embeddings."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from hbt_fast.base.files import whole_folder
from hbt_fast.encoder.model import Encoder, EncoderError, check_finite, room
from hbt_fast.encoder.modules import RECORDED, UNLIMITED

if TYPE_CHECKING:
    from peft import PeftModel

OF_A_CALL = (  # in tokenizer_config.json: how it was loaded, and what the tokenizer was last called with
    "is_local",
    "local_files_only",
    "name_or_path",
    "max_length",
    "stride",
    "truncation_strategy",
    "pad_to_multiple_of",
    "pad_token_type_id",
)


def export(encoder: Encoder, folder: str | Path, state: dict[str, torch.Tensor] | None = None) -> Path:
    """Write the encoder: safetensors, config, tokenizer and the sentence-transformers files.

    The folder is there whole or not at all; an earlier one at its place stays until then.

    Args:
        encoder: its tokenizer's `model_max_length` becomes as many tokens as the model has positions for. Its prompts
            are written as "query", "passage" and "document" (sentence-transformers' own name), and
            those of other names as they are.
        folder: made if absent, replaced if there.
        state: parameters by the encoder's names, where the module's own are not whole (ZeRO-3 shards them).

    Returns:
        The folder.

    Raises:
        EncoderError: a weight is NaN or infinite, or the folder is there and no earlier export; nothing is written.
        FileError: the folder cannot be written.
    """
    folder = Path(folder)
    check_place(folder)
    with whole_folder(folder) as begun:
        write(encoder, begun, state)
    return folder


def check_place(folder: Path) -> None:
    """See that nothing but an earlier export would be replaced.

    Raises:
        EncoderError: a file, or a folder with other things in it.
    """
    earlier = [folder / place / "modules.json" for place in ("", "query")]
    if folder.exists() and not (folder.is_dir() and (any(map(Path.exists, earlier)) or not any(folder.iterdir()))):
        raise EncoderError(f"{folder} is there and no earlier export, which alone is replaced; name another folder")


def write(encoder: Encoder, folder: Path, state: dict[str, torch.Tensor] | None = None) -> None:
    """What `export` writes, into a folder that is there.

    Raises:
        EncoderError: a weight is NaN or infinite.
    """
    check_finite(encoder.named_parameters() if state is None else state.items(), "what was to be exported")
    if state is None:
        weights = encoder.model.state_dict()
    else:
        weights = {name.removeprefix("model."): value for name, value in state.items() if name.startswith("model.")}
    encoder.model.save_pretrained(folder, state_dict=_pooler(encoder.model) | weights)
    tokenizer = _write_tokenizer(encoder, folder)
    prompts = {**encoder.prompts, "document": encoder.prompts["passage"]}
    pooling = {
        "word_embedding_dimension": encoder.model.config.hidden_size,
        **{flag: encoder.pooling == name for name, (_, flag) in RECORDED.items()},
        "include_prompt": True,
    }
    files = {
        "tokenizer_config.json": tokenizer,
        "sentence_bert_config.json": {"max_seq_length": encoder.max_length, "do_lower_case": False},
        "config_sentence_transformers.json": {
            "prompts": prompts,
            "default_prompt_name": encoder.default_prompt,
            "similarity_fn_name": "cosine",
        },
        "1_Pooling/config.json": pooling,
    }
    paths = ["", "1_Pooling"]
    for i in range(0, len(encoder.dense or ()), 2):
        paths.append(f"{len(paths)}_Dense")
        files[f"{paths[-1]}/config.json"] = _write_dense(encoder, i, folder / paths[-1], state)
    paths.append(f"{len(paths)}_Normalize")
    (folder / paths[-1]).mkdir(exist_ok=True)
    kinds = ["Transformer", *(path[2:] for path in paths[1:])]
    files["modules.json"] = [  # sentence-transformers 3 to 6 understand these types
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(zip(paths, kinds, strict=True))
    ]
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_adapter(model: PeftModel, folder: Path) -> None:
    """Write adapters in peft's own form, over the base's hub name, or that of its folder without the way to it.

    Args:
        model: with the adapters in it.
        folder: made.
    """
    for settings in model.peft_config.values():
        base = settings.base_model_name_or_path or ""
        settings.base_model_name_or_path = Path(base).name if Path(base).is_dir() else base
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)  # peft's form, which nobody has filled in


def _pooler(model: nn.Module) -> dict[str, torch.Tensor]:
    """Zeros for the pooler that AutoModel gives to such a model, and that no vector of ours comes from.

    Without them transformers would make a random one up at every load, and report that as if the export lacked weights.
    """
    from transformers import AutoModel

    with torch.device("meta"):
        whole = AutoModel.from_config(deepcopy(model.config)).state_dict()
    return {name: torch.zeros(w.shape, dtype=model.dtype) for name, w in whole.items() if name.startswith("pooler.")}


def _write_tokenizer(encoder: Encoder, folder: Path) -> dict:
    """Write the tokenizer without what the last call left in it; what is returned is its tokenizer_config.json."""
    tokenizer = encoder.tokenizer
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings = {key: value for key, value in settings.items() if key not in OF_A_CALL}
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # the same, by the name that transformers 4 has too
    # where truncation=True cuts texts off: with more tokens than there are positions the model would crash
    most = min(tokenizer.model_max_length, room(encoder.model))
    if most >= UNLIMITED:
        most = getattr(encoder.model.config, "max_position_embeddings", None) or 0
    settings["model_max_length"] = max(int(most), encoder.max_length)
    return settings


def _write_dense(encoder: Encoder, i: int, folder: Path, state: dict[str, torch.Tensor] | None) -> dict:
    """Write the weights of layer i of `encoder.dense`; what is returned describes it and the activation after it."""
    from safetensors.torch import save_file

    linear, activation = encoder.dense[i], type(encoder.dense[i + 1])
    own = {f"dense.{i}.{name}": p for name, p in linear.named_parameters()} if state is None else state
    weights = {name: own[f"dense.{i}.{name}"].detach().cpu().contiguous() for name, _ in linear.named_parameters()}
    folder.mkdir(exist_ok=True)
    save_file({f"linear.{name}": w for name, w in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    return {
        "in_features": linear.in_features,
        "out_features": linear.out_features,
        "bias": linear.bias is not None,
        "activation_function": f"{activation.__module__}.{activation.__name__}",
    }
