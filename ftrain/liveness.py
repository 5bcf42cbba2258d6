"""The memory plan: which bytes are alive at each node, from the graph alone.

The generated program drops a variable right after its last use, so the bytes alive are those of the storages that some
variable still looks at. Views share a storage; what an op allocates for itself while it runs is its workspace.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, fx

from ftrain.loop import is_loop, loop_body
from ftrain.op_rules import WORKSPACE
from ftrain.passes.sizes import sized, unknown_sizes
from ftrain.private import storage_id
from ftrain.workspace import aten_workspace
from kernels.offload import offload_start, offload_wait


class LiveTensor(NamedTuple):
    """A tensor alive at the peak: bytes, the node that made it, its parameter path, source line and phase."""

    bytes: int
    node: str
    path: str
    site: str
    phase: str


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes over the run of a graph.

    `inputs`: the arguments, alive throughout (state and batch). `peak`: the most alive at once beyond them, workspace
    of ops included. `timeline`: (node name, bytes alive beyond the inputs while it runs). `top`: what is alive at the
    peak, largest first; where the peak is in a loop, also what its body holds then. `host`: the most bytes at once that
    offloaded tensors take on the host; no part of the others. `libraries`: what libraries keep of the device's
    allocator from their first use on (cuBLAS's workspace), in none of the others. `reserved_share`: bytes that the
    allocator takes of the device for each that it hands out, an estimate (see `ftrain.cuda_allocator`); on a CPU 1.
    `unknown`: the sizes that depend on data, which are counted as the largest that they can be.
    """

    inputs: int
    peak: int
    peak_node: str
    timeline: list[tuple[str, int]]
    top: list[LiveTensor]
    host: int = 0
    libraries: int = 0
    reserved_share: float = 1.0
    unknown: tuple[str, ...] = ()

    @property
    def total(self) -> int:
        """Inputs and peak together: what a budget bounds."""
        return self.inputs + self.peak

    @property
    def allocated(self) -> int:
        """What the allocator hands out at the peak: the total and what libraries keep."""
        return self.total + self.libraries

    @property
    def reserved(self) -> int:
        """What the allocator will have taken of the device, by `reserved_share`: an estimate.

        A process takes more: CUDA's context (about half a GiB) and NCCL's buffers are not the allocator's.
        """
        return round(self.reserved_share * self.allocated)


class Held(NamedTuple):
    """A piece of memory: its bytes and the node that made it."""

    bytes: int
    owner: fx.Node


class Moment(NamedTuple):
    """While `node` runs: the bytes of all memory alive beyond the inputs, each piece of it, and the op's workspace;
    `host`: bytes of offloaded tensors, which are not among the others.

    `alive` changes as the simulation goes on: read it at once, or copy it.
    """

    node: fx.Node
    live: int
    workspace: int
    alive: Mapping[int, Held]
    host: int


def plan_memory(module: fx.GraphModule, *, round_to: int = 1) -> MemoryPlan:
    """Simulate the graph; `round_to` is the allocator's granularity in bytes (512 on CUDA, 1 for CPU storages)."""
    peak, peak_node, at_peak, host = 0, "", list[Held](), 0
    timeline = []
    for node, live, workspace, alive, away in simulate(module, round_to=round_to):
        host = max(host, away)
        if node.op != "placeholder":
            timeline.append((node.name, live + workspace))
        if live + workspace > peak:
            peak, peak_node, at_peak = live + workspace, node.name, list(alive.values())
    top = [_describe(held) for held in at_peak]
    for node in module.graph.nodes:
        if node.name == peak_node and is_loop(node):
            top += plan_memory(loop_body(node), round_to=round_to).top
    unknown = unknown_sizes(module)
    return MemoryPlan(input_bytes(module), peak, peak_node, timeline, sorted(top, reverse=True), host, unknown=unknown)


def input_bytes(module: fx.GraphModule) -> int:
    """Bytes of the arguments, and of tensors that the step captures."""
    given = [n for n in module.graph.nodes if n.op == "placeholder"]
    captured = {s: size for n in module.graph.nodes if n.op == "get_attr" for s, size in storages_of(n)}
    return sum(size for n in given for _, size in storages_of(n)) + sum(captured.values())


def simulate(module: fx.GraphModule, *, round_to: int = 1) -> Iterator[Moment]:
    """What is alive while each node runs, in order."""
    nodes = [n for n in module.graph.nodes if n.op != "output"]
    last_use = _last_uses(list(module.graph.nodes))
    held = {s for n in nodes if n.op in ("placeholder", "get_attr") for s, _ in storages_of(n)}
    expiring: dict[fx.Node, list[int]] = {}
    for storage, node in last_use.items():
        expiring.setdefault(node, []).append(storage)
    alive: dict[int, Held] = {}
    away: dict[int, int] = {}
    live = 0
    for node in nodes:
        for storage, size in storages_of(node):
            if on_host(node):
                away[storage] = size
            elif storage not in held and storage not in alive:
                alive[storage] = Held(-(-size // round_to) * round_to, node)
                live += alive[storage].bytes
        yield Moment(node, live, workspace_bytes(node, round_to=round_to), alive, sum(away.values()) + _host_of(node))
        for storage in expiring.get(node, ()):
            away.pop(storage, None)
            if storage in alive:
                live -= alive.pop(storage).bytes


def on_host(node: fx.Node) -> bool:
    """True for a node whose value is a copy of an offloaded tensor on the host."""
    return node.target in (offload_start, offload_wait)


def _host_of(node: fx.Node) -> int:
    """What a round of a loop's body holds on the host."""
    return plan_memory(loop_body(node)).host if is_loop(node) else 0


def storages_of(node: fx.Node) -> list[tuple[int, int]]:
    """Identity and bytes of each piece of memory that a node's value looks at."""
    value, with_sizes = node.meta.get("val"), sized(node)
    pairs = zip(*([v] if not isinstance(v, list | tuple) else v for v in (value, with_sizes)), strict=True)
    return [(storage_id(v), int(s.untyped_storage().nbytes())) for v, s in pairs if isinstance(v, Tensor)]


def _last_uses(nodes: list[fx.Node]) -> dict[int, fx.Node]:
    """For each piece of memory the node after which nothing looks at it."""
    position = {n: i for i, n in enumerate(nodes)}
    last: dict[int, fx.Node] = {}
    for node in nodes:
        end = max([node, *node.users], key=position.__getitem__)
        for storage, _ in storages_of(node):
            if storage not in last or position[end] > position[last[storage]]:
                last[storage] = end
    return last


def workspace_bytes(node: fx.Node, *, round_to: int = 1) -> int:
    """What the op of a node allocates beyond its outputs while it runs; of a loop, what a round of its body needs."""
    if is_loop(node):
        return plan_memory(loop_body(node), round_to=round_to).peak
    if not isinstance(node.target, torch._ops.OpOverload):
        return 0
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), sized)
    rule = WORKSPACE.get(node.target._schema.name)
    return int(rule(*args, **kwargs)) if rule is not None else aten_workspace(node.target, args, kwargs)


def _describe(held: Held) -> LiveTensor:
    meta = held.owner.meta
    return LiveTensor(
        held.bytes, held.owner.name, meta.get("path") or "", str(meta.get("site") or ""), meta.get("phase", "")
    )
