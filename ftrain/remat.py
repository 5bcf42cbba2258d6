"""Recompute: what the backward pass makes again instead of keeping it from the forward pass."""

import re
from dataclasses import dataclass

from torch import Tensor, fx

from ftrain.loop import is_loop, loop_body
from ftrain.private import storage_id, value_of

_LAYER = re.compile(r"^(.*\blayers\.\d+)(\.|$)")


@dataclass(frozen=True)
class Remat:
    """`policy`: "none" keeps every tensor that the backward reads; "layer" keeps, of each member of a list of layers
    (a parameter path with `layers.N`), only what it hands to others; "all" does so outside of layers too.
    """

    policy: str = "none"

    def __post_init__(self) -> None:
        if self.policy not in ("none", "layer", "all"):
            raise ValueError(f"Remat({self.policy!r}): the policy is 'none', 'layer' or 'all'")

    @staticmethod
    def of(value: "Remat | str") -> "Remat":
        """A `Remat` as it is, or by the name of its policy."""
        return value if isinstance(value, Remat) else Remat(value)


def rematerialize(module: fx.GraphModule, remat: Remat) -> None:
    """Give the backward copies of the forward nodes that the policy does not keep, each made just before first use.

    The same ops on the same inputs: results are equal to the bit. Bodies of loops are treated alike.
    """
    if remat.policy == "none":
        return
    for node in module.graph.nodes:
        if is_loop(node):
            rematerialize(loop_body(node), remat)
    forward = [n for n in module.graph.nodes if _is_forward(n)]
    layer_of = {n: _layer(n) for n in forward}
    kept = {n for n in forward if _is_kept(n, layer_of, remat.policy)}
    position = {n: i for i, n in enumerate(module.graph.nodes) if n in layer_of and n not in kept}
    copies: dict[fx.Node, fx.Node] = {}
    moved: dict[fx.Node, set[int]] = {}  # nodes whose value is new, and the memory that it was before
    for node in list(module.graph.nodes):
        if node in layer_of or node.op in ("placeholder", "get_attr", "output"):
            continue
        before = set().union(*(moved[n] for n in node.all_input_nodes if n in moved))
        for source in node.all_input_nodes:
            if source in position:
                before |= _memory(source)
                node.replace_input_with(source, _recompute(module.graph, source, position, copies, before=node))
        if before & _memory(node):  # a view of what is now a copy
            moved[node] = _memory(node)
            node.meta["val"] = value_of(node)
    module.graph.lint()
    module.recompile()


def _is_forward(node: fx.Node) -> bool:
    return node.op == "call_function" and node.meta.get("phase") == "forward"


def _layer(node: fx.Node) -> str:
    found = _LAYER.match(node.meta.get("path", ""))
    return found.group(1) if found else ""


def _is_kept(node: fx.Node, layer_of: dict[fx.Node, str], policy: str) -> bool:
    """A node of no layer (under "layer"), a loop, or a tensor that another layer reads."""
    mine = layer_of[node]
    if is_loop(node) or (policy == "layer" and not mine):
        return True
    if isinstance(node.meta.get("val"), list | tuple):
        return False
    return any(layer_of[u] != mine for u in node.users if u in layer_of)


def _memory(node: fx.Node) -> set[int]:
    """Identities of the memory that a node's value looks at."""
    value = node.meta.get("val")
    return {storage_id(v) for v in (value if isinstance(value, list | tuple) else [value]) if isinstance(v, Tensor)}


def _recompute(
    graph: fx.Graph,
    node: fx.Node,
    position: dict[fx.Node, int],
    copies: dict[fx.Node, fx.Node],
    *,
    before: fx.Node,
) -> fx.Node:
    """A copy of `node` for the backward, with copies of whatever it reads that is not kept (is not in `position`)."""
    chain: set[fx.Node] = set()
    stack = [node]
    while stack:
        current = stack.pop()
        if current in position and current not in copies and current not in chain:
            chain.add(current)
            stack.extend(current.all_input_nodes)
    for current in sorted(chain, key=position.__getitem__):
        with graph.inserting_before(before):
            copy = graph.node_copy(current, lambda n: copies.get(n, n))
        copy.meta = {**current.meta, "val": value_of(copy), "phase": "backward", "recomputed": current.name}
        copies[current] = copy
    return copies[node]
