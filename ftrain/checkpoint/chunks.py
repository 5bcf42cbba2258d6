"""The grid on which an array is cut into chunks, the unit of reading, checking and parallel work."""

import functools
import math

Shape = tuple[int, ...]


def chunk_shape(shape: Shape, piece: Shape, *, itemsize: int, limit: int) -> Shape:
    """The shape of a chunk of at most `limit` bytes (at least one element), in elements; of up to four times as many
    where a piece can be cut evenly only into far smaller ones.

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
        chunk[dim] = length // _even_parts(length, parts) if piece[dim] < shape[dim] else math.ceil(length / parts)
    return tuple(chunk)


@functools.lru_cache(maxsize=1 << 12)
def _even_parts(length: int, wanted: int) -> int:
    """A number of equal parts near the wanted one: a bit more, else down to a quarter, else the next one that is."""
    more = next(n for n in range(wanted, length + 1) if length % n == 0)
    if more <= 2 * wanted:
        return more
    return next((n for n in range(wanted, (wanted - 1) // 4, -1) if length % n == 0), more)
