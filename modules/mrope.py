"""Places of tokens among pictures on three axes, time, row and column (M-RoPE, Qwen2-VL, arXiv 2409.12191).

Text counts up on all axes at once, and so does sound, a token at a time. A picture's tokens stay at one time and have
the rows and columns of its grid, all counted from where the picture stands; a video's also go on in time. Numpy on the
host.

Legend: T tokens, n tokens of a picture.
"""

from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

import numpy as np

After = Literal["extent", "max"]
"""Where text goes on behind a video: after its rows and columns, as transformers 5.3 and later have it, or after all
of its places, times too, as transformers 4 had it, with which Qwen2-VL and Qwen2.5-VL were trained."""


class Picture(NamedTuple):
    """What stands in the text: its first token, and its grid of tokens; `step * rate`: places from one frame to the
    next, multiplied in this order.
    """

    first: int
    frames: int
    rows: int
    columns: int
    step: float = 1.0
    rate: float = 1.0

    @property
    def tokens(self) -> int:
        """How many tokens it has."""
        return self.frames * self.rows * self.columns

    def places(self, kind: type[np.generic]) -> np.ndarray:
        """Time, row and column of each token, counted from the picture's beginning, `[n, 3]` of that dtype."""
        time, row, column = np.indices((self.frames, self.rows, self.columns)).reshape(3, -1)
        # in float32, then cut to whole numbers: as transformers does
        seconds_n = time.astype(np.float32) * np.float32(self.step) * np.float32(self.rate)
        return np.stack([seconds_n.astype(kind), row.astype(kind), column.astype(kind)], axis=1)

    def behind(self, here_n3: np.ndarray, now: Any, after: After) -> Any:
        """Where text goes on behind it: it begins at `now`, and its tokens are `here_n3`."""
        return here_n3.max() + here_n3.dtype.type(1) if after == "max" else now + max(self.rows, self.columns)


class Scene(NamedTuple):
    """A video and its sound, whose tokens are mixed: the first token, their places from its beginning on, `[n, 3]`, and
    how many of the last ones decide where text goes on: behind the largest place of theirs.
    """

    first: int
    own_n3: np.ndarray
    last: int

    @property
    def tokens(self) -> int:
        """How many tokens it has."""
        return len(self.own_n3)

    def places(self, kind: type[np.generic]) -> np.ndarray:
        """The places, `[n, 3]` of that dtype."""
        return self.own_n3.astype(kind)

    def behind(self, here_n3: np.ndarray, now: Any, after: After) -> Any:
        """As of a `Picture`; all scenes go by their places."""
        del now, after
        return here_n3[-self.last :].max() + here_n3.dtype.type(1)


def places(
    begin: int, end: int, items: Iterable[Picture | Scene], *, after: After = "extent", exact: bool = False
) -> np.ndarray:
    """The places of the tokens `[begin, end)`, one document, int64 `[end - begin, 3]`, or `exact` float32, with times
    that are no whole numbers.

    `items`: all pictures in it, in their order.

    >>> from ftrain.modules.mrope import Picture, places
    >>> places(0, 7, [Picture(2, frames=1, rows=2, columns=2)]).T.tolist()  # two words, four tokens of a picture, one
    [[0, 1, 2, 2, 2, 2, 4], [0, 1, 2, 2, 3, 3, 4], [0, 1, 2, 3, 2, 3, 4]]
    """
    kind: type[np.generic] = np.float32 if exact else np.int64
    place_T3 = np.empty((end - begin, 3), kind)
    at = begin
    now: Any = np.zeros((), kind)[()]
    for item in items:
        words = np.arange(item.first - at).astype(kind)[:, None] + now
        place_T3[at - begin : item.first - begin] = words
        now = now + words.dtype.type(len(words))
        at = item.first + item.tokens
        here_n3 = item.places(kind) + now
        place_T3[item.first - begin : at - begin] = here_n3
        now = here_n3.dtype.type(item.behind(here_n3, now, after))
    place_T3[at - begin :] = np.arange(end - at).astype(kind)[:, None] + now
    return place_T3
