"""Transformers without padding: texts lie one after the other in one row, and attention keeps them apart.

The stock classes of transformers are used; what differs is the attention function that they look up by name. In half
precision on GPUs from Ampere on flash-attn does the work where it is installed, torch's own varlen attention where it
is not, and everywhere else scaled_dot_product_attention, once for all neighbouring texts of one length: batches are
sorted by length, so that these are many.

Shape legend: T tokens in all, h heads, k key-value heads, e dimensions of a head, n texts of L tokens each.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import groupby
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NAME = "hbt_packed"
AFTER_PADDING = ("xlm-roberta", "roberta", "camembert", "xlm-roberta-xl")  # positions begin at pad_token_id + 1
FROM_ZERO = ("bert", "modernbert", "qwen3", "qwen2", "llama", "mistral")


class Sequences(NamedTuple):
    """Where the texts of a packed row begin and end.

    Attributes:
        cu_seqlens: (n + 1,) int32, on the tokens' device.
        longest: tokens of the longest.
        text_T: (T,) int64, the text of each token.
        runs: (texts, tokens of each) of neighbours of one length, in their order.
    """

    cu_seqlens: Tensor
    longest: int
    text_T: Tensor
    runs: list[tuple[int, int]]

    @classmethod
    def of(cls, cu_seqlens: Tensor, device: torch.device) -> Sequences:
        """From (n + 1,) int offsets, on the host: a GPU that has them is waited for.

        Args:
            cu_seqlens: text i has the tokens from cu_seqlens[i] to cu_seqlens[i + 1].
            device: of the tokens.
        """
        runs = [(len(list(same)), length) for length, same in groupby(cu_seqlens.diff().tolist())]
        there = cu_seqlens.to(device).int()
        text = torch.arange(len(there) - 1, device=device)
        tokens = sum(texts * length for texts, length in runs)
        text_T = text.repeat_interleave(there.diff(), output_size=tokens)  # the size: or it would be waited for
        return cls(there, max(length for _, length in runs), text_T, runs)


def can_pack(model: nn.Module) -> bool:
    """Whether a model of transformers can take packed rows: its positions and attention are known and tested."""
    return getattr(model.config, "model_type", None) in (*AFTER_PADDING, *FROM_ZERO)


def prepare(model: nn.Module) -> None:
    """Have the model look up packed attention; it takes padded rows as before.

    Args:
        model: of which `can_pack` is true.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, _mask)
    model.set_attn_implementation(NAME)


def is_prepared(model: nn.Module) -> bool:
    """Whether `prepare` was called on this model, and nobody has set another attention since."""
    return getattr(model.config, "_attn_implementation", None) == NAME


def forward(model: nn.Module, tokens: Tensor, sequences: Sequences) -> Tensor:
    """The last hidden states of packed texts, (T, d).

    Args:
        model: after `prepare`.
        tokens: (T,) int64 token ids.
        sequences: the texts.
    """
    positions = torch.arange(len(tokens), device=tokens.device) - sequences.cu_seqlens[:-1][sequences.text_T]
    config = model.config
    if config.model_type in AFTER_PADDING:
        positions = positions + config.pad_token_id + 1
    more = {"use_cache": False} if getattr(config, "use_cache", None) and not hasattr(model, "encoder") else {}
    return model(input_ids=tokens[None], position_ids=positions[None], sequences=sequences, **more).last_hidden_state[0]


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    sequences: Sequences | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls.

    Args:
        module: the attention layer; its `is_causal` counts.
        query: (1, h, T, e), or (B, h, L, e) of padded rows.
        key: (1, k, T, e), as `query`.
        value: as `key`.
        attention_mask: of padded rows; None: nothing is masked.
        dropout: probability.
        scaling: of the products; None: one over the root of e.
        sliding_window: tokens see those less than this away; None: all.
        sequences: the texts; None: every row is one.
        others: what other attention functions want.

    Returns:
        (1, T, h, e) or (B, L, h, e), and None.
    """
    if attention_mask is not None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        options = {"dropout": dropout, "scaling": scaling, **others}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    causal = bool(others.get("is_causal", getattr(module, "is_causal", False)))
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))  # (1, T, h, e), as the projections wrote it
    if sequences is None:
        return _dense(query, key, value, dropout, scaling, causal, sliding_window), None
    query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast rotary positions have made them float32
    if _takes_varlen(query.device, query.dtype) and (_flash_attn() or not dropout):
        out = _varlen(query[0], key[0], value[0], sequences, dropout, scaling, causal, sliding_window)
        return out[None], None
    sizes = [texts * length for texts, length in sequences.runs]
    parts = []
    for (texts, length), *qkv in zip(sequences.runs, *(x[0].split(sizes) for x in (query, key, value)), strict=True):
        q, k, v = (x.view(texts, length, *x.shape[1:]) for x in qkv)
        parts.append(_dense(q, k, v, dropout, scaling, causal, sliding_window).reshape(texts * length, *q.shape[2:]))
    return torch.cat(parts)[None], None


def _dense(
    q_nLhe: Tensor,
    k_nLke: Tensor,
    v_nLke: Tensor,
    dropout: float,
    scale: float | None,
    causal: bool,
    window: int | None,
) -> Tensor:
    """Attention of n texts of one length, (n, L, h, e)."""
    length, mask = q_nLhe.shape[1], None
    if window is not None and length > window:
        position = torch.arange(length, device=q_nLhe.device)
        away = position[:, None] - position
        mask = (away < window) & (away >= 0) if causal else away.abs() < window
    out_nhLe = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q_nLhe, k_nLke, v_nLke)),
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=causal and mask is None and length > 1,
        scale=scale,
        enable_gqa=k_nLke.shape[2] != q_nLhe.shape[2],
    )
    return out_nhLe.transpose(1, 2)


def _varlen(
    q_The: Tensor,
    k_Tke: Tensor,
    v_Tke: Tensor,
    sequences: Sequences,
    dropout: float,
    scale: float | None,
    causal: bool,
    window: int | None,
) -> Tensor:
    """Attention of all texts in one call, (T, h, e), on a GPU in half precision."""
    side = -1 if window is None else window - 1
    sides = (side, 0 if causal else side)
    where = (sequences.cu_seqlens, sequences.cu_seqlens, sequences.longest, sequences.longest)
    if flash := _flash_attn():
        return flash(
            q_The, k_Tke, v_Tke, *where, dropout_p=dropout, softmax_scale=scale, causal=causal, window_size=sides
        )
    from torch.nn.attention.varlen import varlen_attn

    grouped = k_Tke.shape[1] != q_The.shape[1]
    return varlen_attn(q_The, k_Tke, v_Tke, *where, scale=scale, window_size=sides, enable_gqa=grouped)


def _takes_varlen(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether attention of all texts in one call has kernels: half precision, on GPUs from Ampere on."""
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


@cache
def _flash_attn() -> Callable[..., Tensor] | None:
    """flash-attn's function; None where it is not installed, or was built for another torch and cannot be loaded."""
    try:
        from flash_attn import flash_attn_varlen_func
    except (ImportError, OSError):
        return None
    return flash_attn_varlen_func


def _mask(*arguments: Any, attention_mask: Tensor | None = None, **options: Any) -> Tensor | None:
    """The mask of padded rows. Packed rows have none, and rows without padding need none: see `packed_attention`."""
    from transformers.masking_utils import sdpa_mask

    if attention_mask is None and options["q_length"] == options["kv_length"]:
        return None
    return sdpa_mask(*arguments, attention_mask=attention_mask, **options)
