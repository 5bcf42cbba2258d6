"""The grid on which an array is cut into chunks, the unit of reading, checking and parallel work."""

import math

Shape = tuple[int, ...]


def chunk_shape(shape: Shape, piece: Shape, *, itemsize: int, limit: int) -> Shape:
    """The shape of a chunk of at most `limit` bytes (at least one element), in elements.

    `piece` is what one writer holds: each dim of `shape` is cut into blocks of that length from 0 on. No chunk crosses
    a block's edge, so that two writers never share one. Leading dims are cut first, so that a chunk is a contiguous
    range of the piece's memory; all chunks of a dim are about equally long.
    """
    chunk = [max(1, n) for n in piece]
    for dim, length in enumerate(chunk):
        if math.prod(chunk) * itemsize <= limit:
            break
        fitting = max(1, limit // (math.prod(chunk[dim + 1 :]) * itemsize))
        parts = math.ceil(length / fitting)
        chunk[dim] = _divisor(length, parts) if piece[dim] < shape[dim] else math.ceil(length / parts)
    return tuple(chunk)


def _divisor(length: int, parts: int) -> int:
    """The largest divisor of `length` that cuts it into at least `parts` equal parts."""
    return next(length // n for n in range(parts, length + 1) if length % n == 0)
