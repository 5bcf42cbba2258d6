"""The memory plan: the bytes that a step needs, computed from the graph by the rules of `ftrain.analysis.pieces`."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import fx

from ftrain.analysis.pieces import Pieces, storages_of
from ftrain.graph.sizes import unknown_sizes


class LiveTensor(NamedTuple):
    """A tensor in memory at the peak.

    `bytes`: its size. `node`: the name of the node that allocates it. `path`: the path of the parameter that the node
    belongs to. `source`: the user's line. `phase`: "forward", "backward" or "step".
    """

    bytes: int
    node: str
    path: str
    source: str
    phase: str


@dataclass(frozen=True)
class MemoryPlan:
    """The memory, in bytes, of one run of a graph.

    - `inputs`: the arguments (state and batch), in memory throughout.
    - `peak`: the most bytes beyond the inputs at any time, workspace of ops included. `peak_node`: the name of the
      node that runs then; empty if `peak` is 0.
    - `timeline`: pairs of a node's name and the bytes beyond the inputs while it runs, in the order of the graph.
    - `top`: the tensors in memory at the peak, largest first; if the peak is in a loop, also those of its body.
    - `host`: the most bytes of offloaded tensors on the host at any time. Not part of the other fields.
    - `libraries`: bytes that libraries keep from the device's allocator after their first use (cuBLAS's workspace).
      Not part of the other fields.
    - `reserved_share`: bytes that the allocator reserves for each byte that it hands out, an estimate (see
      `ftrain.analysis.cuda_allocator`); 1 on a CPU.
    - `unknown`: sizes that depend on data; each counts with its largest possible value.
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
        """Bytes of inputs and peak together. A budget limits this sum."""
        return self.inputs + self.peak

    @property
    def allocated(self) -> int:
        """Bytes that the allocator hands out at the peak: the total and what libraries keep."""
        return self.total + self.libraries

    @property
    def reserved(self) -> int:
        """An estimate, by `reserved_share`, of the bytes that the allocator reserves on the device.

        A process needs more: CUDA's context (about half a GiB) and NCCL's buffers do not come from this allocator.
        """
        return round(self.reserved_share * self.allocated)


def plan_memory(module: fx.GraphModule, *, round_to: int = 1) -> MemoryPlan:
    """The memory plan of a graph in its current order, without `libraries` and `reserved_share`.

    `round_to`: the granularity of the allocator in bytes (512 on CUDA, 1 on a CPU).
    """
    pieces = Pieces.of(module, round_to=round_to)
    totals = zip(pieces.nodes, pieces.total.tolist(), strict=True)
    at = int(pieces.total.argmax()) if pieces.peak else None
    return MemoryPlan(
        inputs=input_bytes(module),
        peak=pieces.peak,
        peak_node="" if at is None else pieces.nodes[at].name,
        timeline=[(node.name, total) for node, total in totals if node.op != "placeholder"],
        top=sorted(_top(pieces), reverse=True),
        host=int(pieces.live_on_host.max(initial=0)),
        unknown=unknown_sizes(module),
    )


def _top(pieces: Pieces) -> list[LiveTensor]:
    """The tensors in memory at the peak; if a loop is the peak's node, also those of its body."""
    if not pieces.peak:
        return []
    at = int(pieces.total.argmax())
    inner = _top(pieces.bodies[at]) if at in pieces.bodies else []
    return [_describe(pieces.owners[p], int(pieces.sizes[p])) for p in pieces.live_at(at)] + inner


def input_bytes(module: fx.GraphModule) -> int:
    """Bytes of the arguments and of the tensors that the step captures."""
    given = [n for n in module.graph.nodes if n.op == "placeholder"]
    captured = {s: size for n in module.graph.nodes if n.op == "get_attr" for s, size in storages_of(n)}
    return sum(size for n in given for _, size in storages_of(n)) + sum(captured.values())


def _describe(owner: fx.Node, size: int) -> LiveTensor:
    meta = owner.meta
    return LiveTensor(size, owner.name, meta.get("path") or "", str(meta.get("source") or ""), meta.get("phase", ""))
