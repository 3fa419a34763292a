"""Checkpoints: safetensors and JSON, whole tensors, so that any world size and ZeRO stage can go on from them.

    checkpoint-000100/model.safetensors       float32 parameters by name (those that are trained)
                      optimizer.safetensors   AdamW's moments by name
                      state.json              the step, what the run was, the files' checksums and its own

A checkpoint is written to a folder beside its place, synced to disk and renamed: a crash or a full disk at any moment
leaves the earlier ones as they were. There are no random states to keep: batches and dropout masks are functions of
(seed, step).
"""

from __future__ import annotations

import difflib
import json
import re
import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import NamedTuple

import xxhash
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hbt_fast.base.errors import UserError
from hbt_fast.base.files import free_space, settle, sync

FORMAT = 3


class Checkpoint(NamedTuple):
    """What a checkpoint holds.

    Attributes:
        step: steps done.
        parameters: the trained ones by name, float32.
        moments: the optimizer's, by name.
        progress: what else `save_checkpoint` was given.
        changed: in what the run that goes on differs from the one that wrote it, in words.
    """

    step: int
    parameters: dict[str, Tensor]
    moments: dict[str, Tensor]
    progress: dict
    changed: tuple[str, ...] = ()


class CheckpointError(UserError):
    """A checkpoint that cannot be used or written; the message says which and why."""


