"""Which nodes look at the same memory."""

import torch
from torch import fx

from ftrain.private import storage_id


def storage(node: fx.Node) -> int | None:
    """Identity of the memory of a node's value; None for nodes with several values or none."""
    value = node.meta.get("val")
    return storage_id(value) if isinstance(value, torch.Tensor) else None


def readers_by_storage(graph: fx.Graph) -> dict[int | None, list[fx.Node]]:
    """For each piece of memory the nodes that read it, directly or through views, in order of the graph."""
    readers: dict[int | None, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "output":
            continue
        for memory in {storage(i) for i in node.all_input_nodes}:
            if memory is not None:
                readers.setdefault(memory, []).append(node)
    return readers
