"""Offload: forward tensors that wait for the backward in pinned memory of the host.

A copy is four nodes (`ftrain.kernels.offload`): start and wait in the forward, start and wait in the backward. Their
places are simulated: the ops of the graph on one clock, the copies of each direction one after the other on the link. A
tensor leaves the device when its copy has had the time to finish, and its copy back starts as late as it can without a
wait. What compute still waits for is the price. Whole storages are offloaded; views are recomputed.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, fx

from ftrain.analysis.flops import is_view
from ftrain.analysis.hardware import host_bandwidth
from ftrain.analysis.op_times import OpTimes
from ftrain.analysis.pieces import storages_of
from ftrain.graph.collectives import COLLECTIVES
from ftrain.graph.loop import is_loop
from ftrain.graph.torch_private import value_of
from ftrain.kernels.offload import fetch_start, fetch_wait, offload_start, offload_wait
from ftrain.remat.peak import CopySlots, PeakModel
from ftrain.remat.policy import Remat, is_forward, recompute

_USUAL_BANDWIDTH = 25e9  # bytes/s, assumed for tensors that paths offload where the link is unknown
_CALLS = 4  # ops per offloaded tensor, each of which costs a launch


@dataclass(frozen=True)
class HostLink:
    """The link to the host: `bandwidth` in bytes per second of each direction, and `latency`, the microseconds that a
    copy takes beyond its bytes.
    """

    bandwidth: float
    latency: float = 10.0

    def microseconds(self, size: int) -> float:
        """How long a copy of `size` bytes takes, in microseconds."""
        return self.latency + 1e6 * size / self.bandwidth


def host_link(remat: Remat, device: torch.device) -> HostLink | None:
    """The link to plan with: as given, else as known of the device; None where nothing is offloaded."""
    if isinstance(remat.offload, float | int):
        return HostLink(float(remat.offload))
    known = host_bandwidth(device) if remat.offload == "auto" or remat.offloads_paths else None
    if known is None and remat.offloads_paths:
        known = _USUAL_BANDWIDTH
    return None if known is None else HostLink(known)


class CopySchedule(NamedTuple):
    """Where the copies of a set of offloaded nodes are placed, and the microseconds that each node adds to the step."""

    places: dict[int, CopySlots]
    microseconds: dict[int, float]

    @property
    def total(self) -> float:
        """Microseconds that all copies add."""
        return sum(self.microseconds[v] for v in sorted(self.microseconds))


@dataclass
class OffloadPlanner:
    """What may be offloaded of a graph, and when its copies run. Nodes are known by their number in `model.nodes`."""

    module: fx.GraphModule
    model: PeakModel
    times: OpTimes
    link: HostLink

    @cached_property
    def views(self) -> dict[int, tuple[int, ...]]:
        """The nodes that may be offloaded, in order, each with the later forward nodes that are views of its memory."""
        held = [n for n in self.module.graph.nodes if n.op in ("placeholder", "get_attr")]
        held += self.module.graph.output_node().all_input_nodes
        taken = {s for n in held for s, _ in storages_of(n)}
        first: dict[int, int] = {}
        found: dict[int, list[int]] = {}
        for v, node in enumerate(self.model.nodes):
            value = node.meta.get("val")
            if not is_forward(node) or is_loop(node) or node.target in COLLECTIVES:
                continue
            for memory in dict.fromkeys(s for s, _ in storages_of(node)):
                if memory in first:  # a view, or a list of them
                    found.get(first[memory], []).append(v)
                elif memory not in taken and isinstance(value, Tensor):
                    first[memory] = v
                    if _is_whole(value):
                        found[v] = []
        return {v: tuple(views) for v, views in found.items()}

    def bytes(self, v: int) -> int:
        """Bytes of an offloaded node, as the device's allocator counts them."""
        return self.model.steps[v].storages[0][1]

    def launches(self) -> float:
        """Microseconds that an offloaded tensor costs beside its copies."""
        return _CALLS * self.times.speed.launch

    def price_alone(self, v: int) -> float:
        """Microseconds that offloading a node adds if the link has nothing else to do."""
        takes = self.link.microseconds(self.bytes(v))
        before, after = (
            self._clock[self._backward_start] - self._clock[v + 1],
            self._clock[-1] - self._clock[self._backward_start],
        )
        return self.launches() + max(0.0, takes - before) + max(0.0, takes - after)

    def room(self, offloaded: Collection[int]) -> float:
        """The time of the shorter pass divided by the time that copies of these nodes take in one direction; below 1
        the link is the bottleneck.
        """
        takes = sum(self.link.microseconds(self.bytes(v)) for v in offloaded)
        passes = (self._clock[self._backward_start], self._clock[-1] - self._clock[self._backward_start])
        return min(passes) / takes if takes else float("inf")

    def needed(self, offloaded: Collection[int], recomputed: Collection[int]) -> dict[int, int]:
        """For each offloaded node that the backward needs, the first node that needs it, by itself or for a recomputed
        node.

        Nodes that something needs before the backward begins are left out.
        """
        needed: dict[int, int] = {}
        seen: set[int] = set()
        for v, step in enumerate(self.model.steps):
            stack = [] if step.forward else [u for u in step.reads if u in recomputed or u in offloaded]
            while stack:
                u = stack.pop()
                if u not in seen:
                    seen.add(u)
                    if u in offloaded:
                        needed[u] = v
                    else:
                        stack.extend(w for w in self.model.steps[u].reads if w in recomputed or w in offloaded)
        return {
            u: v for u, v in needed.items() if v >= self._backward_start and self._last_reader[u] < self._backward_start
        }

    def schedule(self, needed: Mapping[int, int], *, tight: bool = False) -> CopySchedule:
        """When the copies of the nodes of `needed` run.

        `tight`: leave the device right after the last forward reader and come back just before the first need, however
        long compute then waits. Otherwise copies hide behind compute as far as they can.
        """
        clock, turn = self._clock, self._backward_start
        stored: dict[int, tuple[int, int]] = {}
        free = 0.0
        for v in sorted(needed):
            start = self._run_end(v)
            free = max(clock[start + 1], free) + self.link.microseconds(self.bytes(v))
            done = bisect_left(clock, free) - 1
            wait = max(start, self._last_reader[v]) if tight else self._run_end(max(self._last_reader[v], done))
            stored[v] = start, min(wait, turn - 1)
        places: dict[int, CopySlots] = {}
        due = float("inf")
        for v in sorted(needed, key=lambda v: (needed[v], v), reverse=True):
            arrive = needed[v] if tight else self._run_begin(needed[v])
            due = min(clock[arrive], due) - self.link.microseconds(self.bytes(v))
            fetch = arrive if tight else self._run_begin(max(turn, bisect_right(clock, due) - 1))
            places[v] = CopySlots(*stored[v], fetch, arrive)
        return CopySchedule(places, self._prices(places))

    def _prices(self, places: Mapping[int, CopySlots]) -> dict[int, float]:
        """Simulate the copies beside the ops: microseconds that each is waited for, and its launches."""
        prices = dict.fromkeys(places, self.launches())
        free, ends, late = [0.0, 0.0], dict[tuple[int, int], float](), 0.0
        for event in _events(places):
            now, way = self._clock[event.after + 1] + late, event.kind // 2
            if event.kind % 2 == 0:
                free[way] = max(now, free[way]) + self.link.microseconds(self.bytes(event.node))
                ends[way, event.node] = free[way]
            else:
                stall = max(0.0, ends[way, event.node] - now)
                prices[event.node] += stall
                late += stall
        return prices

    @cached_property
    def _clock(self) -> list[float]:
        """Microseconds before each node, and of all nodes."""
        return [0.0, *np.cumsum([self.times.microseconds(n) for n in self.model.nodes]).tolist()]

    @cached_property
    def _backward_start(self) -> int:
        """The first node of the backward."""
        nodes = self.model.nodes
        return next((v for v, n in enumerate(nodes) if n.meta.get("phase") == "backward"), len(nodes))

    @cached_property
    def _last_reader(self) -> dict[int, int]:
        """The last forward node that reads an offloaded one, itself or a view of it."""
        owner = {u: v for v, views in self.views.items() for u in (v, *views)}
        last = {v: v for v in self.views}
        for u, step in enumerate(self.model.steps):
            if step.forward:
                for w in (u, *step.reads):
                    if w in owner:
                        last[owner[w]] = u
        return last

    def _run_end(self, v: int) -> int:
        """The last of the elementwise ops and views that follow a node: a compiler makes one kernel of them."""
        nodes = self.model.nodes
        while v + 1 < min(self._backward_start, len(nodes)) and _is_light(nodes[v + 1]):
            v += 1
        return v

    def _run_begin(self, v: int) -> int:
        while v > self._backward_start and _is_light(self.model.nodes[v - 1]):
            v -= 1
        return v


