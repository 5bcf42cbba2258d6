"""Elementwise ops with an out form, which can write their result over one of their inputs."""

import torch
from torch import fx

from ftrain.graph.aliasing import storage

_aten = torch.ops.aten

# By op, its overload with the argument `out`.
_OUT_FORM = {
    _aten.add.Tensor: _aten.add.out,
    _aten.sub.Tensor: _aten.sub.out,
    _aten.mul.Tensor: _aten.mul.out,
    _aten.div.Tensor: _aten.div.out,
    _aten.addcmul.default: _aten.addcmul.out,
    _aten.addcdiv.default: _aten.addcdiv.out,
    _aten.lerp.Scalar: _aten.lerp.Scalar_out,
    _aten.lerp.Tensor: _aten.lerp.Tensor_out,
    _aten.where.self: _aten.where.self_out,
    _aten.maximum.default: _aten.maximum.out,
    _aten.minimum.default: _aten.minimum.out,
    _aten.sqrt.default: _aten.sqrt.out,
    _aten.neg.default: _aten.neg.out,
}


def has_out_form(node: fx.Node) -> bool:
    """True for a node that `write_over` can replace."""
    return node.target in _OUT_FORM


def can_write_over(new: fx.Node, old: fx.Node) -> bool:
    """True if the result of `new` may be written into `old`.

    Both must be contiguous with one static shape and dtype, and `new` must not read `old`'s memory through a view.
    """
    result, leaf = new.meta["val"], old.meta["val"]
    if not all(isinstance(size, int) for size in (*result.shape, *leaf.shape)):
        return False
    if result.shape != leaf.shape or result.dtype != leaf.dtype:
        return False
    if not (result.is_contiguous() and leaf.is_contiguous()):
        return False
    mine = storage(old)
    return all(n is old or storage(n) != mine for n in new.all_input_nodes)


def write_over(new: fx.Node, old: fx.Node) -> fx.Node:
    """Replace the node `new` by its out form that writes into `old`, and return that node.

    KeyError if `has_out_form(new)` is False.
    """
    with new.graph.inserting_after(new):
        fused = new.graph.call_function(_OUT_FORM[new.target], new.args, {**new.kwargs, "out": old})  # type: ignore[index]
    fused.meta.update(new.meta, val=old.meta["val"])
    new.replace_all_uses_with(fused)
    new.graph.erase_node(new)
    return fused
