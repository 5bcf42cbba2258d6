"""Refuses writes into tensors whose elements share memory, such as the gradient of a sum (one expanded number).

Eager PyTorch refuses them at run time. Shape rules do not, so a trace would compute other numbers.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, fx

from ftrain.graph.writes import written_arguments

_aten = torch.ops.aten
_FILLS = {_aten.zero_.default, _aten.fill_.Scalar}
"""Ops that write one number everywhere. Eager PyTorch runs them on such memory too."""


def settle_overlapping_writes(nodes: Iterable[fx.Node]) -> None:
    """Change, in place, fills of such tensors so that they write each element of the memory once.

    `nodes`: those whose ops write into an argument. ValueError, with the user's line, for any other op that writes into
    such a tensor.
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
    """The dims along which all elements are one; a size that depends on data may be more than one."""
    if not isinstance(x, Tensor):
        return []
    pairs = enumerate(zip(x.shape, x.stride(), strict=True))
    return [
        dim
        for dim, (size, stride) in pairs
        if isinstance(stride, int) and stride == 0 and (not isinstance(size, int) or size > 1)
    ]


def _fill_once(node: fx.Node, old: fx.Node, dims: list[int]) -> None:
    """Let a fill write only into the first element along each of the dims."""
    graph, part = node.graph, old
    for dim in reversed(dims):
        with graph.inserting_before(node):
            value, part = part.meta["val"], graph.call_function(_aten.select.int, (part, dim, 0))
        part.meta.update(node.meta, val=value.select(dim, 0))
    node.args = (part, *node.args[1:])
    node.replace_all_uses_with(old)
    node.meta["val"] = part.meta["val"]