class _Event(NamedTuple):
    """Something that happens to the copies of a node after another node: 0 start out, 1 wait, 2 start back, 3 wait."""

    after: int
    kind: int
    order: int
    node: int


def _events(places: Mapping[int, CopySlots]) -> list[_Event]:
    events = []
    for v, place in places.items():
        events += [_Event(place.start, 0, v, v), _Event(place.wait, 1, v, v)]
        events += [_Event(place.fetch - 1, 2, place.arrive, v), _Event(place.arrive - 1, 3, v, v)]
    return sorted(events)


def write_plan(model: PeakModel, recomputed: Collection[int], places: Mapping[int, CopySlots]) -> None:
    """Write the copies of a plan into the graph of `model`: of offloaded tensors (`places`) and of recomputed nodes. No
    value changes.
    """
    nodes = model.nodes
    module, output = nodes[0].graph.owning_module, nodes[0].graph.output_node()
    following = [*nodes[1:], output]
    started: dict[int, fx.Node] = {}
    fetched: dict[fx.Node, fx.Node] = {}
    for event in _events(places):
        x, v = nodes[event.node], event.node
        with x.graph.inserting_before(following[event.after]):
            if event.kind == 0:
                started[v] = _call(offload_start, (x,), x, phase="forward")
            elif event.kind == 1:
                started[v] = _call(offload_wait, (started[v], x), x, phase="forward")
            elif event.kind == 2:
                fetched[x] = _call(fetch_start, (started[v], x.meta["val"].device), x, phase="backward")
            else:
                fetched[x] = _call(fetch_wait, (fetched[x], started[v]), x, phase="backward")
    assert module is not None
    recompute(module, {nodes[u] for u in recomputed}, fetched)


def _call(op: Callable[..., Any], args: tuple[Any, ...], source: fx.Node, *, phase: str) -> fx.Node:
    node = source.graph.call_function(op, args)
    meta = source.meta
    node.meta.update(path=meta.get("path"), source=meta.get("source"), phase=phase, purpose="offload")
    node.meta["offloaded"] = source.name
    node.meta["val"] = value_of(node)
    return node


def _is_light(node: fx.Node) -> bool:
    if is_view(node):
        return True
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags


def _is_whole(value: Tensor) -> bool:
    """True for a tensor of known size that is not empty and fills its memory without gaps, so that a copy with the same
    strides holds all of it.
    """
    if not all(isinstance(n, int) and n > 0 for n in (*value.shape, *value.stride())):
        return False
    dims = sorted((stride, size) for size, stride in zip(value.shape, value.stride(), strict=True) if size != 1)
    follows = all(stride * size == after for (stride, size), (after, _) in pairwise(dims))
    return follows and (not dims or dims[0][0] == 1) and value.nbytes == value.untyped_storage().nbytes()
