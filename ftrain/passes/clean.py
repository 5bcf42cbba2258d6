"""Remove dead nodes and identities."""

from typing import Any

import torch
from torch import Tensor, fx

from ftrain.graph.op_effects import is_pure
from ftrain.graph.torch_sizes import size_symbol

_aten = torch.ops.aten
_IDENTITIES = {_aten.detach.default, _aten.alias.default, _aten.lift_fresh_copy.default, _aten.lift.default}
_SAME_SHAPE = {_aten.view.default, _aten.expand.default, _aten._unsafe_view.default, _aten.reshape.default}


def clean(module: fx.GraphModule) -> None:
    """Remove dead nodes, and ops that return their input (`detach`, views to the same shape), in place.

    No value changes. Ops with effects stay.
    """
    for node in list(module.graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in _IDENTITIES or (node.target in _SAME_SHAPE and _keeps_layout(node)):
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)
    module.graph.eliminate_dead_code(is_impure_node=_is_effect)
    module.recompile()


def _keeps_layout(node: fx.Node) -> bool:
    before, after = node.args[0].meta.get("val"), node.meta.get("val")  # type: ignore[union-attr]
    assert after is not None
    return before is not None and _layout(before) == _layout(after)


def _layout(x: Tensor) -> list[Any]:
    """The sizes and strides of a tensor of any shape; those that depend on data as their symbols, which have no number
    to compare.
    """
    return [n if isinstance(n, int) else size_symbol(n) for n in (*x.shape, *x.stride())]


def _is_effect(node: fx.Node) -> bool:
    """True for nodes that stay even without readers, e.g. random ops: later random numbers depend on them."""
    return node.op in ("placeholder", "output") or not is_pure(node)
