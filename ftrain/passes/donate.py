"""Donation: write the new state over the old, so that a step holds one copy of its state and not two."""

import operator
from collections import Counter

import torch
from torch import fx

from ftrain.graph.aliasing import readers_by_storage, storage
from ftrain.graph.loop import carried_outputs, is_loop, loop_body
from ftrain.passes.out_form import can_write_over, has_out_form, write_over

_aten = torch.ops.aten


def donate(module: fx.GraphModule, donated: dict[str, int], *, keep_outputs: bool = False) -> None:
    """Insert `copy_(old, new)` for every donated leaf, in place, at the first position where it is safe.

    That is after the new value and after the last reader of the old value.

    - `donated`: by the name of a placeholder, the position of the output that replaces it; both have the same shape
      and dtype. These outputs are dropped, because the new values are in the arguments.
    - `keep_outputs`: the outputs stay, as the placeholders.

    A new value that shares memory with an input or another output is copied first. So is any other output that shares
    memory with a donated leaf. No value changes. In the same way, bodies of loops write into their carry.
    """
    graph = module.graph
    for loop in [n for n in graph.nodes if is_loop(n)]:
        body = loop_body(loop)
        donate(body, carried_outputs(loop), keep_outputs=True)
    _copy_kept_views(graph, donated)
    _copy_shared_values(graph, donated)
    output = graph.output_node()
    results = list(output.args[0])  # type: ignore[arg-type]
    placeholders = {n.name: n for n in graph.nodes if n.op == "placeholder"}
    readers = readers_by_storage(graph)
    position = {n: i for i, n in enumerate(graph.nodes)}
    for name, index in donated.items():
        old, new = placeholders[name], results[index]
        if new is old:
            continue
        results[index] = old
        last = max([new, *readers.get(storage(old), ())], key=position.__getitem__)
        with graph.inserting_after(last):
            write = graph.call_function(_aten.copy_.default, (old, new))
        write.meta.update(val=old.meta["val"], phase="step", path=old.meta.get("path"), source=new.meta.get("source"))
    dropped = set() if keep_outputs else set(donated.values())
    output.args = ([r for i, r in enumerate(results) if i not in dropped],)
    graph.lint()
    module.recompile()


def _copy_shared_values(graph: fx.Graph, donated: dict[str, int]) -> None:
    """Copy new values that are inputs or share memory with another result, before the first write."""
    output = graph.output_node()
    results = list(output.args[0])  # type: ignore[arg-type]
    placeholders = {n.name: n for n in graph.nodes if n.op == "placeholder"}
    inputs = {storage(n) for n in placeholders.values()}
    results_in = Counter(map(storage, results))
    for name, index in donated.items():
        new = results[index]
        if new is placeholders[name]:
            continue
        # a result with the same memory must not see the next value of the leaf
        if storage(new) in inputs or results_in[storage(new)] > 1:
            with graph.inserting_after(_after_placeholders(graph, new)):
                results[index] = _copy_of(graph, new)
    output.args = (results,)


def _copy_kept_views(graph: fx.Graph, donated: dict[str, int]) -> None:
    """Copy the outputs that stay and share memory with a donated leaf."""
    output = graph.output_node()
    results = list(output.args[0])  # type: ignore[arg-type]
    overwritten = {storage(n) for n in graph.nodes if n.op == "placeholder" and n.name in donated}
    replaced = set(donated.values())
    for i, node in enumerate(results):
        if i not in replaced and storage(node) in overwritten:
            with graph.inserting_after(_after_placeholders(graph, node)):
                results[i] = _copy_of(graph, node)
    output.args = (results,)


def _after_placeholders(graph: fx.Graph, node: fx.Node) -> fx.Node:
    return node if node.op != "placeholder" else [n for n in graph.nodes if n.op == "placeholder"][-1]


def write_in_place(module: fx.GraphModule) -> None:
    """Replace `copy_(old, op(...))` by `op(..., out=old)` where `op` has an out form, in place of the graph.

    Later readers of the new value read the memory of the old leaf. No value changes. Copies inside of fused runs stay.
    """
    graph = module.graph
    readers = readers_by_storage(graph)
    position = {n: i for i, n in enumerate(graph.nodes)}
    for write in [n for n in graph.nodes if n.target is _aten.copy_.default]:
        old, new = write.args
        if not has_out_form(new) or not can_write_over(new, old):
            continue
        if any(position[new] < position[r] < position[write] for r in readers[storage(old)]):
            continue
        graph.erase_node(write)
        at = position[new]
        position[write_over(new, old)] = at
    graph.lint()
    module.recompile()


def carry_in_place(module: fx.GraphModule) -> None:
    """Let a loop write into its initial carry instead of a copy, where no other node uses that memory.

    No value changes.
    """
    readers = readers_by_storage(module.graph)
    for loop in [n for n in module.graph.nodes if is_loop(n)]:
        carry: list[fx.Node] = list(loop.args[2])
        owned = [c.op == "call_function" and list(c.users) == readers[storage(c)] == [loop] for c in carry]
        owned = [mine and carry.count(c) == 1 for c, mine in zip(carry, owned, strict=True)]
        loop.kwargs = {"copy": [not o for o in owned]}
        results = loop.meta["val"]
        loop.meta["val"] = [c.meta["val"] if o else r for c, o, r in zip(carry, owned, results, strict=True)]
        for user in loop.users:
            if user.target is operator.getitem:
                user.meta["val"] = loop.meta["val"][user.args[1]]
    module.recompile()


def _copy_of(graph: fx.Graph, node: fx.Node) -> fx.Node:
    value = node.meta["val"]
    copy = graph.call_function(_aten.clone.default, (node,), {"memory_format": torch.contiguous_format})
    copy.meta.update(node.meta, val=value.new_empty(value.shape), phase="step")
    return copy
