"""Ops with a twin that writes its results over the state that they replace."""

import operator
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import fx

from ftrain.passes.aliasing import readers_by_storage, storage
from kernels.adamw import adamw_fused, adamw_in_place

_aten = torch.ops.aten


class Twin(NamedTuple):
    """`op(*args)` writes in place what the pure op returns: result i is added to (`added`) or put over (`written`) the
    argument of that number; pairs of (result, argument).
    """

    op: Callable
    added: tuple[tuple[int, int], ...]
    written: tuple[tuple[int, int], ...]


TWINS: dict[Callable, Twin] = {adamw_fused: Twin(adamw_in_place, added=((0, 0),), written=((1, 2), (2, 3)))}


def use_twins(module: fx.GraphModule) -> None:
    """Replace an op, the sums of its results with its arguments, and the copies over these by the op's twin.

    Only where every such result goes over its argument, nothing else reads the old values after the op, and dtypes are
    one. Twins give the same bits. For the interpreter only: compilers fuse the pure forms.
    """
    graph = module.graph
    pure = [n for n in graph.nodes if n.op == "call_function" and n.target in TWINS]
    if not pure:
        return
    readers = readers_by_storage(graph)
    position = {n: i for i, n in enumerate(graph.nodes)}
    for node in pure:
        writes = _writes(node, TWINS[node.target])
        if writes is None or not _may_write(node, writes, readers, position):
            continue
        with graph.inserting_before(node):
            twin = graph.call_function(TWINS[node.target].op, node.args, node.kwargs)
        twin.meta.update(node.meta, val=None)
        for write in writes:
            old, new = write.all_input_nodes
            graph.erase_node(write)
            new.replace_all_uses_with(old)
            graph.erase_node(new)
        for result in list(node.users):
            graph.erase_node(result)
        graph.erase_node(node)
    graph.lint()
    module.recompile()


def _writes(node: fx.Node, twin: Twin) -> list[fx.Node] | None:
    """The copies over the twin's arguments, one for each; None if a result is used in another way or not at all."""
    results = {n.args[1]: n for n in node.users if n.target is operator.getitem}
    if len(results) != len(node.users):
        return None
    found = []
    for i, argument in (*twin.added, *twin.written):
        new, old = results.get(i), node.args[argument]
        if new is not None and (i, argument) in twin.added:
            sums = list(new.users)
            new = sums[0] if len(sums) == 1 and _is_sum(sums[0], old, new) else None
        write = None if new is None else next((u for u in new.users if _is_write(u, old, new)), None)
        if write is None:
            return None
        found.append(write)
    return found


def _is_sum(node: fx.Node, old: object, update: fx.Node) -> bool:
    return node.target is _aten.add.Tensor and node.args == (old, update) and not node.kwargs


def _is_write(node: fx.Node, old: object, new: fx.Node) -> bool:
    return node.target is _aten.copy_.default and node.args == (old, new)


def _may_write(
    node: fx.Node, writes: list[fx.Node], readers: dict[int | None, list[fx.Node]], position: dict[fx.Node, int]
) -> bool:
    """No other argument looks at the memory that is written, nobody else reads it until the copies, and it fits."""
    leaves: list[fx.Node] = [w.args[0] for w in writes]  # type: ignore[misc]
    values = [leaf.meta["val"] for leaf in leaves]
    if len({v.dtype for v in values}) != 1 or not all(v.is_contiguous() for v in values):
        return False
    written = {storage(leaf) for leaf in leaves}
    arguments = [storage(n) for n in node.all_input_nodes]
    if len(written) != len(leaves) or any(arguments.count(s) != 1 for s in written):
        return False
    own = {node, *writes, *(w.args[1] for w in writes)}
    last = max(position[w] for w in writes)
    reading = (r for s in written for r in readers.get(s, ()))
    return not any(position[node] < position[r] < last for r in reading if r not in own)
