"""Where a run runs: its ranks, its device, and the engine that fits them."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from hbt_fast.engine.backends import DeepSpeedEngine, SettingError, TorchEngine, adamw
from hbt_fast.engine.memory import reuse_freed_memory

if TYPE_CHECKING:
    from hbt_fast.config import TrainConfig


@dataclass(frozen=True)
class World:
    """The ranks of a run, seen from one of them.

    Attributes:
        rank, size: this rank, and how many there are.
        device: of this rank.
        autocast: dtype of the encoder's matrix products, or None for float32.
        local: this rank's number on its machine.
    """

    rank: int
    size: int
    device: torch.device
    autocast: torch.dtype | None = None
    local: int = 0

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The process group of all ranks, or None when there is only one."""
        return dist.group.WORLD if self.size > 1 else None

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which writes the files."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.group is not None:
            dist.barrier(self.group)

    def largest(self, number: int) -> int:
        """The largest of the numbers that the ranks give; all must call."""
        if self.group is None:
            return number
        shared = torch.tensor(number, device=self.device)
        dist.all_reduce(shared, dist.ReduceOp.MAX, group=self.group)
        return int(shared)


def start(settings: TrainConfig) -> World:
    """Join the other ranks, if a launcher (deepspeed, torchrun) started several.

    Args:
        settings: a `TrainConfig`.

    Raises:
        SettingError: this machine has more ranks than GPUs.
    """
    local = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        if local >= (gpus := torch.cuda.device_count()):
            raise SettingError(
                f"more ranks were started here than there are GPUs ({gpus}); start one for each, or hide the GPUs "
                '(CUDA_VISIBLE_DEVICES="") to train on the CPU'
            )
        torch.cuda.set_device(device)
    else:
        reuse_freed_memory()
    precision = settings.precision
    if precision == "auto":
        precision = "bf16" if computes_in_bf16(device) else "fp32"
    autocast = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}[precision]
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if size == 1 and not uses_deepspeed(settings):
        return World(0, 1, device, autocast)
    for name, value in {
        "RANK": 0,
        "WORLD_SIZE": 1,
        "LOCAL_RANK": 0,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": 0,
    }.items():
        os.environ.setdefault(name, str(value))
    if not dist.is_initialized():
        timeout = timedelta(minutes=settings.timeout_minutes)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timeout)
    return World(rank, size, device, autocast, local)


def leave() -> bool:
    """End this rank's part in the process group; returns whether it had one.

    A process that had one must not take its interpreter down: a thread of gloo's holds the tensor of the last
    collective and frees it when it pleases, and where the interpreter is just shutting down that aborts the process
    (torch 2.13; one in 60 of two ranks that were stopped). The thread lives as long as anything refers to a group, and
    DeepSpeed refers to them everywhere.
    """
    if not dist.is_initialized():
        return False
    with suppress(RuntimeError):  # the other ranks may be gone
        dist.destroy_process_group()
    return True


def computes_in_bf16(device: torch.device) -> bool:
    """Whether a device is a GPU that has bf16 in hardware; those before Ampere emulate it, slower than float32."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def lost_a_rank(error: RuntimeError) -> bool:
    """Whether the error is that of a collective whose other ranks are gone."""
    message = str(error).lower()
    return isinstance(error, dist.DistError) or any(name in message for name in ("gloo", "nccl", "closed by peer"))


def uses_deepspeed(settings: TrainConfig) -> bool:
    """Whether DeepSpeed owns the optimizer."""
    if settings.engine == "auto":
        return settings.zero_stage > 0 or settings.deepspeed is not None or "LOCAL_RANK" in os.environ
    if settings.engine == "torch" and settings.zero_stage:
        raise SettingError(f"train.zero_stage is {settings.zero_stage}, which needs train.engine deepspeed (or auto)")
    return settings.engine == "deepspeed"


def make_engine(module: torch.nn.Module, settings: TrainConfig, world: World) -> TorchEngine | DeepSpeedEngine:
    """The engine around a module that is on its device already.

    Args:
        module: float32.
        settings: a `TrainConfig`.
        world: from `start`.
    """
    optimizer = adamw(module, settings.learning_rate, settings.weight_decay)
    if not uses_deepspeed(settings):
        return TorchEngine(module, optimizer, settings.clip)
    extra = {}
    if settings.deepspeed:
        try:
            extra = json.loads(Path(settings.deepspeed).read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError) as error:
            raise SettingError(f"train.deepspeed: {settings.deepspeed} cannot be read as JSON ({error})") from None
    return DeepSpeedEngine(module, optimizer, settings.clip, settings.zero_stage, extra)
