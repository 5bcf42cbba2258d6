"""Reading local checkpoints straight into the memory of the leaves, checked on the way.

tensorstore reads a chunk into memory of its own, checks it and copies it: three passes, on fresh pages. Chunks are
stored as they lie in memory, with a crc32c behind; what is a contiguous range of both the chunk and the leaf is read
into the leaf. Threads read and check, neither of which holds the GIL.
"""

import itertools
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import NamedTuple

import numpy as np
import tensorstore as ts
from crc32c import crc32c

from ftrain.checkpoint.arrays import Piece
from ftrain.checkpoint.dtypes import DTYPES
from ftrain.checkpoint.errors import DamagedCheckpoint
from ftrain.checkpoint.extents import Extent, extents
from ftrain.checkpoint.manifest import ArrayLeaf
from ftrain.checkpoint.place import KvSpec

_THREADS = 8  # more than cores: a disk is faster with several reads in flight
_CRC_BYTES = 4
_BLOCK = 2**18
Index = tuple[int, ...]


class DirectReader:
    """The threads of one restore, and what they need; a context manager that ends them."""

    def __init__(self, *, database: bool, checksum: bool, context: ts.Context) -> None:
        """`database`, `checksum`: of the `Storage` that the checkpoint was written with."""
        self._database, self._checksum, self._context = database, checksum, context
        self._extents: dict[str, dict[str, Extent]] = {}
        self._pool = ThreadPoolExecutor(_THREADS)

    def __enter__(self) -> "DirectReader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)

    def read(
        self, where: KvSpec, leaves: Mapping[str, ArrayLeaf], pieces: Mapping[str, Sequence[Piece]], shown: str
    ) -> set[str]:
        """Fill what can be filled so from the folder `where`, and return the paths of these leaves; the others are for
        `read_part`, whose arguments these are: leaves of a few bytes, and all that is not where or as it should be.

        Raises:
            DamagedCheckpoint: a chunk is not what was written; its leaf is named.
        """
        if where["driver"] != "file" or sys.byteorder != "little":
            return set()
        tasks, done = [], set()
        for path, leaf in leaves.items():
            wanted = [(index, piece) for piece in pieces[path] for index in _touched(leaf, piece)]
            found = [extent for index, _ in wanted if (extent := self._extent(where, leaf, index)) is not None]
            if len(found) == len(wanted):
                done.add(path)
                tasks += [(extent, path, *what) for extent, what in zip(found, wanted, strict=True)]
        # In the order of the files, whatever that of the leaves.
        tasks.sort(key=lambda task: task[0])
        futures = [
            (path, self._pool.submit(self._fill, where["path"], leaves[path], index, extent, piece))
            for extent, path, index, piece in tasks
        ]
        for path, future in futures:
            error = future.exception()
            if isinstance(error, ValueError | OSError):
                raise DamagedCheckpoint(
                    f"leaf {path!r} in {shown} is damaged: {error}; restore another step"
                ) from error
            if error is not None:
                raise error
        return done

    def _extent(self, where: KvSpec, leaf: ArrayLeaf, index: Index) -> Extent | None:
        """Where a chunk lies; None if that is not told, or it has not the length it should have."""
        key = "/".join([leaf.key, "c", *map(str, index)])
        length = math.prod(leaf.chunk) * DTYPES[leaf.dtype].itemsize + (_CRC_BYTES if self._checksum else 0)
        if not self._database:
            return Extent(key, 0, length)
        folder = where["path"]
        if folder not in self._extents:
            try:
                self._extents[folder] = extents(where, self._context)
            except ValueError:
                # The tree is damaged: who opens a leaf with it says so, and names the leaf.
                self._extents[folder] = {}
        found = self._extents[folder].get(key)
        return found if found is not None and found.length == length else None

    def _fill(self, folder: str, leaf: ArrayLeaf, index: Index, extent: Extent, piece: Piece) -> None:
        """Read one chunk, check it, and see to it that its part of the piece is in place."""
        overlap = Overlap.of(leaf, index, piece)
        room = overlap.straight(leaf, piece)
        chunk = None
        if room is None:
            chunk = np.empty(leaf.chunk, piece.values.dtype)
            room = 0, _flat(chunk), 0
        ahead, values, behind = room
        buffers = [np.empty(ahead, np.uint8), values, np.empty(behind, np.uint8)]
        # Opened for each chunk: the system reads ahead for each open file on its own.
        with open(folder + extent.file, "rb", buffering=0) as file:
            found = _read_all(file.fileno(), buffers, extent, checksum=self._checksum)
            if self._checksum:
                stored = os.pread(file.fileno(), _CRC_BYTES, extent.offset + extent.length - _CRC_BYTES)
                _check(found, stored, index)
        if chunk is not None:
            piece.values[overlap.in_piece] = chunk[overlap.in_chunk]


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


def _touched(leaf: ArrayLeaf, piece: Piece) -> Iterator[Index]:
    """The chunks that a piece needs, by their place on the grid."""
    bounds = zip(piece.start, piece.values.shape, leaf.chunk, strict=True)
    return itertools.product(*(range(start // size, -(-(start + n) // size)) for start, n, size in bounds))


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


def _check(found: int, stored: bytes, index: Index) -> None:
    expected = int.from_bytes(stored, "little")
    if found != expected:
        raise ValueError(f"chunk {list(index)} has the CRC-32C {found:08x} instead of {expected:08x}")


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
