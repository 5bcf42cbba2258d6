"""A CRC-32C of every chunk of every array, from the memory that is saved: the manifest keeps them by leaf and place.

The checksum that a chunk carries says that it is whole, not that it is the right one: of this step, of this leaf, from
this place. What the manifest says binds it to all three.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from crc32c import crc32c

from ftrain.checkpoint.arrays import Piece
from ftrain.checkpoint.errors import DamagedCheckpoint
from ftrain.checkpoint.manifest import ArrayLeaf

Sums = Mapping[str, Sequence[int]]
"""By leaf path, in the order of the grid (the last dim fastest)."""

Index = tuple[int, ...]


def grid(leaf: ArrayLeaf) -> Index:
    """How many chunks a leaf has in each dim."""
    return tuple(-(-size // chunk) for size, chunk in zip(leaf.shape, leaf.chunk, strict=True))


def chunk_number(leaf: ArrayLeaf, index: Index) -> int:
    """A chunk's place, from 0, in the order of the grid (the last dim fastest). `index`: its place in each dim."""
    found = 0
    for i, count in zip(index, grid(leaf), strict=True):
        found = found * count + i
    return found


def touched(leaf: ArrayLeaf, piece: Piece) -> Iterator[Index]:
    """The chunks that a piece is in, by their index on the grid."""
    bounds = zip(piece.start, piece.values.shape, leaf.chunk, strict=True)
    return itertools.product(*(range(start // size, -(-(start + n) // size)) for start, n, size in bounds))


def chunk_sums(leaf: ArrayLeaf, piece: Piece) -> dict[int, int]:
    """The sums, by place, of the chunks that lie whole in a piece; at the array's end a chunk is filled with zeros."""
    return {
        chunk_number(leaf, index): _sum(leaf, index, piece)
        for index in touched(leaf, piece)
        if holds(leaf, index, piece)
    }


def check_sums(leaves: Mapping[str, ArrayLeaf], pieces: Mapping[str, Sequence[Piece]], sums: Sums, shown: str) -> None:
    """DamagedCheckpoint if a chunk in blocks that have been read from the folder `shown` is another one than was
    written there. Without sums of a leaf nothing is looked at.
    """
    for path, leaf in leaves.items():
        for piece in pieces[path] if path in sums else ():
            for at, found in chunk_sums(leaf, piece).items():
                if found != sums[path][at]:
                    raise DamagedCheckpoint(
                        f"leaf {path!r} in {shown} is damaged: chunk {at} has the CRC-32C {found:08x} instead of "
                        f"{sums[path][at]:08x}; restore another step"
                    )


def joined(leaves: Mapping[str, ArrayLeaf], parts: Sequence[Mapping[str, Mapping[int, int]]]) -> dict[str, list[int]]:
    """The sums of all leaves, from what each writer has found. ValueError if a chunk was written by nobody."""
    found: dict[str, list[int]] = {}
    for path, leaf in leaves.items():
        known = {at: value for part in parts for at, value in part.get(path, {}).items()}
        if len(known) != math.prod(grid(leaf)):
            raise ValueError(f"of {math.prod(grid(leaf))} chunks of {path!r} {len(known)} were written")
        found[path] = [known[at] for at in range(len(known))]
    return found


def holds(leaf: ArrayLeaf, index: Index, piece: Piece) -> bool:
    """Whether a chunk lies whole in a piece, as far as the array goes."""
    sizes = zip(index, leaf.chunk, leaf.shape, piece.start, piece.values.shape, strict=True)
    return all(
        start <= i * chunk and min((i + 1) * chunk, size) <= start + length for i, chunk, size, start, length in sizes
    )


def _sum(leaf: ArrayLeaf, index: Index, piece: Piece) -> int:
    sizes = zip(index, leaf.chunk, piece.start, strict=True)
    begins = [i * chunk - start for i, chunk, start in sizes]
    part = piece.values[tuple(slice(b, b + chunk) for b, chunk in zip(begins, leaf.chunk, strict=True))]
    if part.shape != leaf.chunk:
        filled = np.zeros(leaf.chunk, part.dtype)
        filled[tuple(slice(0, n) for n in part.shape)] = part
        part = filled
    return crc32c(np.ascontiguousarray(part).reshape(-1).view(np.uint8).data)
