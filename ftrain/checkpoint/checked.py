"""Blocks of arrays read by tensorstore and compared with the manifest's sums, chunks that a block cuts through too.

A sum is that of a whole chunk. So a block that begins or ends within one is read chunk by chunk into other memory, and
its part is taken from there.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import tensorstore as ts

from ftrain.checkpoint.arrays import Piece, read_part
from ftrain.checkpoint.direct import Overlap
from ftrain.checkpoint.manifest import ArrayLeaf, Manifest
from ftrain.checkpoint.store import KvSpec
from ftrain.checkpoint.sums import Index, check_sums, holds, touched

_AT_ONCE = 2**26
"""Bytes of cut chunks that are in memory at a time, or a single larger one."""


def read_checked(
    where: KvSpec,
    leaves: Mapping[str, ArrayLeaf],
    pieces: Mapping[str, Sequence[Piece]],
    manifest: Manifest,
    context: ts.Context,
    shown: str,
) -> None:
    """Fill the memory of these blocks, as `read_part`, and compare every chunk that they touch with its sum.

    Args:
        where, leaves, pieces, context, shown: as for `read_part`.
        manifest: of the checkpoint; without sums of a leaf nothing is compared.

    Raises:
        DamagedCheckpoint: a leaf is missing, or a chunk is not what was written there; it is named.
    """
    cut: list[tuple[str, Piece]] = []
    rest: dict[str, list[Piece]] = {path: [] for path in leaves}
    for path, leaf in leaves.items():
        for piece in pieces[path]:
            if path in manifest.sums and _is_cut(leaf, piece):
                cut.append((path, piece))
            else:
                rest[path].append(piece)
    # Also opens the others: their metadata is checked.
    read_part(where, leaves, rest, manifest.database, manifest.checksum, context, shown)
    check_sums(leaves, rest, manifest.sums, shown)
    for path, piece in cut:
        leaf = leaves[path]
        for indices in _batches(leaf, piece):
            chunks = [_chunk(leaf, index, piece.values.dtype) for index in indices]
            read_part(where, {path: leaf}, {path: chunks}, manifest.database, manifest.checksum, context, shown)
            check_sums({path: leaf}, {path: chunks}, manifest.sums, shown)
            for index, chunk in zip(indices, chunks, strict=True):
                overlap = Overlap.of(leaf, index, piece)
                piece.values[overlap.in_piece] = chunk.values[overlap.in_chunk]


def _is_cut(leaf: ArrayLeaf, piece: Piece) -> bool:
    return not all(holds(leaf, index, piece) for index in touched(leaf, piece))


def _chunk(leaf: ArrayLeaf, index: Index, dtype: np.dtype) -> Piece:
    """Memory for a chunk, as far as the array goes."""
    start = tuple(i * size for i, size in zip(index, leaf.chunk, strict=True))
    ends = (min(first + size, total) for first, size, total in zip(start, leaf.chunk, leaf.shape, strict=True))
    return Piece(start, np.empty([end - first for first, end in zip(start, ends, strict=True)], dtype))


def _batches(leaf: ArrayLeaf, piece: Piece) -> Iterator[list[Index]]:
    count = max(1, _AT_ONCE // max(1, int(np.prod(leaf.chunk)) * piece.values.itemsize))
    left = touched(leaf, piece)
    while batch := list(itertools.islice(left, count)):
        yield batch
