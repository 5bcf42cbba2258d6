"""The memory plan: the bytes that a step needs, from the graph alone (see `ftrain.analysis.pieces` for the rules)."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import fx

from ftrain.analysis.pieces import Pieces, storages_of
from ftrain.graph.sizes import unknown_sizes


class LiveTensor(NamedTuple):
    """A tensor alive at the peak: bytes, the node that made it, its parameter path, source line and phase."""

    bytes: int
    node: str
    path: str
    source: str
    phase: str


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes over the run of a graph.

    `inputs`: the arguments, alive throughout (state and batch). `peak`: the most alive at once beyond them, workspace
    of ops included. `timeline`: (node name, bytes alive beyond the inputs while it runs). `top`: what is alive at the
    peak, largest first; where the peak is in a loop, also what its body holds then. `host`: the most bytes at once that
    offloaded tensors take on the host; no part of the others. `libraries`: what libraries keep of the device's
    allocator from their first use on (cuBLAS's workspace), in none of the others. `reserved_share`: bytes that the
    allocator takes of the device for each that it hands out, an estimate (see `ftrain.analysis.cuda_allocator`); on a
    CPU 1. `unknown`: the sizes that depend on data, which are counted as the largest that they can be.
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


def plan_memory(module: fx.GraphModule, *, round_to: int = 1) -> MemoryPlan:
    """Walk the graph; `round_to` is the allocator's granularity in bytes (512 on CUDA, 1 for CPU storages)."""
    pieces = Pieces.of(module, round_to=round_to)
    totals = zip(pieces.nodes, pieces.total.tolist(), strict=True)
    at = int(pieces.total.argmax()) if pieces.peak else None
    return MemoryPlan(
        inputs=input_bytes(module),
        peak=pieces.peak,
        peak_node="" if at is None else pieces.nodes[at].name,
        timeline=[(node.name, total) for node, total in totals if node.op != "placeholder"],
        top=sorted(_top(pieces), reverse=True),
        host=int(pieces.away.max(initial=0)),
        unknown=unknown_sizes(module),
    )


def _top(pieces: Pieces) -> list[LiveTensor]:
    """What is alive at the peak, in the body of a loop too where that is the peak's node."""
    if not pieces.peak:
        return []
    at = int(pieces.total.argmax())
    inner = _top(pieces.bodies[at]) if at in pieces.bodies else []
    return [_describe(pieces.owners[p], int(pieces.sizes[p])) for p in pieces.alive_at(at)] + inner


def input_bytes(module: fx.GraphModule) -> int:
    """Bytes of the arguments, and of tensors that the step captures."""
    given = [n for n in module.graph.nodes if n.op == "placeholder"]
    captured = {s: size for n in module.graph.nodes if n.op == "get_attr" for s, size in storages_of(n)}
    return sum(size for n in given for _, size in storages_of(n)) + sum(captured.values())


def _describe(owner: fx.Node, size: int) -> LiveTensor:
    meta = owner.meta
    return LiveTensor(size, owner.name, meta.get("path") or "", str(meta.get("source") or ""), meta.get("phase", ""))
