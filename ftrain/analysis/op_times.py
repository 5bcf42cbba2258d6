"""The time of a node before it runs: as measured on this device earlier, else estimated by a roofline."""

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
    """The peak speed of a device.

    - `name`: names the file of measured times.
    - `flops`: FLOP/s of matrix products, by dtype; float32 must be there.
    - `bandwidth`: bytes/s of its memory. `host_link`: bytes/s of copies from or to the host.
    - `launch`: microseconds that an op takes beyond its work.
    - `efficiency`: the share of `flops` that large ops reach.
    """

    name: str
    flops: Mapping[torch.dtype, float]
    bandwidth: float
    host_link: float
    launch: float
    efficiency: float = 0.7

    def flops_of(self, dtype: torch.dtype) -> float:
        """FLOP/s in `dtype`; those of float32 if `dtype` is not listed."""
        return self.flops.get(dtype, self.flops[torch.float32])


# NVIDIA's data sheet of the H100 SXM; kernels reach about 80% of its memory's 3.35 TB/s.
_ABSENT_CARD = Speed(
    "h100-data-sheet",
    {torch.bfloat16: 989.4e12, torch.float16: 989.4e12, torch.float32: 67e12},
    bandwidth=2.7e12,
    host_link=55e9,
    launch=3.0,
)


@cache
def speed_of(device: torch.device) -> Speed:
    """The speed of a device of this machine, measured at the first call (a fraction of a second).

    A card that this machine does not have is taken to be an H100, with the figures of its data sheet.

    >>> import torch
    >>> from ftrain.analysis.op_times import speed_of
    >>> speed_of(torch.device("cpu")).flops_of(torch.float32) > 1e8
    True
    """
    if absent_device([device]) is not None:
        return _ABSENT_CARD
    dtypes = (torch.float32, torch.bfloat16) if device.type == "cuda" else (torch.float32,)
    flops = {dtype: peak_flops(device, dtype) for dtype in dtypes}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu-{torch.get_num_threads()}"
    link = (host_bandwidth(device) or 25e9) if device.type == "cuda" else copy_bandwidth(device)
    return Speed(name, flops, copy_bandwidth(device), link, launch=3.0, efficiency=0.9)


@dataclass
class OpTimes:
    """Microseconds of ops on a device: measured ones where there are any, else estimates by a roofline.

    `speed`: the device, for the roofline. `measured`: microseconds by `op_key`.

    >>> import torch
    >>> import ftrain
    >>> from ftrain.analysis.op_times import OpTimes, Speed
    >>> speed = Speed("example", {torch.float32: 1e12}, bandwidth=1e11, host_link=1e10, launch=1.0, efficiency=0.5)
    >>> x = ftrain.Aval((1000, 1000), torch.float32, torch.device("cpu"))
    >>> graph = ftrain.jit(lambda a: a @ a, backend="aten").lower(x).graph
    >>> round(sum(OpTimes(speed).microseconds(node) for node in graph.graph.nodes))  # 2e9 FLOPs at 5e11 a second
    4001
    """

    speed: Speed
    measured: dict[str, float] = field(default_factory=dict)

    @staticmethod
    def on(device: torch.device, mesh: Mesh | None = None) -> "OpTimes":
        """Times on a device of this machine, with what `save` has kept of it.

        The file is in the folder `FTRAIN_CACHE`, by default ~/.cache/ftrain. A file that cannot be read is ignored with
        a warning in the log. On a mesh of processes all ranks get rank 0's times, because all ranks must plan the same
        graph.
        """
        speed = speed_of(device)
        file = cache_file(speed.name)
        times = OpTimes(speed, _cached(file))
        return same_everywhere(times, mesh)

    def save(self) -> Path:
        """Write the measured times to the cache file of the device, atomically, and return its path.

        OSError if the folder cannot be written.
        """
        file = cache_file(self.speed.name)
        file.parent.mkdir(parents=True, exist_ok=True)
        fresh = file.with_suffix(f".{os.getpid()}")
        fresh.write_text(json.dumps(dict(sorted(self.measured.items())), indent=0))
        fresh.replace(file)
        return file

    def microseconds(self, node: fx.Node) -> float:
        """Microseconds of a node. A loop takes all its iterations, a copy from or to the host only its launch."""
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
    """Read a file that `OpTimes.save` wrote, on this machine or another: microseconds by `op_key`.

    ValueError if the file cannot be read or does not hold such times.
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
    """The key of a node's measured time: its op, and the shapes and dtypes of its result and inputs."""
    values = [sized(n) for n in [node, *node.all_input_nodes]]
    return "|".join([op_name(node), *map(_show, values)])


def cache_file(device: str) -> Path:
    """The file with the measured times of the device of this name."""
    named = os.environ.get("FTRAIN_CACHE")
    folder = Path(named) if named else Path.home() / ".cache" / "ftrain"
    return folder / f"op-times-{''.join(c if c.isalnum() else '-' for c in device)}.json"


def _cached(file: Path) -> dict[str, float]:
    """The times in a cache file; none, with a warning in the log, if it cannot be read."""
    try:
        return read_times(file) if file.exists() else {}
    except (ValueError, RecursionError) as error:
        _log.warning("%s: times are estimated instead; remove the file and measure again", error)
        return {}


def _show(value: object) -> str:
    if isinstance(value, Tensor):
        return typed_shape(value)
    if isinstance(value, list | tuple):
        return "(" + ",".join(map(_show, value)) + ")"
    return type(value).__name__
