"""Let elementwise ops write over an input that has no later reader, instead of into new memory."""

from collections import Counter

import torch
from torch import fx

from ftrain.graph.aliasing import storage
from ftrain.graph.collectives import WAIT
from ftrain.passes.out_form import can_write_over, has_out_form, write_over


def reuse_memory(module: fx.GraphModule) -> None:
    """Replace `op(x, ...)` by `op(x, ..., out=x)` where x is a temporary without later readers. No value changes.

    New memory costs a page fault for every 4 KiB, often more than the op itself.
    """
    last = _last_readers(module.graph)
    viewers = Counter(storage(n) for n in module.graph.nodes)
    given = {storage(n) for n in module.graph.nodes if n.op in ("placeholder", "get_attr")}
    for node in list(module.graph.nodes):
        mine = storage(node)
        if not has_out_form(node) or viewers[mine] > 1 or mine not in last:
            continue
        old = next((n for n in node.all_input_nodes if _dies(n, node, last, given) and can_write_over(node, n)), None)
        if old is not None:
            last[storage(old)] = last[mine]
            viewers[storage(old)] += 1
            write_over(node, old)
    module.graph.lint()
    module.recompile()


def _last_readers(graph: fx.Graph) -> dict[int | None, fx.Node]:
    """By piece of memory, the last node that reads it, directly or through a view.

    The output is the last reader of results. A collective reads its input until its wait.
    """
    last: dict[int | None, fx.Node] = {}
    for node in graph.nodes:
        read = node.all_input_nodes
        if node.target is WAIT:
            read = [*read, *(n for start in read for n in start.all_input_nodes)]
        last.update(dict.fromkeys(map(storage, read), node))
    return last


def _dies(old: fx.Node, reader: fx.Node, last: dict[int | None, fx.Node], given: set[int | None]) -> bool:
    """True if `old` is a whole piece of memory allocated by the graph, and `reader` is its last reader."""
    value = old.meta.get("val")
    if not isinstance(value, torch.Tensor) or storage(old) in given or last.get(storage(old)) is not reader:
        return False
    size, count = value.untyped_storage().nbytes(), value.numel()  # symbolic if a size depends on data
    return isinstance(size, int) and isinstance(count, int) and size == count * value.element_size()
