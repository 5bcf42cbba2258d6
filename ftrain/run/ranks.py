"""The ranks of a run: one process alone, all ranks in lockstep in one process, or one process each under torchrun."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from ftrain.runtime.host_copy import HostCopy
from ftrain.sharding import Mesh
from ftrain.sharding.foreign_axes import FOREIGN
from ftrain.sharding.joint_calls import joint_call

T = TypeVar("T")


@dataclass(frozen=True)
class MeshFlags:
    """The sizes of a run's mesh, as flags of a command line."""

    replicate: int = 1
    """Copies of the model, each divided over the other axes (HSDP)."""
    shard: int | None = None
    """Ranks that divide parameters and batch; default: all that the other axes leave."""
    sequence: int = 1
    """Ranks that share the tokens of a pack."""
    expert: int = 1
    """Slices of the experts, folded over shard x sequence."""
    timeout: float = 600.0
    """Seconds after which a collective that has not ended stops the run."""


def refuse_foreign_flags(arguments: Sequence[str]) -> None:
    """ValueError for a flag that names an axis of other trainers, with what to use here."""
    for argument in arguments:
        name = argument.partition("=")[0].removeprefix("--")
        if argument.startswith("--") and name in FOREIGN:
            raise ValueError(f"--{name}: {FOREIGN[name]}")


@contextmanager
def open_mesh(flags: MeshFlags, device: torch.device) -> Iterator[Mesh | None]:
    """The mesh of this run with the sizes of `flags`, or None for a single rank. Under torchrun its process group, for
    `device`, lives as long as the block.

    Without torchrun, sizes above 1 give a virtual mesh: all ranks in lockstep in this process. ValueError lists the
    sizes that fit.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if "RANK" not in os.environ:
        ranks = flags.replicate * (flags.shard or 1) * flags.sequence
        sizes = {"replicate": flags.replicate, "shard": flags.shard, "sequence": flags.sequence, "expert": flags.expert}
        mesh = Mesh.over(ranks, **sizes, kind="virtual")  # type: ignore[arg-type]
        yield mesh if ranks > 1 else None
        return
    mesh = Mesh.over(world, replicate=flags.replicate, shard=flags.shard, sequence=flags.sequence, expert=flags.expert)
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    timeout = timedelta(seconds=flags.timeout)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=_store(world, timeout),
        rank=int(os.environ["RANK"]),
        world_size=world,
        timeout=timeout,
    )
    try:
        yield mesh
    finally:
        dist.destroy_process_group()


def _store(world: int, timeout: timedelta) -> dist.Store:
    """The store that torchrun names, separate for each attempt on one node.

    After a restart torchrun hands out the store of the attempt before, and ranks would look for dead ones. On many
    nodes attempts are not counted alike; there TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 gives each a store of its own.
    """
    rank, agents = int(os.environ["RANK"]), int(os.environ.get("GROUP_WORLD_SIZE", "1"))
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        world,
        is_master=rank == 0 and not held_by_agent(),
        timeout=timeout,
        multi_tenant=True,
    )
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if agents == 1 else ""
    return dist.PrefixStore(f"attempt {attempt}", store)


def held_by_agent() -> bool:
    """Whether torchrun holds the ranks' common store; otherwise rank 0 does."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def is_main() -> bool:
    """True in the process that prints and writes."""
    return int(os.environ.get("RANK", "0")) == 0


def any_rank(flag: bool) -> bool:
    """True on all ranks if `flag` is True on one, so that a signal that reached one process stops all after the same
    step. All ranks call this together.
    """
    if not dist.is_initialized():
        return flag
    joint_call("asked whether a flag is set on any rank")
    found = torch.tensor(int(flag))
    if dist.get_backend() == "nccl":
        found = found.cuda()
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return bool(found)


def asked_of_ranks(flag: Callable[[], bool]) -> Callable[[], bool]:
    """The answer of `any_rank` for the flag, as a function that reads it. All ranks call this together.

    On CUDA the question is queued here, and reading the answer waits for none of the work that is issued in between.
    Elsewhere the flag is read when the answer is.
    """
    if not (dist.is_initialized() and dist.get_backend() == "nccl"):
        return lambda: any_rank(flag())
    joint_call("asked whether a flag is set on any rank")
    found = torch.full((), int(flag()), device="cuda")
    dist.all_reduce(found, dist.ReduceOp.MAX)
    answer = HostCopy(found)
    return lambda: bool(answer.read())


def of_main(value: T) -> T:
    """The main process's value, on every process: for choices that depend on the clock or on files. All ranks call this
    together.
    """
    if not dist.is_initialized():
        return value
    joint_call("asked for the main process's value")
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
