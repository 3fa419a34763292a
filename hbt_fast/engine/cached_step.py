"""Gradient caching (Gao et al., arXiv 2101.06983): gradients over a large batch in the memory of a small one.

Every micro-batch is embedded without a graph; the loss over all embeddings gives the gradient of each; then every
micro-batch is embedded again, with a graph, and sent backward against its part of that gradient. Random states are
replayed, so that the second embedding has the dropout masks of the first. Micro-batches whose activations fit
`keep_tokens` keep their graph from the first pass and are not embedded twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

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
    keep_tokens: int = 0,
) -> Tensor:
    """Embed the texts of a step, compute the loss and accumulate its gradient in the engine's parameters.

    Args:
        engine: see `hbt_fast.engine.backends`.
        micro_batches: this rank's texts; their `index` covers 0 .. n - 1 once.
        loss_and_gradient: takes the (n, d) embeddings of this rank, returns the loss (a 0-d tensor) and its (n, d)
            gradient, scaled so that averaging the parameters' gradients over ranks gives the gradient of the loss.
        device: where the encoder is.
        seed: names this step and rank; the dropout masks are a function of it and the micro-batch's number.
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

    def embed(k: int) -> Tensor:
        micro = micro_batches[min(k, len(micro_batches) - 1)]
        with _random_state(device, *seed, k):
            return engine(torch.from_numpy(micro.tokens).to(device), torch.from_numpy(micro.cu_seqlens).to(device))

    n = sum(len(micro.index) for micro in micro_batches)
    index = [torch.from_numpy(micro.index).to(device) for micro in micro_batches]
    embeddings_nd, kept = None, {}
    for k in range(count):
        with torch.set_grad_enabled(k < kept_count):
            out = embed(k)
        if k < kept_count:
            kept[k] = out
        if k < len(micro_batches):
            if embeddings_nd is None:
                embeddings_nd = torch.empty(n, out.shape[1], device=device)
            embeddings_nd[index[k]] = out.detach()

    loss, gradient_nd = loss_and_gradient(embeddings_nd)
    with engine.accumulate():
        for k in range(count):
            out = kept.pop(k) if k in kept else embed(k)
            # beyond its own micro-batches a rank only keeps the others company: no gradient
            surrogate = (out * gradient_nd[index[k]]).sum() if k < len(micro_batches) else (out * 0).sum()
            engine.backward(surrogate, last=k == count - 1)
    return loss


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
