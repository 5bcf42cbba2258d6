"""Sum gradients over ranks as soon as they exist, so that unsharded gradients are live only briefly."""

import torch
from torch import fx

from ftrain.graph.collectives import WAIT
from ftrain.graph.order import reorder

_aten, _c10d = torch.ops.aten, torch.ops._c10d_functional
_SUMS = (_c10d.reduce_scatter_tensor.default, _c10d.all_reduce.default)
_PURPOSES = ("fsdp_gather.T", "gradient_sum.T", "gradient_sum")
_MOVES = (
    _aten._to_copy.default, _aten.view.default, _aten.reshape.default, _aten.clone.default, _aten.cat.default,
    _aten.constant_pad_nd.default, _aten.slice.Tensor, _aten.permute.default, _aten.transpose.int, _aten.t.default,
    _aten._unsafe_view.default, _aten.alias.default, _aten.split.Tensor, _aten.split_with_sizes.default,
    _aten.slice_backward.default,
)  # fmt: skip


def sum_early(module: fx.GraphModule) -> None:
    """Move each sum of a gradient over ranks, with its casts, copies and wait, to directly after the gradient.

    The trace gathers all parameters at the start of the loss. Autograd runs in reverse order, so it sums all gradients
    at the end of the backward, and all unsharded gradients would be in memory together. The other nodes keep their
    order. No value changes.
    """
    chain = sum_chains(module)
    if not chain:
        return
    order: list[fx.Node] = []
    done: set[fx.Node] = set()
    for node in list(module.graph.nodes):
        if node in chain:
            continue
        stack = [node]
        while stack:
            ready = stack.pop()
            if ready in done:
                continue
            order.append(ready)
            done.add(ready)
            later = [u for u in ready.users if u in chain and all(p in done for p in u.all_input_nodes)]
            stack.extend(reversed(later))
    reorder(order)
    module.graph.lint()
    module.recompile()


def sum_chains(module: fx.GraphModule) -> set[fx.Node]:
    """The nodes that sum gradients over ranks, their waits, and the casts and copies that prepare a gradient for it."""
    chain: set[fx.Node] = set()
    for node in module.graph.nodes:
        if node.target not in _SUMS or node.meta.get("phase") != "backward" or node.meta["purpose"] not in _PURPOSES:
            continue
        chain.add(node)
        chain.update(u for u in node.users if u.target is WAIT)
        stack = list(node.all_input_nodes)
        while stack:
            source = stack.pop()
            if source in chain or source.target not in _MOVES or len(source.users) > 1:
                continue
            chain.add(source)
            stack.extend(source.all_input_nodes)
    return chain
