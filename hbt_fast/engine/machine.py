"""What a run runs on: versions and hardware, for those who read its figures."""

from __future__ import annotations

import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from hbt_fast.engine.memory import GIB

if TYPE_CHECKING:
    from hbt_fast.engine.launch import World

PACKAGES = ("hbt-fast", "torch", "transformers", "tokenizers", "deepspeed", "triton", "numpy", "numba")


def describe(world: World) -> dict[str, str]:
    """The machine of rank 0 and its versions, by name.

    Args:
        world: the ranks.
    """
    found = {"ranks": f"{world.size} x {world.device.type}", "processor": _processor()}
    found["cores"] = str(len(os.sched_getaffinity(0)))
    found["memory"] = f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / GIB:.0f} GiB"
    if world.device.type == "cuda":
        gpu = torch.cuda.get_device_properties(world.device)
        found["GPU"] = f"{gpu.name}, {gpu.total_memory / GIB:.0f} GiB, CUDA {torch.version.cuda}"
    found["threads"] = str(torch.get_num_threads())
    found["system"] = platform.platform()
    found["Python"] = platform.python_version()
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()
