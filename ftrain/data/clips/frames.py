"""Frames of a video at a rate, from its beginning, its middle, or all of it piece by piece.

F frames.
"""

import math
from typing import Literal

import numpy as np

from ftrain.data.media.film_frames import FilmHeader
from ftrain.data.rejects import BadRow
from ftrain.data.sample import Place

Cut = Literal["first", "middle", "all"]


def there_are(header: FilmHeader, *, fps: float, place: Place) -> int:
    """How many frames a video has at this rate; `fps` 0: as it is. BadRow for a video that has fewer a second.

    >>> there_are(FilmHeader(frames=60, rate=30.0, height=2, width=2), fps=16.0, place=Place("a.mp4", 1))
    32
    """
    if not fps:
        return header.frames
    if header.rate < fps * 0.999:
        told = f"it has {header.rate:g} frames a second, fewer than --fps {fps:g}: frames are not made up"
        raise BadRow(place, "too few frames a second", told)
    return math.floor((header.frames - 1) * fps / header.rate + 1e-6) + 1


def numbers_of(header: FilmHeader, frames: int, *, fps: float, cut: Cut, there: int) -> list[np.ndarray]:
    """Numbers of the frames of each clip of a video, int64 `[F]` each: the first at or after each moment.

    - `frames`: F. `there`: as many as `there_are`. `cut`: one clip from the beginning or the middle, or all whole ones.

    >>> header = FilmHeader(frames=60, rate=30.0, height=2, width=2)
    >>> numbers_of(header, 5, fps=15.0, cut="first", there=30)[0].tolist()
    [0, 2, 4, 6, 8]
    """
    starts = {"first": [0], "middle": [(there - frames) // 2], "all": range(0, there - frames + 1, frames)}[cut]
    step = header.rate / fps if fps else 1.0
    return [np.ceil((start + np.arange(frames)) * step - 1e-6).astype(np.int64) for start in starts]
