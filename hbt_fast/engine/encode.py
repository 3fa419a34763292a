"""Encoding texts on all ranks: rank 0 has the texts and gets the vectors, the others help.

Texts are sorted by length and packed into micro-batches, the same ones at any number of ranks, and these are dealt out:
a text has the same vector, to the bit, however many ranks there are. Nothing of training is touched: evaluation mode
draws no random number, and training mode is set again afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from hbt_fast.data.pack import MicroBatch, pack
from hbt_fast.engine.share import sent

if TYPE_CHECKING:
    from hbt_fast.encoder.towers import Towers
    from hbt_fast.engine.backends import DeepSpeedEngine, TorchEngine
    from hbt_fast.engine.launch import World

TOKENS = 8192  # per micro-batch, padding included
ROUNDS = 64  # micro-batches per rank between two gathers


class Tower(NamedTuple):
    """One encoder of a `SharedEncoder`, as a `hbt_fast.evaluation.run.TextEncoder`."""

    shared: SharedEncoder
    number: int

    def encode(self, texts: Sequence[str], prompt: str = "", progress: bool = False) -> np.ndarray:
        """(n, d) float32 unit vectors of the texts; rank 0 calls it while the others are in `SharedEncoder.help`."""
        return self.shared.encode(self.number, texts, prompt, progress)


class SharedEncoder:
    """The towers in evaluation mode, on all ranks.

    Rank 0 uses `queries` and `passages` and then calls `end`; every other rank calls `help`.

    Args:
        trained: towers that every rank has whole, or an engine around them.
        world: the ranks.
    """

    def __init__(self, trained: Towers | TorchEngine | DeepSpeedEngine, world: World) -> None:
        self.forward: Callable[..., tuple[Tensor, Tensor | None]] = trained
        self.world = world
        self.module = trained if isinstance(trained, nn.Module) else trained.module
        self.collective = getattr(trained, "zero_stage", 0) == 3  # parameters are gathered by every forward

    @property
    def queries(self) -> Tower:
        """The encoder of queries."""
        return Tower(self, 0)

    @property
    def passages(self) -> Tower:
        """The encoder of passages."""
        return Tower(self, len(self.module.encoders) - 1)

    def encode(self, tower: int, texts: Sequence[str], prompt: str, progress: bool) -> np.ndarray:
        """Rank 0's part of encoding; see `Tower.encode`."""
        tokens, offsets = self.module.encoders[tower].tokenise(texts, prompt)
        lengths = np.diff(offsets)
        sent(self.world, {"tower": tower, "texts": len(lengths), "tokens": len(tokens)})
        return self._embed(tower, self._broadcast(tokens), self._broadcast(lengths), progress)

    def help(self) -> object:
        """The other ranks' part, until rank 0 calls `end`; returns what rank 0 gave it."""
        while "result" not in (asked := sent(self.world, None)):
            tokens = self._broadcast(np.empty(asked["tokens"], np.int32))
            self._embed(asked["tower"], tokens, self._broadcast(np.empty(asked["texts"], np.int64)), False)
        return asked["result"]

    def end(self, result: object) -> None:
        """Rank 0: the others' `help` returns.

        Args:
            result: JSON; what it returns there.
        """
        sent(self.world, {"result": result})

    def _broadcast(self, array: np.ndarray) -> np.ndarray:
        if self.world.group is None:
            return array
        shared = torch.from_numpy(array).to(self.world.device)
        dist.broadcast(shared, 0, group=self.world.group)
        return shared.cpu().numpy()

    def _embed(self, tower: int, tokens: np.ndarray, lengths: np.ndarray, progress: bool) -> np.ndarray | None:
        """Every rank embeds its micro-batches; rank 0 gets all vectors."""
        from tqdm import tqdm

        ranks, device = self.world.size, self.world.device
        dimension = self.module.encoders[tower].dimension
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        micro_batches = pack(np.arange(len(lengths)), tokens, offsets, TOKENS)
        out_nd = np.empty((len(lengths), dimension), np.float32) if self.world.first else None
        training = self.module.training
        self.module.eval()
        try:
            with tqdm(total=len(tokens), desc="encoding", unit="tok", unit_scale=True, disable=not progress) as bar:
                for begin in range(0, len(micro_batches), ranks * ROUNDS):
                    piece = micro_batches[begin : begin + ranks * ROUNDS]
                    shares = [piece[rank::ranks] for rank in range(ranks)]
                    sizes = [sum(len(micro.index) for micro in share) for share in shares]
                    mine_nd = torch.zeros(max(sizes), dimension, device=device)
                    done = 0
                    for micro in shares[self.world.rank]:
                        mine_nd[done : done + len(micro.index)] = self._vectors(micro, tower)
                        done += len(micro.index)
                        bar.update(ranks * len(micro.tokens))
                    if self.collective and len(shares[self.world.rank]) < len(shares[0]):
                        self._vectors(piece[-1], tower)  # keeps the others company
                    for share, vectors_nd in zip(shares, self._gathered(mine_nd), strict=False):
                        if share:
                            index = np.concatenate([micro.index for micro in share])
                            out_nd[index] = vectors_nd[: len(index)].cpu().numpy()
        finally:
            self.module.train(training)
        return out_nd

    @torch.no_grad()  # not inference_mode: ZeRO-3 would keep its tensors
    def _vectors(self, micro: MicroBatch, tower: int) -> Tensor:
        tokens = torch.from_numpy(micro.tokens).to(self.world.device)
        return self.forward(tokens, torch.from_numpy(micro.cu_seqlens), tower)[0].float()

    def _gathered(self, mine_nd: Tensor) -> list[Tensor]:
        """All ranks' tensors on rank 0; an empty list elsewhere."""
        if self.world.group is None:
            return [mine_nd]
        received = [torch.empty_like(mine_nd) for _ in range(self.world.size)] if self.world.first else None
        dist.gather(mine_nd, received, dst=0, group=self.world.group)
        return received or []
