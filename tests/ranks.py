"""Run a function on several ranks, each a process of its own, as a launcher would; on the CPU unless asked."""

from __future__ import annotations

import os
import socket
import sys

import torch
import torch.multiprocessing as mp


def run_ranks(function, world: int, *arguments, gpu: bool = False) -> None:
    """Call function(rank, world, *arguments) in `world` processes; an error in one is raised here."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(_enter, (function, world, port, arguments, gpu), nprocs=world, start_method="spawn")


def _enter(rank: int, function, world: int, port: int, arguments: tuple, gpu: bool) -> None:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()})
    if not gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(1)
    try:
        function(rank, world, *arguments)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # at a usual exit gloo now and then aborts: "terminate called without an active exception"