def save_checkpoint(
    run: Path,
    step: int,
    parameters: dict[str, Tensor],
    moments: dict[str, Tensor],
    identity: dict,
    keep: int,
    *,
    progress: dict | None = None,
    best: int | None = None,
) -> Path:
    """Write the checkpoint after `step` steps (one rank does this) and remove all but the newest `keep`.

    Args:
        run: the run folder.
        step: steps done.
        parameters: by name; what the engine's `state()` gave.
        moments: the same of the optimizer.
        identity: what must be the same for a run that goes on from it (JSON).
        keep: how many checkpoints stay, at least 1.
        progress: what else the run has to know to go on (JSON).
        best: the step of a checkpoint that stays however old it gets.

    Raises:
        CheckpointError: it could not be written (a full disk); nothing of it is left, the earlier ones are whole.
    """
    final = checkpoint_folder(run, step)
    for leftover in run.glob(".checkpoint-*.partial"):  # of a process that was killed while writing
        shutil.rmtree(leftover)
    _put_back(run)
    work = run / f".{final.name}.partial"
    try:
        work.mkdir(parents=True)
        checksums = {}
        for name, tensors in (("model.safetensors", parameters), ("optimizer.safetensors", moments)):
            save_file({key: value.contiguous() for key, value in tensors.items()}, work / name)
            checksums[name] = _checksum(work / name)
        state = {
            "format": FORMAT,
            "step": step,
            "progress": progress or {},
            "identity": identity,
            "checksums": checksums,
        }
        state = json.loads(json.dumps(state))
        state["own checksum"] = _checksum_of(state)
        (work / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
        settle(work)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(work, ignore_errors=True)
        raise CheckpointError(_why_not_written(run, final, parameters, moments, error)) from None
    aside = run / f".{final.name}.replaced"
    if final.exists():
        final.rename(aside)
    work.rename(final)
    sync(run)
    shutil.rmtree(aside, ignore_errors=True)
    # later ones are damaged (this run went on from before them): they do not count among the newest
    done = [old for old in _checkpoints(run) if _step(old) <= step]
    for old in done[max(keep, 1) :]:
        if _step(old) != best:
            shutil.rmtree(old)
    return final


def checkpoint_folder(run: Path, step: int) -> Path:
    """Where the checkpoint after so many steps is."""
    return run / f"checkpoint-{step:06d}"


def newest_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint of a run whose files are whole; damaged ones are passed over, aloud."""
    _put_back(run)
    for folder in _checkpoints(run):
        try:
            _verified_state(folder)
        except CheckpointError as error:
            print(f"{error}; trying the one before it", flush=True)
        else:
            return folder
    return None


def newest_step(run: Path) -> int:
    """The step of the newest checkpoint, whole or not; -1 if there is none."""
    return max(map(_step, _checkpoints(run)), default=-1)


def load_checkpoint(
    folder: Path, identity: dict | None, may_change: Callable[[dict, int], Collection[str]] = lambda before, done: ()
) -> Checkpoint:
    """Read a checkpoint.

    Args:
        folder: of the checkpoint.
        identity: what the run is now; None: whatever it is.
        may_change: given what the run was and the steps it had done, the names in which it may be another now.

    Raises:
        CheckpointError: not whole, or of a run with other settings (named).
    """
    state = _verified_state(folder)
    before, now = state["identity"], json.loads(json.dumps(identity or {}))
    free = may_change(before, state["step"])
    if unknown := sorted(set(free) - before.keys() - now.keys()):
        near = difflib.get_close_matches(unknown[0], before, 1)
        raise CheckpointError(
            f"train.resume_changed has {unknown[0]}, in which no run can change"
            + (f"; did you mean {near[0]}?" if near else f"; there are {', '.join(sorted(before))}")
        )
    names = [name for name, value in now.items() if differences(before, {name: value}, "{}{}")]
    changed = {name: differences(before, {name: now[name]}, "was {}, is {}") for name in names}
    if refused := [name for name in names if name not in free]:
        raise CheckpointError(
            f"{folder} is of a run with other settings or data: {'; '.join(t for n in refused for t in changed[n])}. "
            "Set them back; or start a new run (another train.run_dir); or, if the change is meant, write "
            f"train.resume_changed=[{', '.join(sorted({*free, *refused} & set(names)))}]"
        )
    parameters, moments = (load_file(folder / f"{name}.safetensors") for name in ("model", "optimizer"))
    said = tuple(text for name in names for text in changed[name])
    return Checkpoint(state["step"], parameters, moments, state["progress"], said)


def differences(before: dict, now: dict, words: str) -> list[str]:
    """In what two dictionaries of JSON differ, each as its name and the two values.

    Args:
        before: what a run was.
        now: what it is; what else `before` has does not count.
        words: says the two values, as "was {}, is {}".
    """
    found = []
    for name, value in now.items():
        old = before.get(name)
        if isinstance(value, dict) and isinstance(old, dict):
            missing = dict.fromkeys(old.keys() - value.keys())
            found += [f"{name}: {text}" for text in differences(old, {**value, **missing}, words)]
        elif old != value:
            found.append(f"{name} {words.format(repr(old), repr(value))}")
    return found


def _checkpoints(run: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    folders = [path for path in run.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(folders, key=_step, reverse=True)


def _step(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])


def _put_back(run: Path) -> None:
    """Checkpoints that a process moved aside and was killed before their replacement was in place."""
    for aside in run.glob(".checkpoint-*.replaced"):
        final = run / aside.name[1:].removesuffix(".replaced")
        if final.exists():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            aside.rename(final)


def _why_not_written(run: Path, final: Path, parameters: dict, moments: dict, error: Exception) -> str:
    size = sum(value.nbytes for tensors in (parameters, moments) for value in tensors.values()) / 2**20
    kept = _checkpoints(run)
    go_on = f"train.resume=true goes on from {kept[0]}, which is whole" if kept else "there is no earlier checkpoint"
    return (
        f"{final} could not be written: {error}. It takes {size:,.1f} MiB{free_space(run)}. Make room (or keep fewer: "
        f"train.keep_checkpoints), then start again: {go_on}"
    )


def _verified_state(folder: Path) -> dict:
    try:
        state = json.loads((folder / "state.json").read_bytes())
        if state["format"] != FORMAT:
            raise CheckpointError(f"{folder}: format {state['format']!r}, this program reads {FORMAT}")
        if state.pop("own checksum") != _checksum_of(state):
            raise CheckpointError(f"{folder / 'state.json'}: damaged (its checksum differs)")
        for name, checksum in state["checksums"].items():
            if _checksum(folder / name) != checksum:
                raise CheckpointError(f"{folder / name}: damaged (its checksum differs)")
    except CheckpointError:
        raise
    except (OSError, KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{folder}: not a whole checkpoint ({type(error).__name__}: {error})") from None
    return state


def _checksum_of(state: dict) -> str:
    """Of what state.json says, whatever its white space."""
    return xxhash.xxh3_128_hexdigest(json.dumps(state, sort_keys=True, separators=(",", ":")).encode())


def _checksum(path: Path) -> str:
    state = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            state.update(block)
    return state.hexdigest()
