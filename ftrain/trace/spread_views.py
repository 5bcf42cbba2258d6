"""The placements of views of divided arrays: permuted, sliced, joined and reshaped."""

import math
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ftrain.sharding.placement import Placement, Split

_aten = torch.ops.aten


def moved(node: fx.Node, placements: Sequence[Placement | None]) -> Placement | None:
    """The placement of a view's result. None if a divided dim is cut or merged, or if the op is no view.

    `placements`: those of the op's inputs, in order.
    """
    source, value = node.args[0] if node.args else None, node.meta.get("val")
    if node.target in (_aten.cat.default, _aten.stack.default):
        return _joined(node, placements)
    if not isinstance(source, fx.Node) or placements[0] is None:
        return None
    before = source.meta.get("val")
    if not isinstance(before, Tensor):
        return None
    if node.target in _SPLITTERS:
        return _one_of_parts(node, placements[0], before)
    if not isinstance(value, Tensor):
        return None
    if node.target is _aten.slice.Tensor and not keeps_divided(node, placements[0]):
        return None
    origin = _origin(node, before, value)
    return None if origin is None else _follow(placements[0], before, value, origin)


_WHOLE = (0, 0, sys.maxsize, 1)  # the defaults of a slice's dim, start, end and step
_SPLITTERS = {_aten.split.Tensor, _aten.split_with_sizes.default, _aten.unbind.int}


def _origin(node: fx.Node, before: Tensor, after: Tensor) -> list[int | None] | None:
    """For each dim of the result, the same dim of the source, or None for a new dim; None for an unknown op."""
    rank, target = before.dim(), node.target

    def arg(i: int, default: Any = None) -> Any:
        return node.args[i] if len(node.args) > i else default

    dims: list[int | None] = list(range(rank))
    if target is _aten.permute.default:
        return [d % rank for d in arg(1)]
    if target in (_aten.transpose.int, _aten.t.default):
        if rank < 2:
            return dims
        a, b = (0, 1) if target is _aten.t.default else (arg(1) % rank, arg(2) % rank)
        dims[a], dims[b] = dims[b], dims[a]
        return dims
    if target is _aten.unsqueeze.default:
        at = arg(1) % (rank + 1)
        return [*dims[:at], None, *dims[at:]]
    if target in (_aten.squeeze.dim, _aten.squeeze.dims, _aten.squeeze.default):
        gone = range(rank) if target is _aten.squeeze.default else arg(1)
        gone = {d % max(1, rank) for d in ([gone] if isinstance(gone, int) else gone)}
        return [d for d in dims if not (d in gone and before.shape[d] == 1)]  # type: ignore[index]
    if target is _aten.expand.default:
        return [None] * (after.dim() - rank) + dims
    if target in (_aten.slice.Tensor, _aten.select.int):
        at = arg(1, 0) % rank
        if target is _aten.select.int:
            return [d for d in dims if d != at]
        return dims if after.shape[at] == before.shape[at] else [None if d == at else d for d in dims]
    if target is _aten.view.dtype:
        return dims if before.dtype.itemsize == after.dtype.itemsize else None
    if target in (_aten.view.default, _aten.reshape.default, _aten._unsafe_view.default):
        return _reshaped(before.shape, after.shape)
    return None


def keeps_divided(node: fx.Node, placement: Placement, *, first: int = 1) -> bool:
    """False for a slice that takes a part of a divided dim of the array. On the piece it may look like a full slice.

    `first`: the position of the dim among the op's arguments.
    """
    if node.target is _aten.select_scatter.default:
        return True
    given: list[Any] = [*node.args, None, None, None, None][first : first + 4]
    dim, start, end, step = (usual if value is None else value for value, usual in zip(given, _WHOLE, strict=True))
    dim %= len(placement.shape)
    if all(split.dim != dim for split in placement.splits):
        return True
    return bool(start in (0, -placement.shape[dim]) and end >= placement.shape[dim] and step == 1)


def _reshaped(before: Sequence[int], after: Sequence[int]) -> list[int | None]:
    """For each dim after a reshape, the dim before with equal size and as many elements before it; else None."""
    places = {}
    for d, size in enumerate(before):
        places[math.prod(before[:d]), size] = d
    return [places.get((math.prod(after[:d]), size)) for d, size in enumerate(after)]


def _follow(placement: Placement, before: Tensor, after: Tensor, origin: list[int | None]) -> Placement | None:
    """The placement after a view with these origins; None if a divided dim is lost, ambiguous, or changes its size."""
    splits = list[Split]()
    for split in placement.splits:
        if origin.count(split.dim) != 1:  # a piece of size 1 is like a new dim
            return None
        at = origin.index(split.dim)
        if after.shape[at] != before.shape[split.dim]:
            return None
        splits.append(split._replace(dim=at))
    divided = {s.dim for s in splits}
    sizes = [
        placement.shape[origin[d]] if d in divided else size  # type: ignore[index]
        for d, size in enumerate(after.shape)
    ]
    return Placement(tuple(sizes), tuple(sorted(splits)), placement.copies)


def _joined(node: fx.Node, placements: Sequence[Placement | None]) -> Placement | None:
    """The placement of `cat` or `stack` of arrays that are divided equally, along an undivided dim; else None."""
    parts = list(node.args[0])  # type: ignore[arg-type]
    first, value = placements[0], node.meta.get("val")
    if first is None or not isinstance(value, Tensor) or any(p is None for p in placements):
        return None
    if len({p.splits for p in placements if p is not None}) > 1 or not parts:
        return None
    given: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    dim = given % value.dim()
    stacked = node.target is _aten.stack.default
    splits = tuple(s._replace(dim=s.dim + int(stacked and s.dim >= dim)) for s in first.splits)
    if any(s.dim == dim for s in splits):
        return None
    sizes = list(value.shape)
    for split, old in zip(splits, first.splits, strict=True):
        sizes[split.dim] = first.shape[old.dim]
    return Placement(tuple(sizes), splits, first.copies)


def _one_of_parts(node: fx.Node, placement: Placement, before: Tensor) -> Placement | None:
    """The placement of each part after a split along an undivided dim; None for parts of different sizes."""
    unbound = node.target is _aten.unbind.int
    place = 1 if unbound else 2
    given: Any = node.args[place] if len(node.args) > place else node.kwargs.get("dim", 0)
    dim = given % before.dim()
    parts = node.meta.get("val")
    if any(s.dim == dim for s in placement.splits) or not isinstance(parts, list | tuple):
        return None
    if len({tuple(p.shape) for p in parts}) > 1:
        return None
    splits = tuple(s._replace(dim=s.dim - int(unbound and s.dim > dim)) for s in placement.splits)
    sizes = list(parts[0].shape)
    for split, old in zip(splits, placement.splits, strict=True):
        sizes[split.dim] = placement.shape[old.dim]
    return Placement(tuple(sizes), splits, placement.copies)
