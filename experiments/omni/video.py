"""Videos: one handwritten digit that moves across a small black field, a pure function of the digit and the motion.

Legend: S frames, H rows, W columns, C channels.
"""

from dataclasses import dataclass

import numpy as np

from experiments.omni.digits import CLASSES, PAPER, SIDE

DIRECTIONS = ("left", "right", "up", "down")
_STEPS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}

# Each digit's word and each direction's word is trained on, these pairs of them never are.
HELD_OUT_MOTIONS = frozenset({(1, "left"), (4, "right"), (6, "up"), (8, "down")})


@dataclass(frozen=True)
class VideoConfig:
    """`frames` frames of `side` x `side` pixels; the digit moves one pixel per frame."""

    frames: int = 4
    side: int = 12

    def __post_init__(self) -> None:
        if self.frames < 2 or self.side < SIDE + self.frames - 1:
            raise ValueError(
                f"a digit of {SIDE} pixels that moves in {self.frames} frames needs at least 2 frames and a side of "
                f"{SIDE + self.frames - 1}, got a side of {self.side}"
            )


def moving(image_HWC: np.ndarray, direction: str, rng: np.random.Generator, *, cfg: VideoConfig) -> np.ndarray:
    """A video float32 `[S, H, W, C]` of the image moving `direction`, from a random place that keeps it in view."""
    if direction not in _STEPS:
        raise ValueError(f"direction={direction!r} is not one of {DIRECTIONS}")
    room, travel = cfg.side - SIDE, cfg.frames - 1
    place = []
    for step in _STEPS[direction]:
        first, last = (travel, room) if step < 0 else (0, room - travel) if step > 0 else (0, room)
        place.append(int(rng.integers(first, last + 1)))
    video_SHWC = np.full((cfg.frames, cfg.side, cfg.side, image_HWC.shape[-1]), PAPER, np.float32)
    down, right = _STEPS[direction]
    for frame in range(cfg.frames):
        row, column = place[0] + frame * down, place[1] + frame * right
        video_SHWC[frame, row : row + SIDE, column : column + SIDE] = image_HWC
    return video_SHWC


def trained_directions(digit: int) -> tuple[str, ...]:
    """The directions in which this digit moves in training."""
    if not 0 <= digit < CLASSES:
        raise ValueError(f"digit={digit} is not one of 0 to {CLASSES - 1}")
    return tuple(direction for direction in DIRECTIONS if (digit, direction) not in HELD_OUT_MOTIONS)
