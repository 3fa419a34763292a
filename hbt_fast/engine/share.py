"""What the ranks must have alike: settings, data, weights, and the checkpoint that a run goes on from.

Machines need not share a disk. Rank 0 reads and writes the run folder; what the others need of it, it sends them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from hbt_fast.encoder.encoding import weights_checksum
from hbt_fast.engine.backends import SettingError
from hbt_fast.engine.checkpoint import (
    Checkpoint,
    CheckpointError,
    differences,
    load_checkpoint,
    newest_checkpoint,
    newest_step,
)

if TYPE_CHECKING:
    from hbt_fast.config import Config
    from hbt_fast.encoder.towers import Towers
    from hbt_fast.engine.launch import World


PATHS = {"run_dir", "deepspeed", "data"}  # settings that may differ from machine to machine


def make_alike(world: World, config: Config, identity: dict, towers: Towers) -> None:
    """See that all ranks have the same settings and data (launchers on other machines are started by hand), and give
    them the weights of rank 0: random ones of one seed may differ in the last bit from processor to processor.

    Args:
        world: the ranks; all call.
        config: this rank's settings.
        identity: what a checkpoint names the run by: its data and batches.
        towers: on the CPU.

    Raises:
        SettingError: a rank differs from rank 0. On that rank the message says in what.
    """
    if world.group is None:
        return
    what = dict(identity)
    for group in ("loss", "train", "eval"):
        settings = asdict(getattr(config, group))
        what |= {f"{group}.{name}": value for name, value in settings.items() if name not in PATHS}
    if config.model.path:
        what["weights of model.path"] = weights_checksum(dict(towers.named_parameters()))
    changed = differences(sent(world, what), json.loads(json.dumps(what)), "is {} on rank 0, {} here")
    if world.largest(bool(changed)):
        if not changed:
            raise SettingError("the ranks are not alike; the message of another rank says in what")
        raise SettingError(
            f"rank {world.rank} is not like rank 0: {'; '.join(changed)}. Give every machine the same settings, data "
            "and version of hbt_fast"
        )
    for tensor in towers.state_dict().values():
        shared = tensor.to(world.device)
        dist.broadcast(shared, 0, group=world.group)
        tensor.copy_(shared)


def checkpoint_of_all(
    world: World, run: Path, identity: dict, may_change: Callable[[dict, int], Collection[str]]
) -> tuple[Path | None, Checkpoint]:
    """The newest whole checkpoint in rank 0's run folder, on every rank.

    Args:
        world: the ranks; all call.
        run: the run folder.
        identity: see `load_checkpoint`.
        may_change: see there.

    Returns:
        (its folder, the checkpoint); (None, one of step 0 without anything) if there is none.

    Raises:
        CheckpointError: it is of another run; or rank 0 has none, or an older one than another rank sees.
    """
    newest = newest_step(run)
    first, last = sent(world, newest), world.largest(newest)
    if last > first:
        had = f"checkpoint-{first:06d}" if first >= 0 else "none"
        raise CheckpointError(
            f"another machine than rank 0's has checkpoint-{last:06d} in {run}, rank 0's has {had}. Start rank 0 on "
            "the machine that wrote it (torchrun: --node_rank 0 with --master_addr; its c10d rendezvous numbers the "
            "machines as they come), or put train.run_dir on a disk that all machines share"
        )
    folder, loaded, failed = None, Checkpoint(0, {}, {}, {}), None
    if world.first:
        try:
            if folder := newest_checkpoint(run):
                loaded = load_checkpoint(folder, identity, may_change)
        except CheckpointError as error:
            failed = error
    if world.largest(failed is not None):
        raise failed or CheckpointError("rank 0 could not read its checkpoint; its own message says why")
    name, step, progress, *shapes = sent(
        world,
        [folder and folder.name, loaded.step, loaded.progress, _shapes(loaded.parameters), _shapes(loaded.moments)],
    )
    tensors = [_tensors(world, *pair) for pair in zip((loaded.parameters, loaded.moments), shapes, strict=True)]
    return name and run / name, Checkpoint(step, *tensors, progress, loaded.changed)


def parameters_of_all(world: World, parameters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rank 0's parameters on every rank, on the CPU; all call.

    Args:
        world: the ranks.
        parameters: float32, by name; those of the others do not count.
    """
    return _tensors(world, parameters, sent(world, _shapes(parameters)))


def _shapes(tensors: dict[str, torch.Tensor]) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in tensors.items()}


def _tensors(world: World, own: dict[str, torch.Tensor], shapes: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    """Rank 0's float32 tensors on every rank, on the CPU."""
    if world.group is None:
        return own
    received = {}
    for name, shape in shapes.items():
        tensor = own[name].to(world.device) if world.first else torch.empty(shape, device=world.device)
        dist.broadcast(tensor, 0, group=world.group)
        received[name] = tensor.cpu()
    return received


def sent(world: World, value: object) -> object:
    """Rank 0's value (JSON) on every rank; all call.

    Args:
        world: the ranks.
        value: what rank 0 gives; that of the others does not count.
    """
    raw = bytearray(json.dumps(value).encode())
    if world.group is not None:
        size = world.largest(len(raw) if world.first else 0)
        shared = torch.zeros(size, dtype=torch.uint8, device=world.device)
        if world.first:
            shared.copy_(torch.frombuffer(raw, dtype=torch.uint8))
        dist.broadcast(shared, 0, group=world.group)
        raw = bytes(shared.cpu().numpy())
    return json.loads(raw)
