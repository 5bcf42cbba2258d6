"""Pictures and films as the rows of patches that Qwen's towers read.

F frames, H and W height and width in pixels, P patches, C numbers of a patch.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Patches:
    """How pixels become patches.

    Args:
        patch: pixels of a side of a patch.
        merge: patches of a side of what becomes one token.
        in_time: frames of a patch.
        scale: what a pixel, 0 to 255, is multiplied with before `mean` is taken away and it is divided by `std`, both
            of the three colours.
    """

    patch: int = 14
    merge: int = 2
    in_time: int = 2
    scale: float = 1 / 255
    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)

    @property
    def factor(self) -> int:
        """Pixels of a side of what becomes one token."""
        return self.patch * self.merge

    @property
    def numbers(self) -> int:
        """C, the numbers of a patch."""
        return 3 * self.in_time * self.patch**2

    def grid(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Patches in time, height and width of a film of this size, whose sides are multiples of `factor`.

        >>> Patches().grid(1, 28, 56)
        (1, 2, 4)
        """
        return -(-frames // self.in_time), height // self.patch, width // self.patch

    def tokens(self, grid: tuple[int, int, int]) -> int:
        """Tokens of a film of this grid."""
        return grid[0] * grid[1] * grid[2] // self.merge**2

    def __call__(self, frames: np.ndarray) -> np.ndarray:
        """The patches float32 `[P, C]` of frames uint8 `[F, H, W, 3]`, whose sides are multiples of `factor`.

        Patches of one token lie side by side; where frames are no multiple of `in_time`, the last one comes again.
        """
        lacking = -len(frames) % self.in_time
        frames = np.concatenate([frames, np.repeat(frames[-1:], lacking, 0)]) if lacking else frames
        t, h, w = self.grid(*frames.shape[:3])
        m, p = self.merge, self.patch
        cut = frames.reshape(t, self.in_time, h // m, m, p, w // m, m, p, 3)
        laid = cut.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(t * h * w, 3, -1)
        table = self._table()
        return np.stack([table[colour][laid[:, colour]] for colour in range(3)], 1).reshape(t * h * w, self.numbers)

    def _table(self) -> np.ndarray:
        """What each of the 256 values of a colour becomes, float32 `[3, 256]`."""
        values = (np.arange(256, dtype=np.float64) * self.scale).astype(np.float32)
        mean, std = np.array(self.mean, np.float32), np.array(self.std, np.float32)
        return (values[None] - mean[:, None]) / std[:, None]
