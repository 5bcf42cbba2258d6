"""Sizes that depend on data, with what is expected in their place: what plans of memory and time count with."""

from typing import Any

import torch
from torch import Tensor, fx

from ftrain.graph.loop import is_loop, loop_body
from ftrain.graph.torch_sizes import concrete_size, largest_sizes, size_symbol
from ftrain.sharding.sizes import is_size

_UNBOUNDED = 1  # of which not even the largest is known


def expect_sizes(module: fx.GraphModule) -> None:
    """Note, on each node whose value has a symbolic size, that value with the expected sizes as `meta["sized"]`.

    A size of which nothing is expected counts as the largest that it can be; the node that makes it tells so in
    `meta["unknown"]` (see `unknown_sizes`). Read it with `sized`.
    """
    expected: dict[Any, int] = {}
    for node in module.graph.nodes:
        if node.op == "call_function" and is_size(node.target):
            number = node.args[1]
            number = number.meta["sized"] if isinstance(number, fx.Node) else number
            expected[size_symbol(node.meta["val"])] = int(number)
        value = node.meta.get("val")
        for symbol, most in largest_sizes(value, expected).items():
            expected[symbol] = _UNBOUNDED if most is None else most
            node.meta["unknown"] = expected[symbol]
        if expected and _is_symbolic(value):
            node.meta["sized"] = torch.utils._pytree.tree_map(lambda v: _concrete(v, expected), value)


def unknown_sizes(module: fx.GraphModule) -> tuple[str, ...]:
    """What makes sizes that are known only when the step runs, and what plans count with: the largest. A sentence for
    each.
    """
    found = [
        f"{getattr(n.target, '__name__', n.target)} at {n.meta.get('source')}: its size depends on data, counted as "
        f"{n.meta['unknown']}, the largest possible"
        for n in module.graph.nodes
        if "unknown" in n.meta
    ]
    return (*found, *(text for n in module.graph.nodes if is_loop(n) for text in unknown_sizes(loop_body(n))))


def sized(node: fx.Node) -> Any:
    """The value of a node as plans see it: with expected sizes in the place of symbols."""
    return node.meta.get("sized", node.meta.get("val"))


def has_static_layout(value: Any) -> bool:
    """True for a tensor whose sizes and strides are numbers that do not depend on data."""
    return isinstance(value, Tensor) and all(isinstance(n, int) for n in (*value.shape, *value.stride()))


def _is_symbolic(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return any(map(_is_symbolic, value))
    if isinstance(value, Tensor):
        return any(isinstance(n, torch.SymInt) for n in value.shape)
    return isinstance(value, torch.SymInt)


def _concrete(value: Any, expected: dict[Any, int]) -> Any:
    if isinstance(value, Tensor):
        shape = [concrete_size(n, expected) for n in value.shape]
        return torch.empty(shape, dtype=value.dtype, device="meta")
    return concrete_size(value, expected) if isinstance(value, torch.SymInt) else value
