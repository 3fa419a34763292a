"""What is trained: the encoder of queries and that of passages (one and the same, or two), and the temperature.

Made from the settings by `make_towers`: a checkpoint or an encoder from nothing, with LoRA adapters, gradient
checkpointing and torch.compile where they are asked for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hbt_fast.base.files import whole_folder
from hbt_fast.base.ranges import NAME, ranges, real, whole
from hbt_fast.encoder.export import check_place, write, write_adapter
from hbt_fast.encoder.model import Encoder, EncoderError, room
from hbt_fast.encoder.prompts import KINDS, choose_prompts, name_of_source
from hbt_fast.encoder.scratch import encoder_from_scratch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from hbt_fast.config import ModelConfig


@ranges(rank=whole(0, 2**16), alpha=real(0, 1e6, above=True), dropout=real(0, 1, below=True), target_modules=NAME)
@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (arXiv 2106.09685) by peft: only they are trained; the exported model has them merged in.

    Args:
        rank: of the adapters; 0 trains the whole model.
        alpha: their output is scaled by alpha / rank.
        dropout: on their input.
        target_modules: names of the modules that get one, as in peft; null: every linear layer.
    """

    rank: int = 0
    alpha: float = 16.0
    dropout: float = 0.0
    target_modules: list[str] | None = None


class Towers(nn.Module):
    """One encoder for queries and passages, or one for each, and the logarithm of the loss's scale if it is learned.

    Args:
        encoders: [both] or [of queries, of passages].
        temperature: the first one, where it is learned; None: it is not.
    """

    def __init__(self, encoders: Sequence[Encoder], temperature: float | None = None) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(encoders)
        # of one dimension, as ZeRO wants parameters; a logarithm (CLIP's form) stays a scale whatever is added to it
        log_scale = None if temperature is None else nn.Parameter(torch.tensor([-math.log(temperature)]))
        self.register_parameter("log_scale", log_scale)

    @property
    def queries(self) -> Encoder:
        """The encoder of queries."""
        return self.encoders[0]

    @property
    def passages(self) -> Encoder:
        """The encoder of passages."""
        return self.encoders[-1]

    def forward(self, tokens: Tensor, cu_seqlens: Tensor, tower: int = 0) -> tuple[Tensor, Tensor | None]:
        """Embed packed texts; see `Encoder.forward`.

        Args:
            tokens: (T,) int token ids.
            cu_seqlens: (n + 1,) int.
            tower: which encoder.

        Returns:
            (n, d) unit vectors, and the (1,) logarithm of the scale (None if it is not learned). It is part of the
            output, for ZeRO-3 has a parameter whole only while the module's forward runs.
        """
        log_scale = None if self.log_scale is None else self.log_scale * 1
        return self.encoders[tower](tokens, cu_seqlens), log_scale

    def frozen(self) -> dict[str, Tensor]:
        """The parameters that are not trained (under LoRA), by name."""
        return {name: p.detach() for name, p in self.named_parameters() if not p.requires_grad}

    def load_trained(self, parameters: dict[str, Tensor]) -> None:
        """Take the trained parameters from a checkpoint.

        Args:
            parameters: by name; what an engine's `state()` gave.

        Raises:
            EncoderError: they are of another model.
        """
        mine = {name: tuple(p.shape) for name, p in self.named_parameters() if p.requires_grad}
        theirs = {name: tuple(p.shape) for name, p in parameters.items()}
        if mine != theirs:
            names = sorted(name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name))
            shapes = f"{theirs.get(names[0], 'not there')}, the model wants {mine.get(names[0], 'none')}"
            raise EncoderError(
                f"the checkpoint is of another model: {len(names)} parameters differ, the first is {names[0]}: {shapes}"
            )
        self.load_state_dict(parameters, strict=False)

    def record_prompts(self, source: str, texts: Sequence[str]) -> None:
        """Have the prompts of a source recorded with the export, where they are others than the model's.

        Args:
            source: its name.
            texts: the prompt of its queries, and that of its passages.
        """
        for encoder in self.encoders:
            if [encoder.prompts[kind] for kind in KINDS] != list(texts):
                encoder.prompts |= {name_of_source(source, kind): text for kind, text in zip(KINDS, texts, strict=True)}

    def export(self, folder: Path) -> list[Path]:
        """Write what was trained as folders for AutoModel and SentenceTransformer, adapters merged in.

        Args:
            folder: of the one encoder; with two, of query/ and passage/. With LoRA, adapter/ is peft's own form.

        Returns:
            The folders.

        Raises:
            EncoderError, FileError: see `hbt_fast.encoder.export.export`.
        """
        names = [""] if len(self.encoders) == 1 else ["query", "passage"]
        check_place(folder)
        with whole_folder(folder) as begun:
            for name, encoder in zip(names, self.encoders, strict=True):
                (begun / name).mkdir(exist_ok=True)
                if hasattr(encoder.model, "merge_and_unload"):
                    write_adapter(encoder.model, begun / name / "adapter")
                    encoder.model = encoder.model.merge_and_unload()
                write(encoder, begun / name)
        return [folder / name for name in names]


