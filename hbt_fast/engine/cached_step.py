"""Gradient caching (Gao et al., arXiv 2101.06983): gradients over a large batch in the memory of a small one.

Every micro-batch is embedded without a graph; the loss over all embeddings gives the gradient of each; then every
micro-batch is embedded again, with a graph, and sent backward against its part of that gradient. Random states are
replayed, so that the second embedding has the dropout masks of the first. Micro-batches whose activations fit the
memory keep their graph from the first pass and are not embedded twice, which changes no bit of the result.

Equal texts are one text to the encoder: the loss sees its embedding once for each of them, and their gradients add up.

Legend: n texts of this rank, m of them distinct, d dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from hbt_fast.data.draws import key_of
from hbt_fast.data.pack import MicroBatch
from hbt_fast.engine.backends import DeepSpeedEngine, TorchEngine
from hbt_fast.engine.memory import KeptGraphs, out_of_memory
from hbt_fast.loss.ranks import NotFiniteError

if TYPE_CHECKING:
    from hbt_fast.engine.objective import LossGradient
    from hbt_fast.engine.phases import Phases


class OutOfMemoryError(Exception):
    """Memory ran out on this rank, before any gradient was made; every rank's step ends with an error."""


class CachedStep(NamedTuple):
    """What a step did.

    Attributes:
        loss: 0-d, of the global batch.
        out_of_memory: memory ran out on this rank while gradients were made. They are NaN then: the engine's step, to
            be called by all ranks as ever, changes nothing and tells all of them by its norm.
        kept: how many micro-batches were embedded once only.
    """

    loss: Tensor
    out_of_memory: bool
    kept: int


def cached_backward(
    engine: TorchEngine | DeepSpeedEngine,
    micro_batches: Sequence[MicroBatch],
    loss_and_gradient: Callable[[Tensor, Tensor | None], LossGradient],
    *,
    device: torch.device,
    seed: tuple[int, ...],
    inverse: np.ndarray | None = None,
    graphs: KeptGraphs,
    measure: bool = False,
    factor: float = 1.0,
    phases: Phases,
) -> CachedStep:
    """Embed the texts of a step, compute the loss and accumulate its gradient in the engine's parameters.

    Args:
        engine: around `hbt_fast.encoder.towers.Towers`.
        micro_batches: this rank's distinct texts, by tower; their `index` covers 0 .. m - 1 once.
        loss_and_gradient: takes the (n, d) embeddings of this rank and the (1,) log scale, if that is learned.
        device: where the encoder is.
        seed: names this step and rank; the dropout masks are a function of it and the micro-batch's number.
        inverse: (n,) int64 which distinct text each text is; None: all differ, so that n = m.
        graphs: decides which micro-batches keep their graph.
        measure: keep none, and let `graphs` look at all.
        factor: gradients are sent backward times this (the loss scale of fp16).
        phases: told what runs.

    Raises:
        OutOfMemoryError: here.
        NotFiniteError: an embedding is NaN or infinite, on any rank.
    """
    phases.begin("embed")
    count = len(micro_batches)
    turns = [Turn(k, True, keep) for k, keep in enumerate([False] * count if measure else graphs.choose(micro_batches))]
    together = engine.zero_stage == 3 and dist.is_initialized() and dist.get_world_size() > 1
    if together:  # every forward is collective there: the same ones, kept alike, on each rank
        turns = _agreed(turns, micro_batches, device)

    def upload(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(device, non_blocking=True)

    def embed(number: int) -> tuple[Tensor, Tensor | None]:
        micro = micro_batches[turns[number].micro]
        with _random_state(device, *seed, number):
            return engine(upload(micro.tokens), torch.from_numpy(micro.cu_seqlens), micro.tower)

    def recoverable(error: Exception) -> bool:
        return out_of_memory(error) and not together

    m = sum(len(micro.index) for micro in micro_batches)
    index = [upload(micro.index) for micro in micro_batches]
    embeddings_md, log_scale, kept, short = None, None, {}, False
    try:
        for number, turn in enumerate(turns):
            phases.left(len(turns) - number)
            with torch.set_grad_enabled(turn.keep):
                out, log_scale = embed(number)
            if turn.keep:
                kept[number] = out, log_scale
            if turn.own:
                if embeddings_md is None:
                    dtype = torch.promote_types(out.dtype, torch.float32)
                    embeddings_md = torch.empty(m, out.shape[1], dtype=dtype, device=device)
                embeddings_md[index[turn.micro]] = out.detach()
    except Exception as error:
        if not recoverable(error):
            raise
        short = True
    if short:  # the other ranks are on their way to the loss: NaN tells them
        kept.clear()
        embeddings_md = torch.full((m, engine.module.queries.dimension), torch.nan, device=device)

    phases.begin("loss")
    distinct_n = None if inverse is None else upload(inverse)
    try:
        loss, gradient_md, log_scale_gradient = loss_and_gradient(
            embeddings_md if distinct_n is None else embeddings_md[distinct_n], log_scale
        )
    except NotFiniteError:
        if short:
            raise OutOfMemoryError from None
        raise
    if distinct_n is not None:
        gradient_md = add_up(gradient_md, distinct_n, m)

    phases.begin("re-embed")
    last = len(turns) - 1
    with engine.accumulate():
        try:
            for number, turn in enumerate(turns):
                phases.left(len(turns) - number)
                if number in kept:
                    out, log_scale = kept.pop(number)
                else:
                    with graphs.measured(micro_batches[turn.micro]) if measure else nullcontext():
                        out, log_scale = embed(number)
                # beyond its own micro-batches a rank only keeps the others company: no gradient
                surrogate = (out * gradient_md[index[turn.micro]] if turn.own else out * 0).sum()
                if log_scale is not None:
                    surrogate = surrogate + (log_scale * (log_scale_gradient if number == last else 0)).sum()
                engine.backward(surrogate * factor, last=number == last)
        except Exception as error:
            if not recoverable(error):
                raise
            short = True
        if short:
            kept.clear()
            out = log_scale = surrogate = None
            engine.spoil()
    return CachedStep(loss, short, sum(turn.keep for turn in turns))


class Turn(NamedTuple):
    """A forward pass of a step: of which micro-batch, whether for its own sake, whether its graph is kept."""

    micro: int
    own: bool
    keep: bool


def _agreed(turns: list[Turn], micro_batches: Sequence[MicroBatch], device: torch.device) -> list[Turn]:
    """As many turns of each tower as the rank with the most has; kept are those that all ranks would keep."""
    mine = [[turn for turn in turns if micro_batches[turn.micro].tower == tower] for tower in (0, 1)]
    counts = torch.tensor([len(of_tower) for of_tower in mine], device=device)
    dist.all_reduce(counts, dist.ReduceOp.MAX)
    filled = []
    for of_tower, count in zip(mine, counts.tolist(), strict=True):
        if count:  # a rank has texts of every tower
            filled += of_tower + [Turn(of_tower[-1].micro, False, True)] * (count - len(of_tower))
    keep = torch.tensor([int(turn.keep) for turn in filled], device=device)
    dist.all_reduce(keep, dist.ReduceOp.MIN)
    return [turn._replace(keep=bool(k)) for turn, k in zip(filled, keep.tolist(), strict=True)]


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


@contextmanager
def _random_state(device: torch.device, *key: int) -> Iterator[None]:
    """Run with the random state that the key names, and leave the caller's as it was."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int(key_of(*key)) >> 1)  # torch wants 63 bits
        yield
