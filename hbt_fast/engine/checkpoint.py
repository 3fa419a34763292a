"""Checkpoints: safetensors and JSON, whole tensors, so that any world size and ZeRO stage can go on from them.

    checkpoint-000100/model.safetensors       float32 parameters by name
                      optimizer.safetensors   AdamW's moments by name
                      state.json              the step, what the run was, and the files' checksums

A checkpoint is written to a folder beside its place, synced to disk and renamed: a crash at any moment leaves the
previous one as it was. There are no random states to keep: batches and dropout masks are functions of (seed, step).
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import xxhash
from safetensors.torch import load_file, save_file
from torch import Tensor

FORMAT = 1


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message says which and why."""


def save_checkpoint(
    run: Path, step: int, parameters: dict[str, Tensor], moments: dict[str, Tensor], identity: dict, keep: int
) -> Path:
    """Write the checkpoint after `step` updates (one rank does this) and remove all but the newest `keep`.

    Args:
        run: the run folder.
        step: updates done.
        parameters: by name; what the engine's `state()` gave.
        moments: the same of the optimizer.
        identity: what must be the same for a run that goes on from it (JSON).
        keep: how many checkpoints stay, at least 1.
    """
    final = run / f"checkpoint-{step:06d}"
    work = run / f".{final.name}.partial"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    checksums = {}
    for name, tensors in (("model.safetensors", parameters), ("optimizer.safetensors", moments)):
        save_file({key: value.contiguous() for key, value in tensors.items()}, work / name)
        checksums[name] = _checksum(work / name)
    state = {"format": FORMAT, "step": step, "identity": identity, "checksums": checksums}
    (work / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
    for path in (*work.iterdir(), work):
        _sync(path)
    shutil.rmtree(final, ignore_errors=True)
    work.rename(final)
    _sync(run)
    for old in _checkpoints(run)[max(keep, 1) :]:
        shutil.rmtree(old)
    return final


def newest_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint of a run whose files are whole; damaged ones are passed over, aloud."""
    for folder in _checkpoints(run):
        try:
            _verified_state(folder)
        except CheckpointError as error:
            print(f"{error}; trying the one before it", flush=True)
        else:
            return folder
    return None


def load_checkpoint(folder: Path, identity: dict) -> tuple[int, dict[str, Tensor], dict[str, Tensor]]:
    """Read a checkpoint: (updates done, parameters, moments).

    Raises:
        CheckpointError: not whole, or of a run with other settings (named).
    """
    state = _verified_state(folder)
    changed = [
        f"{name} was {state['identity'].get(name)!r}, is {value!r}"
        for name, value in identity.items()
        if state["identity"].get(name) != value
    ]
    if changed:
        raise CheckpointError(
            f"{folder} is of a run with other settings: {'; '.join(changed)}. Set them back, or start a new run "
            "(another train.run_dir)"
        )
    return state["step"], load_file(folder / "model.safetensors"), load_file(folder / "optimizer.safetensors")


def _checkpoints(run: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    return sorted(run.glob("checkpoint-*"), key=lambda p: int(p.name.rpartition("-")[2]), reverse=True)


def _verified_state(folder: Path) -> dict:
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        if state["format"] != FORMAT:
            raise CheckpointError(f"{folder}: format {state['format']}, this program reads {FORMAT}")
        for name, checksum in state["checksums"].items():
            if _checksum(folder / name) != checksum:
                raise CheckpointError(f"{folder / name}: damaged (its checksum differs)")
    except (OSError, KeyError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{folder}: not a whole checkpoint ({type(error).__name__}: {error})") from None
    return state


def _checksum(path: Path) -> str:
    state = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            state.update(block)
    return state.hexdigest()


def _sync(path: Path) -> None:
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
