"""Reading local checkpoints straight into the memory of the leaves, checked on the way.

tensorstore reads a chunk into memory of its own, checks it and copies it: three passes, on fresh pages. Chunks are
stored as they lie in memory, with a crc32c behind; what is a contiguous range of both the chunk and the leaf is read
into the leaf. Threads read and check, neither of which holds the GIL.
"""

import math
import os
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import NamedTuple

import numpy as np
import tensorstore as ts
from crc32c import crc32c

from ftrain.checkpoint.arrays import Piece
from ftrain.checkpoint.dtypes import DTYPES
from ftrain.checkpoint.errors import DamagedCheckpoint
from ftrain.checkpoint.extents import TREE_BYTES, Extent, extents
from ftrain.checkpoint.manifest import ArrayLeaf, Manifest
from ftrain.checkpoint.store import Files, KvSpec, join
from ftrain.checkpoint.sums import Index, chunk_number, grid, touched

_THREADS = 8  # more than cores: a disk is faster with several reads in flight
_CRC_BYTES = 4
_BLOCK = 2**18
_TREE_BYTES_PER_CHUNK = 2**9


class DirectReader:
    """The threads of one restore, and what they need; a context manager that ends them."""

    def __init__(self, manifest: Manifest, context: ts.Context) -> None:
        """For the checkpoint with this manifest."""
        self._manifest, self._context = manifest, context
        self._sums = manifest.sums
        self._tree_bytes = tree_bytes(manifest)
        self._extents: dict[str, dict[str, Extent]] = {}
        self._pool = ThreadPoolExecutor(_THREADS)

    def __enter__(self) -> "DirectReader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)

    def read(
        self,
        where: KvSpec,
        files: Files | None,
        leaves: Mapping[str, ArrayLeaf],
        pieces: Mapping[str, Sequence[Piece]],
        shown: str,
    ) -> set[str]:
        """Fill what can be filled so from a folder, and return the paths of these leaves; the others are for
        `read_part`, whose arguments these are: leaves of a few bytes, and all that is not where or as it should be.
        `files`: those of the folder `where`.

        Raises:
            DamagedCheckpoint: a chunk is not what was written, or the tree of the database leads elsewhere; its leaf is
                named.
        """
        if files is None or sys.byteorder != "little":
            return set()
        tasks, done = [], set()
        for path, leaf in leaves.items():
            wanted = [(index, piece) for piece in pieces[path] for index in touched(leaf, piece)]
            try:
                known = self._known(where, files)
            except (ValueError, OSError) as cause:
                raise _damaged(path, shown, cause) from cause
            found = [extent for index, _ in wanted if (extent := self._extent(known, leaf, index)) is not None]
            if len(found) == len(wanted):
                done.add(path)
                tasks += [(extent, path, *what) for extent, what in zip(found, wanted, strict=True)]
        # In the order of the files, whatever that of the leaves.
        tasks.sort(key=lambda task: task[0])
        futures = [
            (path, self._pool.submit(self._fill, files, path, leaves[path], index, extent, piece))
            for extent, path, index, piece in tasks
        ]
        for path, future in futures:
            error = future.exception()
            if isinstance(error, ValueError | OSError):
                raise _damaged(path, shown, error) from error
            if error is not None:
                raise error
        return done

    def _known(self, where: KvSpec, files: Files) -> Mapping[str, Extent]:
        """What the tree of the database in `where` tells; read once."""
        folder = where["path"]
        if self._manifest.database and folder not in self._extents:
            self._extents[folder] = extents(where, self._context, files, limit=self._tree_bytes)
        return self._extents.get(folder, {})

    def _extent(self, known: Mapping[str, Extent], leaf: ArrayLeaf, index: Index) -> Extent | None:
        """Where a chunk lies; None if that is not told, or it has not the length it should have."""
        key = "/".join([leaf.key, "c", *map(str, index)])
        length = math.prod(leaf.chunk) * DTYPES[leaf.dtype].itemsize + (_CRC_BYTES if self._manifest.checksum else 0)
        if not self._manifest.database:
            return Extent(key, 0, length)
        found = known.get(key)
        return found if found is not None and found.length == length else None

    def _fill(self, files: Files, path: str, leaf: ArrayLeaf, index: Index, extent: Extent, piece: Piece) -> None:
        """Read one chunk, check it, and see to it that its part of the piece is in place."""
        overlap = Overlap.of(leaf, index, piece)
        room = overlap.straight(leaf, piece)
        chunk = None
        if room is None:
            chunk = np.empty(leaf.chunk, piece.values.dtype)
            room = 0, _flat(chunk), 0
        ahead, values, behind = room
        buffers = [np.empty(ahead, np.uint8), values, np.empty(behind, np.uint8)]
        if join([leaf.part, extent.file]) not in self._manifest.files:
            raise ValueError(f"it refers to {extent.file!r}, which is no file of this checkpoint")
        # Opened for each chunk: the system reads ahead for each open file on its own.
        descriptor = files.open(extent.file)
        try:
            found = _read_all(descriptor, buffers, extent, checksum=self._manifest.checksum)
            if self._manifest.checksum:
                stored = os.pread(descriptor, _CRC_BYTES, extent.offset + extent.length - _CRC_BYTES)
                _check(found, int.from_bytes(stored, "little"), index)
        finally:
            os.close(descriptor)
        if path in self._sums:
            _check(found, self._sums[path][chunk_number(leaf, index)], index)
        if chunk is not None:
            piece.values[overlap.in_piece] = chunk[overlap.in_chunk]


