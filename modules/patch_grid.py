"""What a vision tower asks of the shape of a frame: where its patches are, its windows, its places in a learned table.

Patches come square by square of `merge` x `merge` neighbours, which become one token, as Qwen's processors give them.
Numpy on the host: a frame's arrays follow from its height and width alone, so they are made once for each shape.

Legend: N patches of a frame, n tokens of it.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np


@dataclass(frozen=True)
class Grid:
    """How frames are read: `merge` x `merge` patches are one token.

    `window`: tokens a side of the windows that tokens are put in the order of (Qwen2.5-VL); None for none. `side`: rows
    and columns of a learned table of places that is stretched over each frame (Qwen3-VL); None for none.
    """

    merge: int
    window: int | None = None
    side: int | None = None


class Frame(NamedTuple):
    """A frame's arrays, its tokens in the order in which the tower reads them.

    `order_n`: which token, in the order of the processor, each is. `places_N2`: row and column of each patch.
    `window_N`: the number of its window. `taps_N4`, `shares_N4`: rows of the learned table that its place is made of,
    and how much of each, float32 (none without a table).
    """

    order_n: np.ndarray
    places_N2: np.ndarray
    window_N: np.ndarray
    taps_N4: np.ndarray
    shares_N4: np.ndarray


@lru_cache(maxsize=4096)
def frame(height: int, width: int, grid: Grid) -> Frame:
    """The arrays of a frame of `height` x `width` patches, both multiples of `grid.merge`; do not write into them.

    >>> from ftrain.modules.patch_grid import Grid, frame
    >>> frame(4, 4, Grid(merge=2)).places_N2[:5].tolist()
    [[0, 0], [0, 1], [1, 0], [1, 1], [0, 2]]
    >>> frame(4, 6, Grid(merge=2, window=2)).order_n.tolist()  # two windows side by side
    [0, 1, 3, 4, 2, 5]
    """
    rows, columns, merge = height // grid.merge, width // grid.merge, grid.merge
    row_n, column_n = (x.ravel() for x in np.indices((rows, columns)))
    side = grid.window or max(rows, columns)
    window_n = row_n // side * -(-columns // side) + column_n // side
    order_n = np.argsort(window_n, kind="stable")
    in_row, in_column = (x.ravel() for x in np.indices((merge, merge)))
    row_N = (row_n[order_n, None] * merge + in_row).ravel()
    column_N = (column_n[order_n, None] * merge + in_column).ravel()
    taps_N4, shares_N4 = _stretched(row_N, column_N, height, width, grid.side)
    return Frame(
        order_n,
        np.stack([row_N, column_N], axis=1),
        np.repeat(window_n[order_n], merge * merge),
        taps_N4,
        shares_N4,
    )


def _stretched(
    row_N: np.ndarray, column_N: np.ndarray, height: int, width: int, side: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Bilinear interpolation with the corners of the table at those of the frame."""
    if side is None:
        return np.zeros((len(row_N), 0), np.int64), np.zeros((len(row_N), 0), np.float32)
    row_taps, row_shares = _taps(row_N, height, side)
    column_taps, column_shares = _taps(column_N, width, side)
    taps_N22 = row_taps[:, :, None] * side + column_taps[:, None, :]
    return taps_N22.reshape(-1, 4), (row_shares[:, :, None] * column_shares[:, None, :]).reshape(-1, 4)


def _taps(place_N: np.ndarray, size: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """The two entries of an axis of the table on both sides of each place, and how much of each."""
    at_N = place_N.astype(np.float32) * np.float32(side - 1) / np.float32(max(size - 1, 1))
    low_N = np.floor(at_N)
    above_N = at_N - low_N
    taps_N2 = np.stack([low_N, low_N + 1], axis=1).astype(np.int64).clip(0, side - 1)
    return taps_N2, np.stack([1 - above_N, above_N], axis=1)
