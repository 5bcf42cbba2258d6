"""Films of moving real digits as packed rows, and the words that tell what moves where.

Legend: B films, N rows (B times those of a film), P numbers in a row, W words of a film, S frames, H rows of pixels,
W columns, C channels.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from experiments.omni.digits import CLASSES, Digits, enlarge, split
from experiments.omni.video import DIRECTIONS, VideoConfig, moving

WORDS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", *DIRECTIONS, "anything",
)  # fmt: skip
NOTHING = len(WORDS) - 1
"""The word that stands for a dropped condition."""
PATCH = 4


@dataclass(frozen=True)
class Film:
    """The size of a film; a row is a square of `PATCH` pixels of a frame, and rows come frame by frame."""

    video: VideoConfig = field(default_factory=VideoConfig)

    @property
    def squares(self) -> int:
        """Rows of a frame."""
        return (self.video.side // PATCH) ** 2

    @property
    def rows(self) -> int:
        """Rows of a film."""
        return self.video.frames * self.squares

    def to_rows(self, films_BSHW: np.ndarray) -> np.ndarray:
        """Pixels to rows float32 `[N, P]`."""
        B, S, side, _ = films_BSHW.shape
        each = side // PATCH
        cut = films_BSHW.reshape(B, S, each, PATCH, each, PATCH).transpose(0, 1, 2, 4, 3, 5)
        return np.ascontiguousarray(cut.reshape(-1, PATCH * PATCH), np.float32)

    def to_films(self, rows_NP: np.ndarray) -> np.ndarray:
        """Rows back to pixels `[B, S, H, W]`."""
        each, S = self.video.side // PATCH, self.video.frames
        cut = rows_NP.reshape(-1, S, each, each, PATCH, PATCH).transpose(0, 1, 2, 4, 3, 5)
        return cut.reshape(-1, S, self.video.side, self.video.side)

    def positions(self, films: int) -> Tensor:
        """Frame, row and column of each row, int64 `[3, N]`."""
        each, S = self.video.side // PATCH, self.video.frames
        at = np.indices((S, each, each)).reshape(3, -1)
        return torch.from_numpy(np.tile(at, films))


class Batch(NamedTuple):
    """Films as rows float32 `[N, P]`, and their words int64 `[B, 2]`: the digit and the way that it moves."""

    rows_NP: Tensor
    words_BW: Tensor


@dataclass(frozen=True)
class Source:
    """Digits to make films of, each as often as any other."""

    digits: Digits
    film: Film

    def batch(self, size: int, *, seed: int, number: int) -> Batch:
        """Batch `number`: a pure function of it and the seed."""
        rng = np.random.Generator(np.random.Philox(key=np.array([seed, number], np.uint64)))
        places = rng.integers(len(self.digits.labels_N), size=size)
        ways = rng.integers(len(DIRECTIONS), size=size)
        films = np.stack(
            [
                moving(self.digits.images_NHWC[place], DIRECTIONS[way], cfg=self.film.video)[..., 0]
                for place, way in zip(places, ways, strict=True)
            ]
        )
        words = np.stack([self.digits.labels_N[places], CLASSES + ways], 1)
        return Batch(torch.from_numpy(self.film.to_rows(films)), torch.from_numpy(words.astype(np.int64)))


def sources(film: Film, *, copies: int, seed: int) -> tuple[Source, Source]:
    """Films to train on, of digits and `copies` bent versions of each, and films of writers that are held out."""
    trained, held_out = split()
    return Source(enlarge(trained, copies=copies, seed=seed), film), Source(held_out, film)


def all_words(copies: int) -> Tensor:
    """Every digit with every way, so many times, int64 `[B, 2]`."""
    each = [(digit, CLASSES + way) for digit in range(CLASSES) for way in range(len(DIRECTIONS))]
    return torch.tensor(each * copies)
