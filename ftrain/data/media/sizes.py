"""Which size a picture gets, by the rule of a family of models. Sizes are (height, width) in pixels."""

import math
from dataclasses import dataclass
from typing import Protocol


class SizeRule(Protocol):
    """Gives a picture its size."""

    def size(self, height: int, width: int) -> tuple[int, int]:
        """The new height and width."""


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
class Square:
    """CLIP's and SigLIP's without a crop: one size for all.

    >>> Square(224).size(480, 640)
    (224, 224)
    """

    edge: int

    def size(self, height: int, width: int) -> tuple[int, int]:
        """The new height and width."""
        return self.edge, self.edge


@dataclass(frozen=True)
class Within:
    """As large as fits into `most` pixels on the longer side, never larger than it is.

    >>> Within(320).size(480, 640)
    (240, 320)
    """

    most: int

    def size(self, height: int, width: int) -> tuple[int, int]:
        """The new height and width."""
        scale = min(1.0, self.most / max(height, width))
        return max(1, round(height * scale)), max(1, round(width * scale))
