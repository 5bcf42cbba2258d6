"""The size of a divided dim, as a user's own update reads it: a number that is the array's, and a piece's when torch
makes or views a tensor of that size.
"""

from collections.abc import Sequence
from typing import Any

import torch

from ftrain.sharding.placement import Placement, Split


class DividedSize(int):
    """The whole array's size along a dim: so Python counts, compares and computes with it as on one device.

    `piece`: the size of every rank's piece. `split`: how the dim is divided (of the array's dims it was dim
    `split.dim`). `copies`: the axes along which ranks hold copies of the array.
    """

    piece: int
    split: Split
    copies: tuple[str, ...]

    def __new__(cls, whole: int, piece: int, split: Split, copies: tuple[str, ...] = ()) -> "DividedSize":
        size = super().__new__(cls, whole)
        size.piece, size.split, size.copies = piece, split, copies
        return size

    def __getnewargs__(self) -> tuple:  # a copy is divided too
        return int(self), self.piece, self.split, self.copies


def shape_of(placement: Placement) -> torch.Size:
    """The shape of an array, of which ranks hold pieces."""
    sizes, held = list(placement.shape), placement.local_shape
    for split in placement.splits:
        sizes[split.dim] = DividedSize(sizes[split.dim], held[split.dim], split, placement.copies)
    return torch.Size(sizes)


def whole(value: Any) -> Any:
    """An argument of a torch function, with plain numbers, those of arrays, in place of `DividedSize`s."""
    if isinstance(value, DividedSize):
        return int(value)
    if isinstance(value, slice):
        return slice(whole(value.start), whole(value.stop), whole(value.step))
    if type(value) in (tuple, list, torch.Size):
        return type(value)(map(whole, value))
    return {key: whole(item) for key, item in value.items()} if type(value) is dict else value


def of_pieces(sizes: Sequence[int]) -> list[int]:
    """The sizes of a piece."""
    return [size.piece if isinstance(size, DividedSize) else size for size in sizes]


def placement_of_sizes(sizes: Sequence[int]) -> Placement:
    """Where an array of these sizes is: divided like the arrays whose sizes they are."""
    divided = {dim: size for dim, size in enumerate(sizes) if isinstance(size, DividedSize)}
    splits = tuple(size.split._replace(dim=dim) for dim, size in divided.items())
    copies = next((size.copies for size in divided.values()), ())
    return Placement(tuple(map(int, sizes)), splits, copies)
