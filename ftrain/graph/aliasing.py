"""Which nodes look at the same memory."""

import torch
from torch import fx

from ftrain.graph.torch_memory import storage_id


def storage(node: fx.Node) -> int | None:
    """Identity of the memory of a node's value, equal for views of one another; None for several values or none."""
    value = node.meta.get("val")
    return storage_id(value) if isinstance(value, torch.Tensor) else None


def readers_by_storage(graph: fx.Graph) -> dict[int | None, list[fx.Node]]:
    """For each piece of memory the nodes that read it, directly or through views, in order of the graph.

    Keys are those of `storage`. A collective that was started reads its input until it is waited for, so its wait
    counts as a reader too.
    """
    readers: dict[int | None, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "output":
            continue
        read = {storage(i) for i in node.all_input_nodes}
        if node.target is torch.ops._c10d_functional.wait_tensor.default:
            read |= {storage(i) for start in node.all_input_nodes for i in start.all_input_nodes}
        for memory in read:
            if memory is not None:
                readers.setdefault(memory, []).append(node)
    return readers
