"""The size of a divided dim in a user's own update on a mesh.

As a number it is the size of the whole array. When torch creates or views a tensor with it, it is the size of this
rank's piece.
"""

from collections.abc import Sequence
from typing import Any

import torch

from ftrain.sharding.placement import Placement, Split


class DividedSize(int):
    """The size of a whole array along a divided dim. As an int it behaves as on one device.

    `piece`: the size of every rank's piece. `split`: how the dim is divided; `split.dim` is its number in the array.
    `copies`: the mesh axes along which ranks hold copies of the array.
    """

    piece: int
    split: Split
    copies: tuple[str, ...]

    def __new__(cls, whole: int, piece: int, split: Split, copies: tuple[str, ...] = ()) -> "DividedSize":
        size = super().__new__(cls, whole)
        size.piece, size.split, size.copies = piece, split, copies
        return size

    def __getnewargs__(self) -> tuple[Any, ...]:  # so that a copy is a DividedSize too
        return int(self), self.piece, self.split, self.copies


def shape_of(placement: Placement) -> torch.Size:
    """The shape of the whole array, with a `DividedSize` for each divided dim."""
    sizes, held = list(placement.shape), placement.local_shape
    for split in placement.splits:
        sizes[split.dim] = DividedSize(sizes[split.dim], held[split.dim], split, placement.copies)
    return torch.Size(sizes)


def whole(value: Any) -> Any:
    """An argument of a torch function with each `DividedSize` replaced by the plain size of the whole array."""
    if isinstance(value, DividedSize):
        return int(value)
    if isinstance(value, slice):
        return slice(whole(value.start), whole(value.stop), whole(value.step))
    if type(value) in (tuple, list, torch.Size):
        return type(value)(map(whole, value))
    return {key: whole(item) for key, item in value.items()} if type(value) is dict else value


def of_pieces(sizes: Sequence[int]) -> list[int]:
    """The sizes with each `DividedSize` replaced by the size of a piece."""
    return [size.piece if isinstance(size, DividedSize) else size for size in sizes]


def placement_of_sizes(sizes: Sequence[int]) -> Placement:
    """The placement of an array of these sizes: each `DividedSize` dim is divided as in the array it came from."""
    divided = {dim: size for dim, size in enumerate(sizes) if isinstance(size, DividedSize)}
    splits = tuple(size.split._replace(dim=dim) for dim, size in divided.items())
    copies = next((size.copies for size in divided.values()), ())
    return Placement(tuple(map(int, sizes)), splits, copies)