def tree_bytes(manifest: Manifest) -> int:
    """How many bytes the tree of a database with these arrays may take when it is unpacked."""
    return TREE_BYTES + _TREE_BYTES_PER_CHUNK * sum(math.prod(grid(leaf)) for leaf in manifest.arrays.values())


class Overlap(NamedTuple):
    """What a chunk and a piece of one array have in common, as seen from either, in slices."""

    in_chunk: tuple[slice, ...]
    in_piece: tuple[slice, ...]

    @staticmethod
    def of(leaf: ArrayLeaf, index: Index, piece: Piece) -> "Overlap":
        """The overlap of the chunk at `index` of the grid."""
        first, in_chunk, in_piece = [i * size for i, size in zip(index, leaf.chunk, strict=True)], [], []
        sizes = zip(first, leaf.chunk, piece.start, piece.values.shape, strict=True)
        for chunk, length, start, wanted in sizes:
            begin, end = max(chunk, start), min(chunk + length, start + wanted)
            in_chunk.append(slice(begin - chunk, end - chunk))
            in_piece.append(slice(begin - start, end - start))
        return Overlap(tuple(in_chunk), tuple(in_piece))

    def straight(self, leaf: ArrayLeaf, piece: Piece) -> tuple[int, np.ndarray, int] | None:
        """Bytes of the chunk ahead of the overlap, the overlap's memory in the piece, and bytes of the chunk behind it;
        None where it is not one range of bytes of both.
        """
        values = piece.values
        if not (_is_range(self.in_chunk, leaf.chunk) and _is_range(self.in_piece, values.shape)):
            return None
        count = math.prod(s.stop - s.start for s in self.in_piece)
        ahead, skipped = _position(self.in_chunk, leaf.chunk), _position(self.in_piece, values.shape)
        behind = math.prod(leaf.chunk) - ahead - count
        room = values.reshape(-1)[skipped : skipped + count]
        return ahead * values.itemsize, _flat(room), behind * values.itemsize


def _is_range(block: tuple[slice, ...], shape: Sequence[int]) -> bool:
    """Is the block of an array of this shape one range of its memory?"""
    lengths = [s.stop - s.start for s in block]
    first = next((dim for dim, n in enumerate(lengths) if n != 1), len(lengths))
    return all(n == size for n, size in zip(lengths[first + 1 :], shape[first + 1 :], strict=True))


def _position(block: tuple[slice, ...], shape: Sequence[int]) -> int:
    """Where in the array's memory the block's first element is."""
    found = 0
    for s, size in zip(block, shape, strict=True):
        found = found * size + s.start
    return found


def _flat(array: np.ndarray) -> np.ndarray:
    return array.reshape(-1).view(np.uint8)


def _check(found: int, expected: int, index: Index) -> None:
    if found != expected:
        raise ValueError(f"chunk {list(index)} has the CRC-32C {found:08x} instead of {expected:08x}")


def _damaged(path: str, shown: str, error: Exception) -> DamagedCheckpoint:
    return DamagedCheckpoint(f"leaf {path!r} in {shown} is damaged: {error}; restore another step")


def _read_all(descriptor: int, buffers: Sequence[np.ndarray], extent: Extent, *, checksum: bool) -> int:
    """Fill the buffers one after the other from the extent; the CRC-32C of their bytes, 0 without `checksum`.

    A block is checked while it is in the cache. ValueError if the file ends before.
    """
    offset, found = extent.offset, 0
    for buffer in buffers:
        for begin in range(0, len(buffer), _BLOCK):
            block = left = buffer[begin : begin + _BLOCK].data
            while left:
                got = os.preadv(descriptor, [left], offset)
                if got == 0:
                    raise ValueError(f"{extent.file} ends at byte {offset}, within a chunk")
                left, offset = left[got:], offset + got
            if checksum:
                found = crc32c(block, found)
    return found
