"""Gradient caching (Gao et al., arXiv 2101.06983): gradients over a large batch in the memory of a small one.

Every micro-batch is embedded without a graph; the loss over all embeddings gives the gradient of each; then every
micro-batch is embedded again, with a graph, and sent backward against its part of that gradient. Random states are
replayed, so that the second embedding has the dropout masks of the first. Micro-batches whose activations fit
`keep_tokens` keep their graph from the first pass and are not embedded twice.

Equal texts are one text to the encoder: the loss sees its embedding once for each of them, and their gradients add up.

Legend: n texts of this rank, m of them distinct, d dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from hbt_fast.data.draws import key_of
from hbt_fast.data.pack import MicroBatch
from hbt_fast.engine.backends import DeepSpeedEngine, TorchEngine


def cached_backward(
    engine: TorchEngine | DeepSpeedEngine,
    micro_batches: Sequence[MicroBatch],
    loss_and_gradient: Callable[[Tensor], tuple[Tensor, Tensor]],
    *,
    device: torch.device,
    seed: tuple[int, ...],
    inverse: np.ndarray | None = None,
    keep_tokens: int = 0,
) -> Tensor:
    """Embed the texts of a step, compute the loss and accumulate its gradient in the engine's parameters.

    Args:
        engine: see `hbt_fast.engine.backends`.
        micro_batches: this rank's distinct texts; their `index` covers 0 .. m - 1 once.
        loss_and_gradient: takes the (n, d) embeddings of this rank, returns the loss (a 0-d tensor) and its (n, d)
            gradient, scaled so that averaging the parameters' gradients over ranks gives the gradient of the loss.
        device: where the encoder is.
        seed: names this step and rank; the dropout masks are a function of it and the micro-batch's number.
        inverse: (n,) int64 which distinct text each text is; None: all differ, so that n = m.
        keep_tokens: padded tokens whose activations fit the memory at once.

    Returns:
        The loss.
    """
    kept_count = kept_tokens = 0
    while kept_count < len(micro_batches) and kept_tokens + micro_batches[kept_count].cost <= keep_tokens:
        kept_tokens += micro_batches[kept_count].cost
        kept_count += 1
    count = len(micro_batches)
    if engine.zero_stage == 3:  # every forward is collective there: the same number, kept alike, on each rank
        count, kept_count = _agree(count, kept_count, device)

    def upload(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(device, non_blocking=True)

    def embed(k: int) -> Tensor:
        micro = micro_batches[min(k, len(micro_batches) - 1)]
        with _random_state(device, *seed, k):
            return engine(*(upload(array) for array in (micro.tokens, micro.cu_seqlens)))

    m = sum(len(micro.index) for micro in micro_batches)
    index = [upload(micro.index) for micro in micro_batches]
    embeddings_md, kept = None, {}
    for k in range(count):
        with torch.set_grad_enabled(k < kept_count):
            out = embed(k)
        if k < kept_count:
            kept[k] = out
        if k < len(micro_batches):
            if embeddings_md is None:
                dtype = torch.promote_types(out.dtype, torch.float32)
                embeddings_md = torch.empty(m, out.shape[1], dtype=dtype, device=device)
            embeddings_md[index[k]] = out.detach()

    if inverse is None:
        loss, gradient_md = loss_and_gradient(embeddings_md)
    else:
        distinct_n = upload(inverse)
        loss, gradient_nd = loss_and_gradient(embeddings_md[distinct_n])
        gradient_md = add_up(gradient_nd, distinct_n, m)
    with engine.accumulate():
        for k in range(count):
            out = kept.pop(k) if k in kept else embed(k)
            # beyond its own micro-batches a rank only keeps the others company: no gradient
            surrogate = (out * gradient_md[index[k]]).sum() if k < len(micro_batches) else (out * 0).sum()
            engine.backward(surrogate, last=k == count - 1)
    return loss


def add_up(gradient_nd: Tensor, distinct_n: Tensor, m: int) -> Tensor:
    """The gradient of each distinct text: (m, d) sums over those that are equal to it, the same in every run.

    Args:
        gradient_nd: of each text.
        distinct_n: (n,) int64 which distinct text each is.
        m: how many there are.
    """
    gradient_md = gradient_nd.new_zeros(m, gradient_nd.shape[1])
    if gradient_nd.is_cuda:  # sorts the indices, where index_add_ would add in any order
        return gradient_md.index_put_((distinct_n,), gradient_nd, accumulate=True)
    return gradient_md.index_add_(0, distinct_n, gradient_nd)


def _agree(count: int, kept: int, device: torch.device) -> tuple[int, int]:
    """The largest count and the smallest number of kept graphs of all ranks."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return count, kept
    both = torch.tensor([count, -kept], device=device)
    dist.all_reduce(both, dist.ReduceOp.MAX)
    return int(both[0]), -int(both[1])


@contextmanager
def _random_state(device: torch.device, *key: int) -> Iterator[None]:
    """Run with the random state that the key names, and leave the caller's as it was."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int(key_of(*key)) >> 1)  # torch wants 63 bits
        yield
