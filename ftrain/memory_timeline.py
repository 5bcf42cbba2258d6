"""Bytes alive over the run of a step, by what they are: the picture behind the memory plan."""

from typing import NamedTuple

from torch import fx

from ftrain.liveness import Held, simulate
from ftrain.loop import is_loop, loop_body

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
    samples: list[Sample] = []
    for node, _, workspace, alive, host in simulate(module, round_to=round_to):
        if node.op in ("placeholder", "get_attr"):
            continue
        kinds = dict.fromkeys(KINDS, 0)
        for held in alive.values():
            kinds[kind_of(held)] += held.bytes
        base = tuple(kinds.values())
        if is_loop(node):
            body = memory_timeline(loop_body(node), round_to=round_to)
            outside = host - max((inner.host for inner in body), default=0)
            for inner in body:
                both = tuple(x + y for x, y in zip(base, inner.bytes, strict=True))
                samples.append(Sample(inner.node, f"{node.name} {inner.loop}".strip(), both, outside + inner.host))
        else:
            samples.append(Sample(node, "", (*base[:-1], workspace), host))
    return samples


def kind_of(held: Held) -> str:
    """Which of `KINDS` a piece of memory counts as, by the purpose or the phase of the node that made it."""
    if held.owner.meta.get("purpose") == "fsdp_gather":
        return KINDS[3]
    return _KIND_OF_PHASE.get(held.owner.meta.get("phase", ""), KINDS[2])


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
