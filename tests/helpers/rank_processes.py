"""Functions and scripts run in several processes over gloo, forked from a server that is ready (rank_server.py)."""

import multiprocessing as mp
import os
import runpy
import socket
import sys
import time
from collections.abc import Callable, Collection, Mapping
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


def run_script(script: Path, world: int, *arguments: str, seconds: float = 60, cwd: Path | None = None) -> list[Ended]:
    """A script as `torchrun` would run it in `world` processes: with the ranks' variables, as `__main__`.

    `cwd`: the folder that it runs in. Nobody ends a rank because another has failed, as torchrun does. AssertionError
    if one does not end by itself.
    """
    port = free_port()
    codes = _ended(
        [(_script, (script, rank, world, port, arguments, cwd)) for rank in range(world)], seconds=seconds, lost=()
    )
    said = [[_log(script, rank, name).read_text() for name in ("stdout", "stderr")] for rank in range(world)]
    return [Ended(code, *texts) for code, texts in zip(codes, said, strict=True)]


def run_module(module: str, world: int, folder: Path, *arguments: str, seconds: float = 500) -> list[Ended]:
    """As `run_script`, but for `-m MODULE`; `folder`: where what the ranks say is kept."""
    script = folder / f"{module.replace('.', '_')}.py"
    script.write_text(f"import runpy\n\nrunpy.run_module({module!r}, run_name='__main__', alter_sys=True)\n")
    return run_script(script, world, *arguments, seconds=seconds)


def run_program(words: list[str], folder: Path, env: Mapping[str, str], *, cwd: Path, seconds: float = 500) -> Ended:
    """`ftrain ...` or `python -m MODULE ...` as a process of its own, forked where the imports of all are done.

    `folder`: where what it says is kept. AssertionError if it does not end by itself.
    """
    log = folder / "program"
    (code,) = _ended([(_program, (words, log, dict(env), cwd))], seconds=seconds, lost=())
    return Ended(code, *(_log(log, 0, name).read_text() for name in ("stdout", "stderr")))


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


def _said_to(file: Path, rank: int) -> None:
    """What the process says from now on goes to files beside this one."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(_log(file, rank, name), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)


def _program(words: list[str], log: Path, env: dict[str, str], cwd: Path) -> None:
    _said_to(log, 0)
    os.environ |= env
    os.chdir(cwd)
    torch.set_num_threads(1)
    module = {"ftrain": "ftrain.cli.main"}.get(words[0]) or words[2]
    sys.argv = [module, *words[1 if words[0] == "ftrain" else 3 :]]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _script(script: Path, rank: int, world: int, port: int, arguments: tuple[str, ...], cwd: Path | None) -> None:
    os.chdir(cwd or os.getcwd())
    _said_to(script, rank)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    sys.argv = [str(script), *arguments]
    runpy.run_path(str(script), run_name="__main__")
