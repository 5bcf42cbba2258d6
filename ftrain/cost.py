"""What a graph costs: floating point operations and bytes moved, per node."""

import operator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.utils.flop_counter import flop_registry

from ftrain.loop import is_loop, loop_body
from ftrain.op_rules import FLOPS
from ftrain.passes.sizes import sized


class NodeCost(NamedTuple):
    """FLOPs (a multiply-add is two) and bytes read and written by one node."""

    name: str
    op: str
    phase: str
    path: str
    flops: int
    bytes: int


@dataclass(frozen=True)
class Cost:
    """`flops` and `bytes` of one run; `by_phase` FLOPs of forward, backward and step; `nodes` in order of the graph."""

    flops: int
    bytes: int
    by_phase: dict[str, int]
    nodes: list[NodeCost]


def graph_cost(module: fx.GraphModule) -> Cost:
    """Add up all nodes; a loop's body counts as often as it runs."""
    nodes = list(_node_costs(module, 1))
    by_phase: dict[str, int] = {}
    for node in nodes:
        by_phase[node.phase] = by_phase.get(node.phase, 0) + node.flops
    return Cost(sum(n.flops for n in nodes), sum(n.bytes for n in nodes), by_phase, nodes)


def _node_costs(module: fx.GraphModule, times: int) -> list[NodeCost]:
    costs: list[NodeCost] = []
    for node in module.graph.nodes:
        if node.op != "call_function" or node.target is operator.getitem:
            continue
        if is_loop(node):
            costs += _node_costs(loop_body(node), times * int(node.args[1]))
            continue
        meta = node.meta
        name, moved = str(node.target), node_traffic(node)
        costs.append(
            NodeCost(
                node.name, name, meta.get("phase", ""), meta.get("path") or "", times * node_flops(node), times * moved
            )
        )
    return costs


def node_traffic(node: fx.Node) -> int:
    """Bytes that a node reads and writes; a view moves none."""
    return 0 if is_view(node) else sum(_bytes(sized(n)) for n in [node, *node.all_input_nodes])


def is_view(node: fx.Node) -> bool:
    """True for an op whose result looks at the memory of its argument, and for parts of a tuple."""
    target = node.target
    return target in (torch.ops.aten._unsafe_view.default, operator.getitem) or (
        isinstance(target, torch._ops.OpOverload) and target.is_view
    )


def node_flops(node: fx.Node) -> int:
    """FLOPs of matrix-like ops (products, convolutions, attention); elementwise ops count as zero."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return 0
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), sized)
    own = FLOPS.get(target._schema.name)
    if own is not None:
        return int(own(*args, **kwargs))
    rule = flop_registry.get(target.overloadpacket)
    return int(rule(*args, **kwargs, out_val=sized(node))) if rule is not None else 0


def _bytes(value: Any) -> int:
    if isinstance(value, list | tuple):
        return sum(_bytes(v) for v in value)
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0