def make_towers(
    model: ModelConfig,
    tokenizer: PreTrainedTokenizerFast,
    *,
    seed: int = 0,
    temperature: float | None = None,
    autocast: torch.dtype | None = None,
) -> Towers:
    """The towers that the settings describe, in float32 on the CPU.

    Args:
        model: the settings.
        tokenizer: of the training data; used for encoders from nothing.
        seed: of random weights and adapters; both towers start alike.
        temperature: see `Towers`.
        autocast: dtype of the matrix products in training; None: float32.

    Raises:
        EncoderError: a checkpoint that cannot be used, longer texts than it has positions for, or adapters or gradient
            checkpointing that it does not have modules for.
    """
    encoders = [_encoder(model, tokenizer, seed) for _ in range(2 if model.separate_towers else 1)]
    for encoder in encoders:
        _check_lengths(model, encoder)
        encoder.autocast = autocast
        if model.lora.rank:
            _add_adapters(encoder, model.lora, seed)
        if model.gradient_checkpointing:
            _checkpoint_layers(encoder)
        if model.compile:
            encoder.model.compile(dynamic=True)
            encoder.packs = False  # every batch has other texts, and would be compiled anew
    return Towers(encoders, temperature)


def _encoder(model: ModelConfig, tokenizer: PreTrainedTokenizerFast, seed: int) -> Encoder:
    given = {"query": model.query_prompt, "passage": model.passage_prompt}
    prompts = dict(zip(KINDS, choose_prompts(model.path, given).texts, strict=True))
    if model.path is None:
        dropout = 0.1 if model.dropout is None else model.dropout
        shape = model.scratch
        encoder = encoder_from_scratch(tokenizer, shape, max_length=model.max_length, dropout=dropout, seed=seed)
        encoder.pooling, encoder.prompts = model.pooling or "mean", prompts
        return encoder
    options = {"pooling": model.pooling, "max_length": model.max_length, "dropout": model.dropout}
    return Encoder.from_pretrained(model.path, prompts=prompts, **options)


def _check_lengths(model: ModelConfig, encoder: Encoder) -> None:
    """See that the texts of training fit, before the step at which the first long one comes."""
    most = room(encoder.model)
    for name in ("query_max_length", "passage_max_length"):
        if (length := getattr(model, name)) > most:
            instead = " (as many as model.max_length, which can be raised)" if model.path is None else ""
            raise EncoderError(
                f"model.{name} is {length:,}, and the model has positions for {most:,}{instead}; write {most} or less"
            )


def _checkpoint_layers(encoder: Encoder) -> None:
    enable = getattr(encoder.model, "activation_checkpointing_enable", None)  # the name from transformers 5.20 on
    try:
        (enable or encoder.model.gradient_checkpointing_enable)({"use_reentrant": False})
    except ValueError:
        raise EncoderError(
            f"model.gradient_checkpointing: transformers' {encoder.model.config.model_type} does not support it; write "
            "false, and lower train.micro_batch_tokens if memory is short"
        ) from None


def _add_adapters(encoder: Encoder, lora: LoraConfig, seed: int) -> None:
    try:
        import peft
    except ImportError:
        raise EncoderError('model.lora.rank is set, which needs peft: pip install "peft>=0.17"') from None
    settings = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules or "all-linear",
        task_type=peft.TaskType.FEATURE_EXTRACTION,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            encoder.model = peft.get_peft_model(encoder.model, settings)
        except ValueError as error:
            raise EncoderError(f"model.lora.target_modules: {error}") from None
