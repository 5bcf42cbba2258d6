"""What the nodes of a graph write over."""

from collections.abc import Collection

import torch
from torch import Tensor, fx

from ftrain.graph.aliasing import storage
from ftrain.graph.fused import WRITES, is_fused
from ftrain.graph.op_effects import argument_reader, hidden_writes


def written_arguments(node: fx.Node) -> list[fx.Node]:
    """The arguments that an op writes into, also where its schema hides it; of fused ops those of any of them."""
    if is_fused(node):
        return [node.args[i] for i in node.meta[WRITES]]
    if not isinstance(node.target, torch._ops.OpOverload):
        return []
    value = argument_reader(node.target, node.args, node.kwargs)
    found = hidden_writes(node.target, node.args, node.kwargs)
    fx.map_arg([value(a.name) for a in node.target._schema.arguments if a.is_write], found.append)
    return found


def written_inputs(module: fx.GraphModule) -> set[int]:
    """The positions of the graph's inputs whose memory some node writes into, directly or through views."""
    memory = {storage(w) for node in module.graph.nodes for w in written_arguments(node)}
    given = [n for n in module.graph.nodes if n.op == "placeholder"]
    return {i for i, n in enumerate(given) if isinstance(n.meta.get("val"), Tensor) and storage(n) in memory}


def has_written(module: fx.GraphModule, inputs: Collection[int], failed: fx.Node) -> bool:
    """True if one of these inputs (their positions) is written by the node at which a run has failed, or before it."""
    given = [n for n in module.graph.nodes if n.op == "placeholder"]
    memory = {storage(given[i]) for i in inputs}
    for node in module.graph.nodes:
        if any(storage(w) in memory for w in written_arguments(node)):
            return True
        if node is failed:
            return False
    return False
