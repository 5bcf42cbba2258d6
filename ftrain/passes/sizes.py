"""Sizes that depend on data, with what is expected in their place: what plans of memory and time count with."""

from typing import Any

import torch
from torch import Tensor, fx

from ftrain.loop import is_loop, loop_body
from ftrain.private import concrete_size, size_symbol
from sharding.sizes import is_size


def expect_sizes(module: fx.GraphModule) -> None:
    """Note, on each node whose value has a symbolic size, that value with the expected sizes as `meta["sized"]`.

    Bodies of loops are treated alike. Read it with `sized`.
    """
    expected: dict[Any, int] = {}
    for node in module.graph.nodes:
        if is_loop(node):
            expect_sizes(loop_body(node))
        if node.op == "call_function" and is_size(node.target):
            number = node.args[1]
            number = number.meta["sized"] if isinstance(number, fx.Node) else number
            expected[size_symbol(node.meta["val"])] = int(number)
        value = node.meta.get("val")
        if expected and _is_symbolic(value):
            node.meta["sized"] = torch.utils._pytree.tree_map(lambda v: _concrete(v, expected), value)


def sized(node: fx.Node) -> Any:
    """The value of a node as plans see it."""
    return node.meta.get("sized", node.meta.get("val"))


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
