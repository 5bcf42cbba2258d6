"""Functions run in several processes over gloo."""

import multiprocessing as mp
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist


def exit_codes(function, folder: Path, *, world: int = 2, seconds: float = 60.0) -> list[int | None]:
    """The exit codes of `function(rank, folder)` in `world` processes; AssertionError if one hangs."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed.tensor", "ftrain", "modules.decoder"])
    store = str(folder / "store")
    processes = [context.Process(target=_process, args=(function, r, world, store, folder)) for r in range(world)]
    for process in processes:
        process.start()
    deadline = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.1, deadline - time.monotonic()))
    hanging = [p for p in processes if p.is_alive()]
    for process in hanging:
        process.kill()
    assert not hanging, "a process hangs"
    return [p.exitcode for p in processes]


def _process(function, rank, world, store, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", rank=rank, world_size=world, store=dist.FileStore(store, world), timeout=timedelta(seconds=120)
    )
    function(rank, folder)
    dist.destroy_process_group()
