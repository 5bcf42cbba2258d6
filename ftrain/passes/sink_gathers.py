"""Move gathers of parameters to directly before their first use."""

import torch
from torch import fx

from ftrain.graph.loop import is_loop
from ftrain.graph.order import reorder
from ftrain.sharding.collectives import gather_ranks


def sink_gathers(module: fx.GraphModule) -> None:
    """Move each gather of a parameter, with the casts and copies around it, to directly before its first use.

    The trace gathers all parameters at the start of the loss, so all would be in memory together. The other nodes keep
    their order. No value changes.
    """
    chain = gather_chains(module)
    if not chain:
        return
    nodes = list(module.graph.nodes)
    order: list[fx.Node] = []
    done: set[fx.Node] = set()
    for node in nodes:
        if node in chain:
            continue
        order += _needed(node, chain, done)
        order.append(node)
    order[-1:-1] = [n for n in nodes if n in chain and n not in done]
    reorder(order)
    module.graph.lint()
    module.recompile()


def gather_chains(module: fx.GraphModule) -> set[fx.Node]:
    """The forward nodes that only assemble whole parameters from their shards.

    These are the gathers, the nodes that lead to them from an argument alone, and views, casts and waits of their
    results. If the backward recomputes these nodes, no whole parameter stays in memory between its uses (ZeRO stage 3,
    Rajbhandari et al., arXiv 1910.02054).
    """
    pure: set[fx.Node] = set()  # computed from one argument alone, by one node from the other
    for node in module.graph.nodes:
        inputs = node.all_input_nodes
        if node.op == "call_function" and node.meta.get("phase") == "forward" and len(inputs) == 1:
            source = inputs[0]
            if (source.op == "placeholder" or source in pure) and not is_loop(node):
                pure.add(node)
    gathers = {n for n in pure if n.target is gather_ranks and n.meta.get("purpose", "fsdp_gather") == "fsdp_gather"}
    chain: set[fx.Node] = set()
    for gather in gathers:
        node = gather
        while node in pure and node not in chain:
            chain.add(node)
            node = node.all_input_nodes[0]
    for node in module.graph.nodes:
        if node in pure and node.all_input_nodes[0] in chain and _is_part(node):
            chain.add(node)
    return chain


def _is_part(node: fx.Node) -> bool:
    """True for a wait, a view, a copy or a cast, as `placement.use` puts after a gather; not for ops of the loss."""
    target = node.target
    if target is gather_ranks or target is torch.ops._c10d_functional.wait_tensor.default:
        return True
    aten = torch.ops.aten
    copies = (aten.clone.default, aten._to_copy.default, aten.slice.Tensor, aten.permute.default, aten.detach.default)
    return target in copies or (isinstance(target, torch._ops.OpOverload) and target.is_view)


def _needed(node: fx.Node, chain: set[fx.Node], done: set[fx.Node]) -> list[fx.Node]:
    """The nodes of the chains that `node` needs and that are not in `done`, in order."""
    found: list[fx.Node] = []
    stack = [n for n in node.all_input_nodes if n in chain and n not in done]
    while stack:
        current = stack[-1]
        missing = [n for n in current.all_input_nodes if n in chain and n not in done]
        if missing:
            stack += missing
            continue
        stack.pop()
        if current not in done:
            done.add(current)
            found.append(current)
    return found
