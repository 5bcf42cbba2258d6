"""Places of tokens among pictures on three axes, time, row and column (M-RoPE, Qwen2-VL, arXiv 2409.12191).

Text counts up on all axes at once. A picture's tokens stay at one time and have the rows and columns of its grid, all
counted from where the picture stands; a video's also go on in time. Numpy on the host.

Legend: T tokens, n tokens of a picture.
"""

from collections.abc import Iterable
from typing import Literal, NamedTuple

import numpy as np

After = Literal["extent", "max"]
"""Where text goes on behind a video: after its rows and columns, as transformers 5.3 and later have it, or after all
of its places, times too, as transformers 4 had it, with which Qwen2-VL and Qwen2.5-VL were trained."""


class Picture(NamedTuple):
    """What stands in the text: its first token, and its grid of tokens; `step`: places from one frame to the next."""

    first: int
    frames: int
    rows: int
    columns: int
    step: float = 1.0

    @property
    def tokens(self) -> int:
        """How many tokens it has."""
        return self.frames * self.rows * self.columns


def places(begin: int, end: int, pictures: Iterable[Picture], *, after: After = "extent") -> np.ndarray:
    """The places of the tokens `[begin, end)`, one document, int64 `[end - begin, 3]`.

    `pictures`: all in it, in their order.

    >>> from ftrain.modules.mrope import Picture, places
    >>> places(0, 7, [Picture(2, frames=1, rows=2, columns=2)]).T.tolist()  # two words, four tokens of a picture, one
    [[0, 1, 2, 2, 2, 2, 4], [0, 1, 2, 2, 3, 3, 4], [0, 1, 2, 3, 2, 3, 4]]
    """
    place_T3 = np.empty((end - begin, 3), np.int64)
    at, now = begin, 0
    for picture in pictures:
        words = np.arange(picture.first - at)[:, None] + now
        place_T3[at - begin : picture.first - begin] = words
        now += len(words)
        at = picture.first + picture.tokens
        here_n3 = _of_picture(picture) + now
        place_T3[picture.first - begin : at - begin] = here_n3
        now = int(here_n3.max()) + 1 if after == "max" else now + max(picture.rows, picture.columns)
    place_T3[at - begin :] = np.arange(end - at)[:, None] + now
    return place_T3


def _of_picture(picture: Picture) -> np.ndarray:
    """Time, row and column of each token, counted from the picture's beginning, `[n, 3]`."""
    time, row, column = np.indices((picture.frames, picture.rows, picture.columns)).reshape(3, -1)
    # in float32, then cut: as transformers does
    return np.stack([(time.astype(np.float32) * np.float32(picture.step)).astype(np.int64), row, column], axis=1)
