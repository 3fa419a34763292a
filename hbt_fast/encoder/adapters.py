"""Merging a LoRA adapter that peft wrote into its base. Every weight of it must fit, or vectors would be the base's."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hbt_fast.encoder.checkpoint_files import Fields, find, read_fields, refusals, shown
from hbt_fast.encoder.model import EncoderError, check_finite
from hbt_fast.encoder.weights import read_weights

FILE = "adapter_model.safetensors"
TAKEN = (  # of adapter_config.json
    "r", "lora_alpha", "target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora",
    "fan_in_fan_out", "bias", "lora_bias", "modules_to_save", "layers_to_transform", "layers_pattern",
)  # fmt: skip
IDLE = (  # of it too, without a say in what the merged model computes
    "auto_mapping", "base_model_name_or_path", "inference_mode", "lora_dropout", "init_lora_weights", "peft_type",
    "peft_version", "task_type", "ensure_weight_tying",
)  # fmt: skip
FIRST_WEIGHTS = (None, True, False, "gaussian", "orthogonal")  # other ways to begin change the base's weights
PREFIX = "base_model.model."
ANEW = (
    'python -c "import sys, torch; from safetensors.torch import save_file as save; '
    "save(torch.load(sys.argv[1], 'cpu', weights_only=True), sys.argv[1][:-3] + 'safetensors')\" '{}'"
)
SHOWN = 3  # names of weights in a message


def merge_adapter(model: nn.Module, name: str) -> nn.Module:
    """The base with the adapter's weights added to its own, as if it had been trained whole.

    Args:
        model: the base, in float32; it is changed.
        name: folder or hub name of the adapter.

    Raises:
        EncoderError: peft is not installed, a kind or a setting of adapters that is not supported, or weights that are
            missing, not finite or of another base.
    """
    try:
        import peft
    except ImportError:
        raise EncoderError(
            f'{name}: a LoRA adapter, and merging it into its base needs peft: pip install "peft>=0.17"; or merge it '
            'elsewhere (PeftModel.from_pretrained(...).merge_and_unload().save_pretrained("MERGED"), and the '
            "tokenizer's save_pretrained too) and give that folder"
        ) from None
    fields = read_fields(name, "adapter_config.json")
    taken = _settings(fields, vars(peft.LoraConfig()))
    weights = _weights(name, model)
    _resize(model, weights)
    table = _table(model)
    with refusals(fields.where, "peft does not take it for this base"), torch.random.fork_rng(devices=[]):
        merged = peft.get_peft_model(model, peft.LoraConfig(**taken))
        wanted = peft.get_peft_model_state_dict(merged, save_embedding_layers=False)
    given = {key: weight for key, weight in weights.items() if key != table or table in wanted}
    shapes, theirs = ({key: tuple(w.shape) for key, w in group.items()} for group in (wanted, given))
    if wrong := sorted(key for key in shapes.keys() | theirs.keys() if shapes.get(key) != theirs.get(key)):
        raise EncoderError(
            f"{name}/{FILE}: {len(wrong)} weights do not fit the base that adapter_config.json names "
            f"({', '.join(wrong[:SHOWN])}{', ...' if len(wrong) > SHOWN else ''}); fetch both again, or name the model "
            "that it was trained on"
        )
    with refusals(f"{name}/{FILE}", "peft cannot merge it"):
        peft.set_peft_model_state_dict(merged, weights)
        return merged.merge_and_unload().requires_grad_(True).eval()


def _settings(fields: Fields, defaults: dict) -> dict:
    """What LoraConfig is made of."""
    if (kind := fields.text("peft_type")) != "LORA":
        raise EncoderError(f'{fields.where}: "peft_type" is {shown(kind)}; LORA alone is read: merge it with peft')
    for key, value in fields.values.items():
        if key == "init_lora_weights" and not (isinstance(value, bool | str | None) and value in FIRST_WEIGHTS):
            raise EncoderError(f'{fields.where}: "{key}" is {shown(value)}, which changes the base; merge it with peft')
        if key not in TAKEN + IDLE and value and value != defaults.get(key):
            raise EncoderError(f'{fields.where}: "{key}" is {shown(value)}, which is not supported; merge it with peft')
    return {key: fields.values[key] for key in TAKEN if fields.values.get(key) is not None}


def _weights(name: str, model: nn.Module) -> dict[str, Tensor]:
    """The adapter's weights, by the names that they have on a model without a head."""
    if (file := find(name, FILE)) is None:
        old = find(name, "adapter_model.bin")
        how = (
            "fetch it again" if old is None else f"write it anew, where you trust adapter_model.bin: {ANEW.format(old)}"
        )
        raise EncoderError(f"{name}: no {FILE} there, and adapters in other files are not read; {how}")
    weights = {key: w for key, w in read_weights(file).items() if ".pooler." not in key}  # load_transformer has none
    check_finite(weights.items(), str(file))
    headed = f"{PREFIX}{getattr(model, 'base_model_prefix', '')}."
    if weights and headed != f"{PREFIX}." and all(key.startswith(headed) for key in weights):
        weights = {PREFIX + key.removeprefix(headed): weight for key, weight in weights.items()}
    return weights


def _table(model: nn.Module) -> str:
    """The name that the token embeddings have in an adapter's file."""
    table = model.get_input_embeddings()
    return f"{PREFIX}{next(name for name, module in model.named_modules() if module is table)}.weight"


def _resize(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Make room for tokens that were added to the base, where the adapter's file has their embeddings."""
    table = weights.get(_table(model))
    if table is not None and len(table) != model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(table), mean_resizing=False)
