"""Which size a picture gets, by the rule of a family of models. Sizes are (height, width) in pixels."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Multiples:
    """Qwen-VL's: both sides are multiples of `factor`, and pixels between two bounds, with the shape kept closely.

    >>> Multiples(factor=28).size(480, 640)
    (476, 644)
    """

    factor: int = 28
    least_pixels: int = 56 * 56
    most_pixels: int = 14 * 14 * 4 * 1280
    most_ratio: float = 200.0

    def size(self, height: int, width: int) -> tuple[int, int]:
        """The new height and width. ValueError for a picture that is too long for its width."""
        if max(height, width) > self.most_ratio * min(height, width):
            raise ValueError(
                f"a picture of {height} x {width}: a side is more than {self.most_ratio:g} times the other"
            )
        high, wide = (round(side / self.factor) * self.factor for side in (height, width))
        if high * wide > self.most_pixels:
            scale = math.sqrt(height * width / self.most_pixels)
            high, wide = (max(self.factor, self._down(side / scale)) for side in (height, width))
        elif high * wide < self.least_pixels:
            scale = math.sqrt(self.least_pixels / (height * width))
            high, wide = (math.ceil(side * scale / self.factor) * self.factor for side in (height, width))
        return high, wide

    def _down(self, side: float) -> int:
        return math.floor(side / self.factor) * self.factor


@dataclass(frozen=True)
class MultiplesInTime:
    """Qwen3-VL's of films: as `Multiples`, with the pixels of all frames between the bounds.

    >>> MultiplesInTime(factor=32, least_pixels=0, most_pixels=200_000).of_film(4, 480, 640)
    (192, 256)
    """

    factor: int
    least_pixels: int
    most_pixels: int
    in_time: int = 2
    most_ratio: float = 200.0

    def of_film(self, frames: int, height: int, width: int) -> tuple[int, int]:
        """The new height and width of a film of so many frames. ValueError for one that is too long for its width."""
        if min(height, width) < self.factor:
            scale = max(self.factor / height, self.factor / width)
            height, width = int(height * scale), int(width * scale)
        if max(height, width) > self.most_ratio * min(height, width):
            raise ValueError(f"a film of {height} x {width}: a side is more than {self.most_ratio:g} times the other")
        frames = max(frames, self.in_time)
        even, all_pixels = round(frames / self.in_time) * self.in_time, frames * height * width
        high, wide = (round(side / self.factor) * self.factor for side in (height, width))
        if even * high * wide > self.most_pixels:
            scale = math.sqrt(all_pixels / self.most_pixels)
            high, wide = (max(self.factor, math.floor(s / scale / self.factor) * self.factor) for s in (height, width))
        elif even * high * wide < self.least_pixels:
            scale = math.sqrt(self.least_pixels / all_pixels)
            high, wide = (math.ceil(side * scale / self.factor) * self.factor for side in (height, width))
        return high, wide
