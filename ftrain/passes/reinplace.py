"""Pure ops become their in-place forms, which write over the state that the results replace."""

import operator
from typing import NamedTuple

import torch
from torch import fx

from ftrain.graph.aliasing import readers_by_storage, storage
from ftrain.graph.in_place_ops import IN_PLACE_OPS, InPlaceOp

_aten = torch.ops.aten


class _Write(NamedTuple):
    """A copy over an argument of the op, the nodes between the op's result and the copy, and the condition if any."""

    copy: fx.Node
    between: list[fx.Node]
    keep: fx.Node | None


def reinplace(module: fx.GraphModule) -> None:
    """Replace an op, the sums of its results with its arguments, and the copies over these by the op's in-place form.

    Results may be chosen by one condition, `where(keep, result, old)`, or `where(keep, result, 0)` before a sum. Only
    where every such result goes over its argument, nothing else reads the old values after the op, and dtypes are one.
    In-place forms give the same bits.
    """
    graph = module.graph
    pure = [n for n in graph.nodes if n.op == "call_function" and n.target in IN_PLACE_OPS]
    if not pure:
        return
    readers = readers_by_storage(graph)
    position = {n: i for i, n in enumerate(graph.nodes)}
    for node in pure:
        writes = _writes(node, IN_PLACE_OPS[node.target])
        if writes is None or not _may_write(node, writes, readers, position):
            continue
        keep = writes[0].keep
        args = node.args if keep is None else (*node.args, keep)
        with graph.inserting_before(node if keep is None else writes[0].between[-1]):
            in_place = graph.call_function(IN_PLACE_OPS[node.target].op, args, node.kwargs)
        in_place.meta.update(node.meta, val=None)
        for write in writes:
            old, new = write.copy.all_input_nodes
            graph.erase_node(write.copy)
            new.replace_all_uses_with(old)
            for step in write.between:
                graph.erase_node(step)
        for result in list(node.users):
            graph.erase_node(result)
        graph.erase_node(node)
    graph.lint()
    module.recompile()


def _writes(node: fx.Node, in_place: InPlaceOp) -> list[_Write] | None:
    """The copies over the op's arguments, one for each; None if a result is used in another way or not at all."""
    results = {n.args[1]: n for n in node.users if n.target is operator.getitem}
    if len(results) != len(node.users):
        return None
    pairs = (*in_place.added, *in_place.written)
    found = [_write_of(results.get(i), node.args[a], added=(i, a) in in_place.added) for i, a in pairs]
    writes = [w for w in found if w is not None]
    return writes if len(writes) == len(pairs) and len({w.keep for w in writes}) == 1 else None


def _write_of(new: fx.Node | None, old: object, *, added: bool) -> _Write | None:
    """The copy of a result of the op over the argument `old`; None if there is none."""
    between: list[fx.Node] = []
    keep = None
    only = _only_user(new)
    if only is not None and only.target is _aten.where.self and only.args[1] is new:
        if not (_is_zero(only.args[2]) if added else only.args[2] is old):
            return None
        keep, new = only.all_input_nodes[0], only
        between.append(only)
    if added:
        only = _only_user(new)
        if only is None or not _is_sum(only, old, new):
            return None
        new = only
        between.insert(0, only)
    copy = None if new is None else next((u for u in new.users if _is_write(u, old, new)), None)
    return None if copy is None else _Write(copy, between, keep)


def _only_user(node: fx.Node | None) -> fx.Node | None:
    return next(iter(node.users)) if node is not None and len(node.users) == 1 else None


def _is_zero(node: object) -> bool:
    if not isinstance(node, fx.Node) or node.target not in (_aten.zeros.default, _aten.full.default):
        return False
    return not node.meta["val"].shape and bool(node.target is _aten.zeros.default or node.args[1] == 0)


def _is_sum(node: fx.Node, old: object, update: object) -> bool:
    return node.target is _aten.add.Tensor and node.args == (old, update) and not node.kwargs


def _is_write(node: fx.Node, old: object, new: fx.Node) -> bool:
    return node.target is _aten.copy_.default and node.args == (old, new)


def _may_write(
    node: fx.Node, writes: list[_Write], readers: dict[int | None, list[fx.Node]], position: dict[fx.Node, int]
) -> bool:
    """True if the op, and nodes before the copies, do not read the written memory otherwise, and all layouts match."""
    leaves: list[fx.Node] = [w.copy.args[0] for w in writes]  # type: ignore[misc]
    values = [leaf.meta["val"] for leaf in leaves]
    if len({v.dtype for v in values}) != 1 or not all(v.is_contiguous() for v in values):
        return False
    written = {storage(leaf) for leaf in leaves}
    arguments = [storage(n) for n in node.all_input_nodes]
    if len(written) != len(leaves) or any(arguments.count(s) != 1 for s in written):
        return False
    own = {node, *(n for w in writes for n in (w.copy, w.copy.args[1], *w.between))}
    last = max(position[w.copy] for w in writes)
    reading = (r for s in written for r in readers.get(s, ()))
    return not any(position[node] < position[r] < last for r in reading if r not in own)
