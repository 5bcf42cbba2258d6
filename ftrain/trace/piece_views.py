"""Applies sizes and indices for a whole array to a rank's piece, where they mean the same for the piece."""

import math
from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from ftrain.sharding.placement import Placement, Split


def reshaped(placement: Placement, sizes: Sequence[int]) -> tuple[Placement, tuple[Split, ...]]:
    """The placement of an array after a view with other sizes, and the splits that the view does not keep.

    A divided dim is kept if the view has a dim of its size with as many elements before it. One of `sizes` may be -1.
    """
    sizes = _without_unknown(math.prod(placement.shape), sizes)
    places = {(math.prod(sizes[:dim]), size): dim for dim, size in enumerate(sizes)}
    kept, lost = list[Split](), list[Split]()
    for split in placement.splits:
        at = places.get((math.prod(placement.shape[: split.dim]), placement.shape[split.dim]))
        (lost if at is None else kept).append(split if at is None else split._replace(dim=at))
    return Placement(tuple(sizes), tuple(sorted(kept)), placement.copies), tuple(lost)


def _without_unknown(count: int, sizes: Sequence[int]) -> list[int]:
    known = math.prod(size for size in sizes if size != -1)
    return [count // known if size == -1 and known else size for size in sizes]


def cut_dim(placement: Placement, index: Any) -> int | None:
    """The first divided dim of which `index` takes only a part; None if the index means the same for a piece.

    Index tensors and lists count as full dims here: they become ops of the graph, which are checked there.
    """
    parts = index if isinstance(index, tuple) else (index,)
    divided = {split.dim for split in placement.splits}
    dims = _dims_of(parts, len(placement.shape))
    for part, dim in zip(parts, dims, strict=True):
        if dim in divided and not _takes_all(part, placement.shape[dim]):
            return dim
    return None


def _dims_of(parts: Sequence[Any], rank: int) -> list[int | None]:
    """For each part of an index, the first dim that it indexes; None if it indexes none."""
    taken = [_dims_taken(part) for part in parts]
    left = rank - sum(taken)
    dims, at = list[int | None](), 0
    for part, count in zip(parts, taken, strict=True):
        dims.append(at if count else None)
        at += left if part is Ellipsis else count
    return dims


def _dims_taken(part: Any) -> int:
    if part is None or part is Ellipsis or isinstance(part, bool):
        return 0
    return part.dim() if isinstance(part, Tensor) and part.dtype in (torch.bool, torch.uint8) else 1


def _takes_all(part: Any, size: int) -> bool:
    if isinstance(part, slice):
        numbers = all(bound is None or isinstance(bound, Integral) for bound in (part.start, part.stop, part.step))
        return numbers and part.indices(size) == (0, size, 1)
    return not isinstance(part, Integral)
