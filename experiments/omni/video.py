"""Videos: one handwritten digit that moves across a small field of paper, a pure function of the digit and the motion.

Legend: S frames, H rows, W columns, C channels.
"""

from dataclasses import dataclass

import numpy as np

from experiments.omni.digits import PAPER, SIDE

DIRECTIONS = ("left", "right", "up", "down")
_STEPS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}


@dataclass(frozen=True)
class VideoConfig:
    """`frames` frames of `side` x `side` pixels; the digit moves `speed` pixels a frame, through the field's middle."""

    frames: int = 3
    side: int = 12
    speed: int = 1

    def __post_init__(self) -> None:
        least = SIDE + (self.frames - 1) * self.speed
        if self.frames < 2 or self.speed < 1 or self.side < least or (self.side - least) % 2:
            raise ValueError(
                f"VideoConfig(frames={self.frames}, side={self.side}, speed={self.speed}): needs at least 2 frames, a "
                f"speed of at least 1, and a side of {least}, {least + 2}, ... for a digit of {SIDE} pixels to stay in "
                "view on a way with the same room before and after it"
            )


def moving(image_HWC: np.ndarray, direction: str, *, cfg: VideoConfig) -> np.ndarray:
    """A video float32 `[S, H, W, C]` of the image moving `direction`, one of `DIRECTIONS`."""
    if direction not in _STEPS:
        raise ValueError(f"direction={direction!r} is not one of {DIRECTIONS}")
    down, right = _STEPS[direction]
    room, travel = cfg.side - SIDE, (cfg.frames - 1) * cfg.speed
    video_SHWC = np.full((cfg.frames, cfg.side, cfg.side, image_HWC.shape[-1]), PAPER, np.float32)
    for frame in range(cfg.frames):
        ahead = 2 * frame * cfg.speed - travel  # in half pixels, from the middle of the way
        row, column = (room + down * ahead) // 2, (room + right * ahead) // 2
        video_SHWC[frame, row : row + SIDE, column : column + SIDE] = image_HWC
    return video_SHWC
