"""Sizes of clips: which of a run's sizes a video gets, and its frames at that size.

F frames, H and W height and width in pixels.
"""

import math
import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as nnf
from torch import Tensor

from ftrain.data.rejects import BadRow
from ftrain.data.sample import Place

Resize = Literal["crop", "stretch", "refuse"]
_WRITTEN = re.compile(r"([1-9]\d{0,4})x([1-9]\d{0,4})x([1-9]\d{0,4})")


class Size(NamedTuple):
    """Of a clip: frames, rows and columns of pixels."""

    frames: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.frames}x{self.height}x{self.width}"


class Grid(NamedTuple):
    """What sizes a model takes: frames are a multiple of `time` and one more, height and width multiples of `side`."""

    time: int
    side: int

    def fault(self, size: Size) -> str:
        """What is wrong with a size, and the nearest smaller one that is right; empty where nothing is.

        >>> Grid(4, 16).fault(Size(80, 480, 832))
        '80x480x832: frames must be 4 k + 1, and height and width multiples of 16: 77x480x832 would do'
        """
        frames = (size.frames - 1) // self.time * self.time + 1
        height, width = (max(self.side, n // self.side * self.side) for n in size[1:])
        right = Size(frames, height, width)
        if right == size:
            return ""
        return (
            f"{size}: frames must be {self.time} k + 1, and height and width multiples of {self.side}: {right} would do"
        )


def sizes_of(written: Sequence[str], grid: Grid) -> tuple[Size, ...]:
    """Sizes written as "81x480x832": frames, height, width. ValueError for other words, for sizes that the model cannot
    take, and for one that is there twice.

    >>> sizes_of(["81x480x832"], Grid(4, 16))
    (Size(frames=81, height=480, width=832),)
    """
    found = list[Size]()
    for words in written:
        match = _WRITTEN.fullmatch(words)
        if match is None:
            raise ValueError(f"--sizes {words}: write frames x height x width, such as 81x480x832")
        size = Size(*map(int, match.groups()))
        fault = grid.fault(size)
        if fault or size in found:
            raise ValueError(f"--sizes {fault or f'{words} is there twice'}")
        found.append(size)
    return tuple(found)


def chosen(sizes: Sequence[Size], *, frames: int, height: int, width: int, place: Place) -> Size:
    """The size that a video of so many frames gets: of those with the most frames that it has, the one of the nearest
    shape; of equal shapes the largest that is not larger than it, or else the smallest. BadRow where it is too short.

    >>> sizes = (Size(17, 64, 96), Size(17, 96, 64), Size(5, 64, 96))
    >>> chosen(sizes, frames=30, height=1280, width=720, place=Place("a.mp4", 1))
    Size(frames=17, height=96, width=64)
    """
    fits = [size for size in sizes if size.frames <= frames]
    if not fits:
        least = min(size.frames for size in sizes)
        raise BadRow(place, "too short", f"it has {frames} frames at this rate, and the shortest size asks {least}")
    most = max(size.frames for size in fits)

    def rank(size: Size) -> tuple[float, bool, int]:
        pixels, larger = size.height * size.width, size.height > height or size.width > width
        return round(abs(math.log(size.height * width / (size.width * height))), 6), larger, pixels * (larger or -1)

    return min((size for size in fits if size.frames == most), key=rank)


def fitted(frames_FHWC: np.ndarray, size: Size, *, resize: Resize, place: Place) -> Tensor:
    """Frames uint8 `[F, H, W, 3]` as numbers in [-1, 1], float32 `[3, F, H, W]` of the size.

    - `resize`: "crop" scales until both sides are covered, and cuts the middle out; "stretch" scales each side;
      "refuse" takes frames of this size alone. Scaling is bilinear, over all pixels that a new one covers.

    BadRow for another number of frames, and where "refuse" does so.
    """
    frames, height, width = frames_FHWC.shape[:3]
    if frames != size.frames or (resize == "refuse" and (height, width) != size[1:]):
        found = Size(frames, height, width)
        raise BadRow(place, "another size", f"it is {found}, not {size}: take --resize crop or stretch")
    pixels_FCHW = torch.from_numpy(np.require(frames_FHWC, requirements=["C", "W"])).permute(0, 3, 1, 2)
    if (height, width) != size[1:]:
        scale = max(size.height / height, size.width / width)
        covers = (max(size.height, round(height * scale)), max(size.width, round(width * scale)))
        to = size[1:] if resize == "stretch" else covers
        parts = [  # a frame at a time: floats of a long film would take four times its room
            nnf.interpolate(x[None].float(), to, mode="bilinear", antialias=True)[0].round().clamp(0, 255).byte()
            for x in pixels_FCHW
        ]
        top, left = (to[0] - size.height) // 2, (to[1] - size.width) // 2
        pixels_FCHW = torch.stack(parts)[:, :, top : top + size.height, left : left + size.width]
    return (pixels_FCHW.float() / 127.5 - 1).transpose(0, 1).contiguous()
