"""Bytes alive over the run of a step, by what they are: the picture behind the memory plan."""

from typing import NamedTuple

import numpy as np
from torch import fx

from ftrain.analysis.pieces import Pieces

KINDS = ("activations", "gradients and backward", "update", "gathered parameters", "workspace")
_KIND_OF_PHASE = {"forward": KINDS[0], "backward": KINDS[1]}


class Sample(NamedTuple):
    """Bytes alive beyond the inputs while a node runs.

    `loop`: the loop it is inside of, if any (one round is shown). `bytes`, in the order of `KINDS`: made by the forward
    pass, by the backward pass (what it computes again included), by the rest of the step (optimizer, accumulators), by
    gathers of parameters, and workspace of the op itself. `host`: what offloaded tensors take on the host.
    """

    node: fx.Node
    loop: str
    bytes: tuple[int, ...]
    host: int = 0

    @property
    def total(self) -> int:
        """All kinds together."""
        return sum(self.bytes)


def memory_timeline(module: fx.GraphModule, *, round_to: int = 1) -> list[Sample]:
    """One sample per node in the order in which they run; of a loop, one round of its body on top of the rest."""
    return _samples(Pieces.of(module, round_to=round_to))


def _samples(pieces: Pieces) -> list[Sample]:
    kinds = [kind_of(owner) for owner in pieces.owners]
    alive = [pieces.alive(np.where(np.array(kinds) == kind, pieces.device, 0)) for kind in KINDS]
    samples: list[Sample] = []
    for i, node in enumerate(pieces.nodes):
        if node.op in ("placeholder", "get_attr"):
            continue
        base, host = tuple(int(of_kind[i]) for of_kind in alive), int(pieces.away[i])
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
    """Which of `KINDS` a piece of memory counts as, by the purpose or the phase of the node that made it."""
    if owner.meta.get("purpose") == "fsdp_gather":
        return KINDS[3]
    return _KIND_OF_PHASE.get(owner.meta.get("phase", ""), KINDS[2])


def inputs_by_argument(module: fx.GraphModule) -> dict[str, int]:
    """Bytes of the arguments by the first two names of their paths: `state.params`, `state.opt_state`, `batch`.

    Only the step's first argument is divided further; a member that is one leaf counts under the argument itself.
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
