"""Functions and scripts run in several processes over gloo, forked from a server that is ready (rank_server.py)."""

import multiprocessing as mp
import os
import runpy
import socket
import sys
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

PRELOAD = ["tests.helpers.rank_server"]


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
    port = free_port()
    return _ended(
        [(_process, (function, rank, world, port, timeout, args)) for rank in range(world)], seconds=seconds, lost=lost
    )


@dataclass(frozen=True)
class Ended:
    """How a rank's process ended: its exit code, and what it said."""

    code: int | None
    stdout: str
    stderr: str


def run_script(script: Path, world: int, *arguments: str, seconds: float = 60) -> list[Ended]:
    """A script as `torchrun` would run it in `world` processes: with the ranks' variables, as `__main__`.

    Nobody ends a rank because another has failed, as torchrun does. AssertionError if one does not end by itself.
    """
    port = free_port()
    codes = _ended(
        [(_script, (script, rank, world, port, arguments)) for rank in range(world)], seconds=seconds, lost=()
    )
    said = [[_log(script, rank, name).read_text() for name in ("stdout", "stderr")] for rank in range(world)]
    return [Ended(code, *texts) for code, texts in zip(codes, said, strict=True)]


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _ended(
    ranks: list[tuple[Callable[..., None], tuple[Any, ...]]], *, seconds: float, lost: Collection[int]
) -> list[int | None]:
    """The exit codes of a process for each call; AssertionError if one not `lost` hangs."""
    started = [_context().Process(target=function, args=args) for function, args in ranks]
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


def _log(script: Path, rank: int, name: str) -> Path:
    return script.with_name(f"{script.stem}.{rank}.{name}")


def _script(script: Path, rank: int, world: int, port: int, arguments: tuple[str, ...]) -> None:
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(_log(script, rank, name), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    sys.argv = [str(script), *arguments]
    runpy.run_path(str(script), run_name="__main__")
