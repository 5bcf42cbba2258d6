"""Writes into tensors whose elements share memory, such as the gradient of a sum, which is one number seen many times.

Eager PyTorch refuses them when they run, and shape rules alone do not, so that a trace would go on with other numbers.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, fx

from ftrain.graph.writes import written_arguments

_aten = torch.ops.aten
_FILLS = {_aten.zero_.default, _aten.fill_.Scalar}
"""Ops that write one number everywhere, which eager PyTorch does in such memory too."""


def settle_overlapping_writes(nodes: Iterable[fx.Node]) -> None:
    """Look at nodes that write. Fills are made to write each place of the memory once; other ops are a ValueError with
    the line.
    """
    for node in nodes:
        for old in written_arguments(node):
            dims = _shared_dims(old.meta.get("val"))
            if not dims:
                continue
            if node.target not in _FILLS:
                raise ValueError(
                    f"{node.meta.get('source')}: {node.target} writes into a tensor whose elements share memory (such "
                    "as the gradient of a sum, or an expanded view), where what is written depends on the order: give "
                    "it a copy (x.clone()), or make a new value"
                )
            _fill_once(node, old, dims)


def _shared_dims(x: object) -> list[int]:
    """The dims along which all elements are one."""
    if not isinstance(x, Tensor):
        return []
    return [dim for dim, (size, stride) in enumerate(zip(x.shape, x.stride(), strict=True)) if size > 1 and not stride]


def _fill_once(node: fx.Node, old: fx.Node, dims: list[int]) -> None:
    """Let a fill write into the first element along each of the dims alone."""
    graph, part = node.graph, old
    for dim in reversed(dims):
        with graph.inserting_before(node):
            value, part = part.meta["val"], graph.call_function(_aten.select.int, (part, dim, 0))
        part.meta.update(node.meta, val=value.select(dim, 0))
    node.args = (part, *node.args[1:])
    node.replace_all_uses_with(old)
    node.meta["val"] = part.meta["val"]
