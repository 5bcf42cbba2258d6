"""Functions run in several processes over gloo, forked from a server that has imported what they need once."""

import multiprocessing as mp
import socket
import time
from collections.abc import Callable, Collection
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

PRELOAD = [
    "torch.distributed.tensor",
    "ftrain",
    "ftrain.checkpoint",
    "ftrain.hf",
    "ftrain.modules.omni",
    "ftrain.sharding.processes",
]


def run(
    function: Callable, world: int, *args: Any, seconds: float = 120, timeout: float = 30, lost: Collection[int] = ()
) -> dict:
    """`function(rank, *args, found)` in `world` processes; what they put into the dictionary `found`.

    AssertionError if one fails or hangs, but for those that are `lost` on purpose. `timeout`: of a collective.
    """
    with _context().Manager() as manager:
        found = manager.dict()
        codes = exit_codes(function, world, *args, found, seconds=seconds, timeout=timeout, lost=lost)
        assert not any(code for rank, code in enumerate(codes) if rank not in lost), f"exit codes {codes}"
        return dict(found)


def exit_codes(
    function: Callable, world: int, *args: Any, seconds: float = 60, timeout: float = 30, lost: Collection[int] = ()
) -> list[int | None]:
    """The exit codes of `function(rank, *args)` in `world` processes; AssertionError if one not `lost` hangs."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    started = [
        _context().Process(target=_process, args=(function, rank, world, port, timeout, args)) for rank in range(world)
    ]
    for process in started:
        process.start()
    deadline = time.monotonic() + seconds
    for rank, process in enumerate(started):
        if rank not in lost:
            process.join(max(0.1, deadline - time.monotonic()))
    hanging = [rank for rank, process in enumerate(started) if process.is_alive()]
    for process in started:
        process.kill()
        process.join()
    assert set(hanging) <= set(lost), f"ranks {hanging} hang"
    return [process.exitcode for process in started]


def _context() -> Any:
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


def _process(function: Callable, rank: int, world: int, port: int, timeout: float, args: tuple) -> None:
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group(
        "gloo", init_method=address, rank=rank, world_size=world, timeout=timedelta(seconds=timeout)
    )
    function(rank, *args)
    dist.destroy_process_group()
