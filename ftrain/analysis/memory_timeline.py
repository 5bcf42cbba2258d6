"""The memory of a step over time, by kind: activations, gradients, and so on."""

from typing import NamedTuple

import numpy as np
from torch import fx

from ftrain.analysis.pieces import Pieces

KINDS = ("activations", "gradients and backward", "update", "gathered parameters", "workspace")
"""The kinds of memory, in the order of `Sample.bytes`."""
_KIND_OF_PHASE = {"forward": KINDS[0], "backward": KINDS[1]}


class Sample(NamedTuple):
    """The bytes in memory beyond the inputs while one node runs.

    - `node`: the node. `loop`: the names of the loops around it, outermost first; empty outside of loops.
    - `bytes`: by kind, in the order of `KINDS`: memory allocated by the forward pass, by the backward pass (recompute
      included), by the rest of the step (optimizer, accumulators) and by gathers of parameters, and the workspace of
      the op itself.
    - `host`: bytes of offloaded tensors on the host.
    """

    node: fx.Node
    loop: str
    bytes: tuple[int, ...]
    host: int = 0

    @property
    def total(self) -> int:
        """Bytes of all kinds together, without `host`."""
        return sum(self.bytes)


def memory_timeline(module: fx.GraphModule, *, round_to: int = 1) -> list[Sample]:
    """One sample per node, in the order of the graph; a loop gives the samples of one iteration of its body.

    `round_to`: the granularity of the allocator in bytes (512 on CUDA, 1 on a CPU).
    """
    return _samples(Pieces.of(module, round_to=round_to))


def _samples(pieces: Pieces) -> list[Sample]:
    kinds = [kind_of(owner) for owner in pieces.owners]
    live = [pieces.sum_live(np.where(np.array(kinds) == kind, pieces.device, 0)) for kind in KINDS]
    samples: list[Sample] = []
    for i, node in enumerate(pieces.nodes):
        if node.op in ("placeholder", "get_attr"):
            continue
        base, host = tuple(int(of_kind[i]) for of_kind in live), int(pieces.live_on_host[i])
        if i in pieces.bodies:
            body = _samples(pieces.bodies[i])
            outside = host - max((inner.host for inner in body), default=0)
            for inner in body:
                both = tuple(x + y for x, y in zip(base, inner.bytes, strict=True))
                samples.append(Sample(inner.node, f"{node.name} {inner.loop}".strip(), both, outside + inner.host))
        else:
            samples.append(Sample(node, "", (*base[:-1], int(pieces.workspace[i])), host))
    return samples


def kind_of(owner: fx.Node) -> str:
    """The kind, one of `KINDS`, of the memory that a node allocates, by the node's purpose or phase."""
    if owner.meta.get("purpose") == "fsdp_gather":
        return KINDS[3]
    return _KIND_OF_PHASE.get(owner.meta.get("phase", ""), KINDS[2])


def inputs_by_argument(module: fx.GraphModule) -> dict[str, int]:
    """Bytes of the arguments, by argument, largest first; the first argument is split into its members.

    Keys are e.g. `state.params`, `state.opt_state` and `batch`. A member of the first argument that is a single leaf
    counts under the argument itself.
    """
    groups: dict[str, int] = {}
    first = ""
    for node in module.graph.nodes:
        if node.op != "placeholder":
            continue
        parts = str(node.meta.get("path") or node.name).split(".")
        first = first or parts[0]
        label = ".".join(parts[:2]) if parts[0] == first and len(parts) > 2 else parts[0]
        value = node.meta["val"]
        groups[label] = groups.get(label, 0) + value.numel() * value.dtype.itemsize
    return dict(sorted(groups.items(), key=lambda item: -item[1]))
