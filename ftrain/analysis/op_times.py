"""How long a node takes, before it is run: measured on this device where it was, else by a roofline."""

import json
import logging
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, fx

from ftrain.analysis.flops import is_view, node_flops, node_traffic
from ftrain.analysis.hardware import copy_bandwidth, host_bandwidth, peak_flops
from ftrain.graph.absent_device import absent_device
from ftrain.graph.loop import is_loop, loop_body
from ftrain.graph.sizes import sized
from ftrain.graph.text import op_name
from ftrain.kernels.offload import fetch_start, offload_start
from ftrain.sharding.mesh import Mesh
from ftrain.sharding.processes import same_everywhere
from ftrain.tree import typed_shape

_log = logging.getLogger("ftrain.analysis.op_times")


@dataclass(frozen=True)
class Speed:
    """What a device does at most: FLOP/s of matrix products by dtype, bytes/s of its memory, and of copies to the host.

    `launch`: microseconds that an op costs beyond its work. `efficiency`: the share of the peak that large ops reach.
    """

    name: str
    flops: Mapping[torch.dtype, float]
    bandwidth: float
    host_link: float
    launch: float
    efficiency: float = 0.7

    def flops_of(self, dtype: torch.dtype) -> float:
        """FLOP/s in a dtype; of one that is not listed, those of float32."""
        return self.flops.get(dtype, self.flops[torch.float32])


# NVIDIA's data sheet of the H100 SXM; of its memory's 3.35 TB/s kernels reach about 80%.
_CARD_ON_PAPER = Speed(
    "h100-data-sheet",
    {torch.bfloat16: 989.4e12, torch.float16: 989.4e12, torch.float32: 67e12},
    bandwidth=2.7e12,
    host_link=55e9,
    launch=3.0,
)


@cache
def speed_of(device: torch.device) -> Speed:
    """The device at hand, measured once (a fraction of a second); a card that is not here is an H100 on paper."""
    if absent_device([device]) is not None:
        return _CARD_ON_PAPER
    dtypes = (torch.float32, torch.bfloat16) if device.type == "cuda" else (torch.float32,)
    flops = {dtype: peak_flops(device, dtype) for dtype in dtypes}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu-{torch.get_num_threads()}"
    link = (host_bandwidth(device) or 25e9) if device.type == "cuda" else copy_bandwidth(device)
    return Speed(name, flops, copy_bandwidth(device), link, launch=3.0, efficiency=0.9)


@dataclass
class OpTimes:
    """Microseconds of ops by what they are given: `measured` (by op, shapes and dtypes) over a roofline."""

    speed: Speed
    measured: dict[str, float] = field(default_factory=dict)

    @staticmethod
    def on(device: torch.device, mesh: Mesh | None = None) -> "OpTimes":
        """For the device at hand, with what was measured on it before (`FTRAIN_CACHE`, default ~/.cache/ftrain).

        On a mesh of processes all take rank 0's: graphs that are planned by times must be the same on all ranks.
        """
        speed = speed_of(device)
        file = cache_file(speed.name)
        times = OpTimes(speed, _cached(file))
        return same_everywhere(times, mesh)

    def save(self) -> Path:
        """Write what was measured beside that of other devices; the file is replaced at once."""
        file = cache_file(self.speed.name)
        file.parent.mkdir(parents=True, exist_ok=True)
        fresh = file.with_suffix(f".{os.getpid()}")
        fresh.write_text(json.dumps(dict(sorted(self.measured.items())), indent=0))
        fresh.replace(file)
        return file

    def microseconds(self, node: fx.Node) -> float:
        """How long a node takes; a loop takes all its rounds, a copy from or to the host no more than its launch."""
        if node.op != "call_function" or is_view(node):
            return 0.0
        if node.target in (offload_start, fetch_start):
            return self.speed.launch
        if is_loop(node):
            return int(node.args[1]) * sum(self.microseconds(n) for n in loop_body(node).graph.nodes)  # type: ignore[arg-type]
        measured = self.measured.get(op_key(node))
        return measured if measured is not None else self._roofline(node)

    def _roofline(self, node: fx.Node) -> float:
        value = node.meta.get("val")
        dtype = value.dtype if isinstance(value, Tensor) else torch.float32
        compute = node_flops(node) / (self.speed.flops_of(dtype) * self.speed.efficiency)
        memory = node_traffic(node) / self.speed.bandwidth
        return self.speed.launch + 1e6 * max(compute, memory)


def read_times(file: Path) -> dict[str, float]:
    """Microseconds by `op_key` as `OpTimes.save` writes them; of this device or brought from another.

    ValueError if there is no such file, or it is not a table of such times.
    """
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: cannot be read as times of ops: {error}") from error
    if not isinstance(found, dict) or not all(isinstance(t, float | int) and 0 <= t < math.inf for t in found.values()):
        raise ValueError(
            f"{file} is not a table of ops' microseconds, as ftrain.profile_nodes(remember=True) writes one"
        )
    return found


def op_key(node: fx.Node) -> str:
    """What a node's time depends on: its op, and the shapes and dtypes that it reads and writes."""
    values = [sized(n) for n in [node, *node.all_input_nodes]]
    return "|".join([op_name(node), *map(_show, values)])


def cache_file(device: str) -> Path:
    """Where the times of a device are kept."""
    named = os.environ.get("FTRAIN_CACHE")
    folder = Path(named) if named else Path.home() / ".cache" / "ftrain"
    return folder / f"op-times-{''.join(c if c.isalnum() else '-' for c in device)}.json"


def _cached(file: Path) -> dict[str, float]:
    """What a file of the cache holds: of one that cannot be read nothing, which is said."""
    try:
        return read_times(file) if file.exists() else {}
    except (ValueError, RecursionError) as error:
        _log.warning("%s: times are estimated instead; remove the file, and measure anew", error)
        return {}


def _show(value: object) -> str:
    if isinstance(value, Tensor):
        return typed_shape(value)
    if isinstance(value, list | tuple):
        return "(" + ",".join(map(_show, value)) + ")"
    return type(value).__name__
