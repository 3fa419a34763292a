"""Text in, unit vectors out: AutoModel, pooling in float32, normalisation.

Shape legend: n texts, T tokens in all, L tokens of the longest, d embedding dimensions.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from hbt_fast.base.errors import UserError
from hbt_fast.encoder import packed
from hbt_fast.encoder.packed import Sequences
from hbt_fast.encoder.pooling import POOLINGS, Pooling, pool

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class EncoderError(UserError):
    """A checkpoint, a setting or texts that cannot be used; the message says why and what to do."""


class Encoder(nn.Module):
    """A transformer with pooling on top; its forward takes packed tokens and returns unit vectors.

    Args:
        model: a Hugging Face encoder (from AutoModel).
        tokenizer: its fast tokenizer.
        pooling: "mean", "cls", "last" or "weighted_mean"; see `hbt_fast.encoder.pooling.pool`.
        max_length: tokens per text in `encode`, special tokens included; no more than the model has positions for.
        prompts: what to put before texts, by name: "query" and "passage", nothing where one is missing, and whatever
            others a checkpoint records.
        autocast: dtype of the matrix products (torch.bfloat16 on GPUs), or None for the weights' own.
        dense: nn.Linear and activation in turns, between pooling and normalisation; None: nothing.
        default_prompt: the name of the prompt that sentence-transformers puts before texts where none is named; it is
            kept for the export, and not put before anything here.

    Attributes:
        packs: whether texts go through the model without padding.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerFast,
        *,
        pooling: Pooling = "mean",
        max_length: int = 512,
        prompts: dict[str, str] | None = None,
        autocast: torch.dtype | None = None,
        dense: nn.Sequential | None = None,
        default_prompt: str | None = None,
    ) -> None:
        super().__init__()
        if pooling not in POOLINGS:
            raise EncoderError(f"model.pooling is {pooling!r}; write one of {', '.join(POOLINGS)}")
        if dense is not None and dense[0].in_features != (width := model.config.hidden_size):
            raise EncoderError(f"dense takes {dense[0].in_features} dimensions, and the model's vectors have {width}")
        self.model, self.tokenizer, self.pooling = model, tokenizer, pooling
        self.prompts, self.default_prompt = {"query": "", "passage": "", **(prompts or {})}, default_prompt
        self.max_length, self.autocast = max_length, autocast
        self.dense = dense
        self.train(model.training)  # what transformers loads is in evaluation mode
        if (most := room(model)) < 1:
            raise EncoderError(
                f"the model has a table of {most:,} positions, which is none for a token; fetch it again"
            )
        if max_length > most:
            self.max_length = int(most)
            print(
                f"the length limit (max_length, --max-length, model.max_length) is {max_length:,}, and the model has "
                f"positions for {most:,}: texts are cut off there",
                file=sys.stderr,
            )
        self.packs = packed.can_pack(model)
        if self.packs:
            packed.prepare(model)
        else:
            print(f"{model.config.model_type} is not known to run without padding; texts are padded", file=sys.stderr)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        pooling: Pooling | None = None,
        max_length: int | None = None,
        prompts: dict[str, str] | None = None,
        dropout: float | None = None,
        autocast: torch.dtype | None = None,
    ) -> Encoder:
        """Load a Hugging Face or sentence-transformers checkpoint, from a folder or by its hub name.

        Weights come as float32 whatever the checkpoint's dtype, from safetensors or, where there are none, from the
        tensors in pytorch_model.bin; no code of the checkpoint is run. A LoRA adapter is merged into its base. What is
        not given (pooling, length limit, prompts) is taken from the checkpoint's sentence-transformers files, else:
        mean, 512, no prompts. Dense layers come from there alone.

        Args:
            path: checkpoint folder or hub name.
            pooling: see the class.
            max_length: see the class.
            prompts: see the class; those that are not named here stay as they are recorded.
            dropout: replaces every dropout probability of the checkpoint's config.
            autocast: see the class.

        Raises:
            EncoderError: no such checkpoint, no weights, no fast tokenizer or one that does not fit, or modules
                that are not supported; damaged, missing or non-finite weights; an architecture that has a decoder
                besides or is not transformers' own.
        """
        from hbt_fast.encoder.load import load_tokenizer, load_transformer, try_out
        from hbt_fast.encoder.modules import read_recorded

        path = str(path)
        tokenizer = load_tokenizer(path)
        recorded = read_recorded(path)
        model = load_transformer(path, dropout)
        own = {kind: recorded.prompts.of(kind) or "" for kind in ("query", "passage")}
        others = {name: prompt for name, prompt in recorded.prompts.named.items() if name != "document"}  # the passage
        made = cls(
            model,
            tokenizer,
            pooling=pooling or recorded.pooling or "mean",
            max_length=max_length or recorded.max_length or min(512, tokenizer.model_max_length, room(model)),
            prompts={**others, **own, **(prompts or {})},
            autocast=autocast,
            dense=recorded.dense,
            default_prompt=recorded.prompts.default,
        )
        try_out(made, path)
        return made

    @property
    def dimension(self) -> int:
        """Embedding dimensions d."""
        return self.model.config.hidden_size if self.dense is None else self.dense[-2].out_features

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def forward(self, tokens: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Embed packed texts.

        Args:
            tokens: (T,) int token ids, one text after the other.
            cu_seqlens: (n + 1,) int, best on the host, text i is tokens[cu_seqlens[i]:cu_seqlens[i + 1]].

        Returns:
            (n, d) unit vectors, float32 (float64 if the weights are).

        Raises:
            EncoderError: a text is longer than the model has positions.
        """
        sequences = Sequences.of(cu_seqlens, tokens.device)
        if sequences.longest > room(self.model):
            raise EncoderError(
                f"a text of {sequences.longest:,} tokens, and the model has positions for {room(self.model):,}; lower "
                "the length limit (max_length, --max-length, model.max_length, model.passage_max_length)"
            )
        packs = self.packs and packed.is_prepared(self.model)  # not if somebody put another model in
        with torch.autocast(tokens.device.type, self.autocast) if self.autocast else nullcontext():
            if packs:
                hidden_Td = packed.forward(self.model, tokens.long(), sequences)
            else:
                hidden_Td = self._padded(tokens, sequences)
        pooled_nd = pool(hidden_Td, sequences.cu_seqlens, sequences.text_T, self.pooling)
        if self.dense is not None:
            pooled_nd = self.dense(pooled_nd.to(self.dense[0].weight.dtype)).to(pooled_nd.dtype)
        return nn.functional.normalize(pooled_nd, dim=-1)

    def _padded(self, tokens: Tensor, sequences: Sequences) -> Tensor:
        """The hidden states of packed texts, (T, d), by way of padded rows."""
        lengths = [length for texts, length in sequences.runs for _ in range(texts)]
        padding = self.model.config.pad_token_id
        rows = self.model.get_input_embeddings().num_embeddings if hasattr(self.model, "get_input_embeddings") else 1
        padding = padding if padding is not None and 0 <= padding < rows else 0  # any token: it is masked
        ids_nL = pad_sequence(tokens.long().split(lengths), batch_first=True, padding_value=padding)
        length_n = torch.tensor(lengths, device=tokens.device)
        mask_nL = torch.arange(ids_nL.shape[1], device=tokens.device) < length_n[:, None]
        return self.model(input_ids=ids_nL, attention_mask=mask_nL.long()).last_hidden_state[mask_nL]

    def tokenise(self, texts: Sequence[str], prompt: str = "", first: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Token ids of texts, cut off at `max_length`.

        Args:
            texts: n texts, at least 1.
            prompt: put before each.
            first: number of the first, for messages.

        Returns:
            (T,) int32 token ids, and (n + 1,) int64: text i is tokens[offsets[i]:offsets[i + 1]].

        Raises:
            EncoderError: a text has no token or is not valid Unicode.
        """
        from hbt_fast.encoder.checkpoint_files import refusals

        pieces, lengths = [], []
        for i in range(0, len(texts), 4096):  # in pieces: the tokenizer's output is bulky
            batch = [prompt + text for text in texts[i : i + 4096]]
            try:
                with refusals(
                    "the tokenizer", f"fails on one of the texts {first + i} to {first + i + len(batch) - 1}"
                ):
                    ids = self.tokenizer(batch, truncation=True, max_length=self.max_length)["input_ids"]
            except EncoderError as error:
                if isinstance(error.__cause__, TypeError):
                    raise EncoderError(_not_unicode(batch, first + i)) from None
                raise
            for number, (text, one) in enumerate(zip(batch, ids, strict=True), first + i):
                if not one:
                    raise EncoderError(f"no token is left of text {number} ({text[:60]!r}); leave it out")
            pieces.append(np.fromiter(chain.from_iterable(ids), np.int32))
            lengths += map(len, ids)
        return np.concatenate(pieces), np.cumsum([0, *lengths])

    def encode(
        self,
        texts: Iterable[str],
        prompt: str = "",
        *,
        batch_tokens: int = 8192,
        dimensions: int | None = None,
        dtype: Literal["float32", "float16"] = "float32",
        devices: Sequence[str] | None = None,
        out: str | Path | None = None,
        progress: bool = False,
    ) -> np.ndarray:
        """Embed texts, however many; `torch.from_numpy` makes a tensor of what comes back, without a copy.

        Args:
            texts: n strings; an iterator is taken as it comes, and its texts are not held.
            prompt: put before each text, as "Query: ".
            batch_tokens: tokens per forward pass, padding included (texts are sorted by length, 4,096 at a time).
            dimensions: keep the first so many, normalised again, of an encoder that was trained for it (arXiv
                2205.13147); None keeps all.
            dtype: of the vectors.
            devices: encode in processes of their own, one per entry, as ["cuda:0", "cuda:1"] or ["cpu", "cpu"]; None
                encodes in this one, where the weights are.
            out: a .npy file to write, which then comes back mapped into memory, so that the vectors need not fit it.
                An encoding that was interrupted goes on where it was if it is started again with the same texts.
            progress: show a progress bar on stderr.

        Returns:
            (n, d) unit vectors, in the order of the texts.

        Raises:
            EncoderError: a text is no string, has no token or gets a vector with NaN or infinity, a setting cannot be
                met, a process died, or what was interrupted were other texts or another encoder.
        """
        from hbt_fast.encoder.encoding import How, encode

        try:
            name = str(np.dtype(dtype))
        except TypeError:
            name = str(dtype)  # is refused there
        how = How(prompt, batch_tokens, self.dimension if dimensions is None else dimensions, name)
        return encode(self, texts, how, devices=devices, out=None if out is None else Path(out), progress=progress)


def room(model: nn.Module) -> float:
    """Tokens that a text may have: as many as there are learned positions; infinity where positions are computed.

    Args:
        model: of transformers, or what stands in for one and has a `room` of its own.
    """
    if hasattr(model, "room"):
        return model.room
    table = getattr(getattr(model, "embeddings", None), "position_embeddings", None)
    if not isinstance(table, nn.Embedding):
        return math.inf
    # where the padding has a position, those of texts come after it
    return table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1)


def check_finite(tensors: Iterable[tuple[str, Tensor]], where: str) -> None:
    """See that there is no NaN or infinity in tensors, in one pass over them that makes no copy.

    Args:
        tensors: with their names.
        where: names them in the message.

    Raises:
        EncoderError: there is; it names the tensor.
    """
    for name, tensor in tensors:
        if tensor.is_floating_point() and tensor.numel():
            lowest, highest = torch.aminmax(tensor.detach())  # both NaN if one element is
            if not (math.isfinite(lowest) and math.isfinite(highest)):
                raise EncoderError(
                    f"{where}: {name} holds NaN or infinity, and no text would get a vector; the training that made it "
                    "went wrong, or the file is damaged: take an earlier checkpoint, or fetch it again"
                )


def _not_unicode(texts: list[str], first: int) -> str:
    """What is wrong with the text that the tokenizer does not take."""
    for number, text in enumerate(texts, first):
        try:
            text.encode()
        except UnicodeEncodeError:
            half = "is not valid Unicode (half of a surrogate pair); mend it or leave it out"
            return f"text {number} ({text[:60]!r}) {half}"
    return "the tokenizer does not take one of the texts"
