"""Memory of a training step: what a micro-batch's graph takes, which graphs fit, what running out looks like."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import resource
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from hbt_fast.data.pack import MicroBatch
from hbt_fast.heap import trim_heap

GIB = 2**30
CPU_SHARE, GPU_SHARE = 0.5, 0.9  # of the free memory: a CPU's is everybody's
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # <malloc.h>
ONEDNN = "could not create a primitive"  # oneDNN found no room for its code
NO_MEMORY = ("can't allocate memory", "out of memory", "alloc_failed", "bad_alloc", ONEDNN)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or a CPU.

    Where it was oneDNN that found none, this process goes on without it: it would find none ever after.
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    said = str(error).lower()
    if isinstance(error, RuntimeError) and ONEDNN in said:
        torch.backends.mkldnn.enabled = False
    return isinstance(error, RuntimeError) and any(words in said for words in NO_MEMORY)


def free_bytes(device: torch.device) -> int:
    """Bytes that this process may still take: of its GPU, or its share of the machine's (or container's) memory."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    found = [1024 * _number("/proc/meminfo", "MemAvailable:")]
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        with contextlib.suppress(OSError, ValueError):  # no such limit
            found.append(int(Path("/sys/fs/cgroup", limit).read_text()) - int(Path("/sys/fs/cgroup", used).read_text()))
    return max(min(found), 0) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def reuse_freed_memory() -> None:
    """Have the C library keep what is freed, as torch does on a GPU: a step's graphs then find the pages of the last
    step's, where these would otherwise be handed back and cleared anew. Not where addresses are scarce (ulimit -v), and
    without effect where that is not glibc.
    """
    if resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY:
        return
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_TRIM_THRESHOLD, -1)  # never
        mallopt(M_MMAP_MAX, 0)  # large blocks, too, are of the heap


def give_back(device: torch.device) -> None:
    """Hand freed memory back, for what else needs it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return
    trim_heap()


def used_bytes(device: torch.device) -> int:
    """The most that this process has held so far: of its GPU, or of main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * _number("/proc/self/status", "VmHWM:")


def resident_bytes(device: torch.device) -> int:
    """What this process holds now: of its GPU, or of main memory."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return 1024 * _number("/proc/self/status", "VmRSS:")


def _number(path: str, name: str) -> int:
    for line in Path(path).read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1])
    raise OSError(f"{path} has no {name}")


@dataclass
class KeptGraphs:
    """Which micro-batches of a step keep their graph from the first pass, and are not embedded a second time.

    The first always does: it goes backward before another graph is made, in the room that one will need.

    What a graph takes is measured: in the first steps nothing is kept, and every graph that the second pass makes is
    looked at. Bytes are then a fixed part, one per token and one per token and length (attention), fitted and raised
    so that no graph that was seen took more.

    Args:
        module: whose graphs they are.
        device: where.
        limit: bytes that the others may take; None: half of what is free on a CPU, nine tenths on a GPU, less twice
            the largest graph.

    Attributes:
        seen: [padded tokens, longest, bytes] of every graph that was measured.
    """

    module: nn.Module
    device: torch.device
    limit: int | None = None
    seen: list[tuple[int, int, int]] = field(default_factory=list)

    def choose(self, micro_batches: Sequence[MicroBatch]) -> list[bool]:
        """Which to keep: the first, and as many as fit, those before others that save most (their second forward pass).

        Args:
            micro_batches: of one step, in their order.
        """
        keep = [True] + [False] * (len(micro_batches) - 1)
        if self.limit == 0 or not self.seen:
            return keep
        needs = self.expected(micro_batches)
        if self.limit is None:
            self.limit = self.automatic(needs.max())
        left = self.limit
        for k in sorted(range(1, len(micro_batches)), key=lambda k: -micro_batches[k].cost):
            if needs[k] <= left:
                keep[k], left = True, left - needs[k]
        return keep

    def automatic(self, largest: float, reserve: float = 0) -> int:
        """The limit where none is set.

        Args:
            largest: bytes of the largest graph.
            reserve: bytes that are free now, but will not be.
        """
        share = GPU_SHARE if self.device.type == "cuda" else CPU_SHARE
        return max(int(share * (free_bytes(self.device) - reserve) - 2 * largest), 0)

    def expected(self, micro_batches: Sequence[MicroBatch]) -> np.ndarray:
        """Bytes of each graph, from those that were measured."""
        shapes = [(micro.cost, micro.longest) for micro in micro_batches]
        *seen, sizes = np.array(self.seen, float).T
        estimate = fitted(np.stack(seen, axis=1), sizes)
        raised = (sizes / np.maximum(estimate(np.stack(seen, axis=1)), 1)).max()
        return raised * estimate(np.array(shapes, float))

    @contextmanager
    def measured(self, micro: MicroBatch) -> Iterator[None]:
        """Around the forward pass of a micro-batch: note what its graph takes."""
        if self.device.type == "cuda":
            before = torch.cuda.memory_allocated(self.device)
            yield
            self.seen.append((micro.cost, micro.longest, torch.cuda.memory_allocated(self.device) - before))
            return
        weights = {p.untyped_storage().data_ptr() for p in self.module.parameters()}
        saved = {}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            yield
        self.seen.append((micro.cost, micro.longest, sum(saved.values())))

    def shrink(self) -> None:
        """Memory ran out: keep half as much from now on."""
        if self.limit:
            self.limit //= 2


def fitted(shapes: np.ndarray, values: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """What micro-batches of any shape take, from what some took: a part per token, one per token and length (that is
    attention), and a fixed part as far as these two do not explain it.

    Args:
        shapes: (n, 2) padded tokens and longest text.
        values: (n,) what they took.
    """

    def features(shapes: np.ndarray) -> np.ndarray:
        tokens, longest = shapes.T
        return np.stack([np.ones_like(tokens), tokens, tokens * longest], axis=1)

    unit = features(shapes).max(axis=0) * [100, 1, 1]
    weights = np.linalg.lstsq(features(shapes) / unit, values, rcond=None)[0].clip(0) / unit
    return lambda others: features(others) @ weights
