"""The memory plan: which bytes are alive at each node, from the graph alone.

The generated program drops a variable right after its last use, so the bytes alive are those of the storages that some
variable still looks at. Views share a storage; what an op allocates for itself while it runs is its workspace.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

import kernels
from ftrain.loop import is_loop, loop_body
from ftrain.private import storage_id


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

    `inputs`: the arguments, alive throughout (state and batch). `peak`: the most alive at once beyond them, workspace of
    ops included. `timeline`: (node name, bytes alive beyond the inputs while it runs). `top`: what is alive at the peak.
    """

    inputs: int
    peak: int
    peak_node: str
    timeline: list[tuple[str, int]]
    top: list[LiveTensor]

    @property
    def total(self) -> int:
        """Inputs and peak together."""
        return self.inputs + self.peak


def plan_memory(module: fx.GraphModule, *, round_to: int = 1) -> MemoryPlan:
    """Simulate the graph; `round_to` is the allocator's granularity in bytes (512 on CUDA, 1 for CPU storages)."""
    nodes = list(module.graph.nodes)
    last_use, owner = _lifetimes(nodes)
    held = {s for n in nodes if n.op in ("placeholder", "get_attr") for s, _ in _storages(n)}
    inputs = sum(size for n in nodes if n.op == "placeholder" for _, size in _storages(n))
    sizes = {s: -(-size // round_to) * round_to for n in nodes for s, size in _storages(n)}
    expiring: dict[fx.Node, list[int]] = {}
    for storage, node in last_use.items():
        expiring.setdefault(node, []).append(storage)
    alive: set[int] = set()
    live = peak = 0
    timeline, at_peak, peak_node = [], set(), ""
    for node in nodes:
        for storage, _ in _storages(node):
            if storage not in held and storage not in alive:
                alive.add(storage)
                live += sizes[storage]
        now = live + workspace_bytes(node)
        if node.op not in ("placeholder", "output"):
            timeline.append((node.name, now))
        if now > peak:
            peak, at_peak, peak_node = now, set(alive), node.name
        for storage in expiring.get(node, ()):
            if storage in alive:
                alive.discard(storage)
                live -= sizes[storage]
    top = sorted((_describe(owner[s], sizes[s]) for s in at_peak), reverse=True)
    return MemoryPlan(inputs, peak, peak_node, timeline, top)


def _storages(node: fx.Node) -> list[tuple[int, int]]:
    value = node.meta.get("val")
    found: list[tuple[int, int]] = []
    for v in value if isinstance(value, list | tuple) else [value]:
        if isinstance(v, Tensor):
            size = v.untyped_storage().nbytes()
            found.append((storage_id(v), int(size) if isinstance(size, int) else size.node.hint or 0))
    return found


def _lifetimes(nodes: list[fx.Node]) -> tuple[dict[int, fx.Node], dict[int, fx.Node]]:
    """For each storage the node after which nothing looks at it, and the node that made it."""
    position = {n: i for i, n in enumerate(nodes)}
    last: dict[int, fx.Node] = {}
    owner: dict[int, fx.Node] = {}
    for node in nodes:
        end = max([node, *node.users], key=position.__getitem__)
        for storage, _ in _storages(node):
            owner.setdefault(storage, node)
            if storage not in last or position[end] > position[last[storage]]:
                last[storage] = end
    return last, owner


def workspace_bytes(node: fx.Node) -> int:
    """What the op of a node allocates beyond its outputs while it runs."""
    if is_loop(node):
        return plan_memory(loop_body(node)).peak
    rule = _workspace_rule(node.target)
    if rule is None:
        return 0
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    return int(rule(*args, **kwargs))


def _workspace_rule(target: Any) -> Callable | None:
    rules: Mapping[str, Callable] = kernels.WORKSPACE
    return rules.get(target._schema.name) if isinstance(target, torch._ops.OpOverload) else None


def _describe(node: fx.Node, size: int) -> LiveTensor:
    meta = node.meta
    return LiveTensor(size, node.name, meta.get("path", ""), str(meta.get("site") or ""), meta.get("phase", ""))
