"""The devices of this run as a cluster: what they compute, hold and send, as measured."""

import os
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ftrain.analysis.cluster import Cluster, Efficiency
from ftrain.analysis.hardware import device_bytes
from ftrain.analysis.op_times import OpTimes, speed_of
from ftrain.sharding.joint_calls import joint_call

T = TypeVar("T")
_ROUNDS = 5
_LARGE = 1 << 22  # elements of a message whose time is bandwidth alone
_ALONE = (10.0, 5e9)  # microseconds and bytes/s for a run of one process, which has no links to measure


def world_size() -> int:
    """The number of ranks of this run: of its process group, else what torchrun says, else one."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))


def local_device() -> torch.device:
    """The accelerator of this process, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def local_cluster(device: torch.device, *, memory: float | None = None) -> Cluster:
    """The device of this process as a cluster of one node, by measured peaks, of which large ops are taken to reach
    most.

    `memory`: bytes of a rank that a step may use; default all that the device has, which on a CPU the ranks of this
    machine share. In a run of several processes all call this together, since the link between them is measured; each
    then gets rank 0's figures.
    """
    speed = speed_of(device)
    local = int(os.environ.get("LOCAL_WORLD_SIZE", str(world_size())))
    if memory is None:
        memory = device_bytes(device) / (local if device.type == "cpu" else 1)
    latency, bandwidth = measured_link(device)
    cluster = Cluster(
        name=speed.name,
        gpus_per_node=max(local, 1),
        flops={torch.bfloat16: speed.flops_of(torch.bfloat16), **speed.flops},
        memory=memory,
        memory_bandwidth=speed.bandwidth,
        nvlink=bandwidth,
        network=bandwidth,
        nvlink_latency=latency,
        efficiency=_efficiency(device, speed.launch),
        device_type=device.type,
        measured=OpTimes.on(device).measured,
    )
    return from_rank_zero(lambda: cluster)


def is_first() -> bool:
    """True on rank 0 of a run."""
    return not dist.is_initialized() or dist.get_rank() == 0


def from_rank_zero(make: Callable[[], T]) -> T:
    """The result of `make()` on rank 0, on all ranks, which call this together. A ValueError of rank 0 is raised on
    all.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return make()
    box: list[Any] = [None, None]
    if is_first():
        try:
            box = [make(), None]
        except ValueError as error:
            box = [None, str(error)]
    joint_call("asked rank 0 for a plan")
    dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise ValueError(box[1])
    return box[0]


def measured_link(device: torch.device) -> tuple[float, float]:
    """Microseconds of a small sum over all ranks, and bytes/s that a rank sends in a large one. Ranks call this
    together.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return _ALONE
    ranks = dist.get_world_size()
    small, large = (_sum_seconds(torch.zeros(n, device=device)) for n in (8, _LARGE))
    sent = 2 * (ranks - 1) / ranks * 4 * _LARGE
    return 1e6 * small, sent / max(large - small, 1e-9)


def _sum_seconds(array: torch.Tensor) -> float:
    best = float("inf")
    for _ in range(_ROUNDS):
        _wait(array.device)
        began = time.perf_counter()
        dist.all_reduce(array)
        _wait(array.device)
        best = min(best, time.perf_counter() - began)
    return best


def _efficiency(device: torch.device, launch: float) -> Efficiency:
    """Shares of the measured peaks that ops reach. A CPU's ops run on one kind of core; on a GPU attention reaches less
    than dense products.
    """
    attention, grouped = (0.9, 0.9) if device.type == "cpu" else (0.5, 0.7)
    return Efficiency(
        matmul=0.9,
        attention=attention,
        grouped=grouped,
        bandwidth=1.0,
        nvlink=1.0,
        network=1.0,
        launch=launch,
        fragmentation=1.0,
    )


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
