"""YaRN: frequencies of rotary positions for texts longer than those of pretraining.

Fast frequencies stay, slow ones are divided, and between them the division fades along the ladder of frequencies; all
cosines and sines are enlarged a little, which sharpens attention over long texts.

Legend: F frequencies. Source: Peng et al., arXiv 2309.00071; as in gpt-oss and DeepSeek-V3.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class YarnScaling:
    """How frequencies are stretched, by `factor` where they are slow.

    - `factor`: what slow frequencies are divided by, at least 1.
    - `original_length`: tokens of a text of pretraining.
    - `fast_turns`, `slow_turns`: a frequency that turns oftener than `fast_turns` over the original length stays, one
      that turns less than `slow_turns` is divided.
    - `whole_places`: the fade begins and ends at whole places of the ladder.
    - `amplitude`: of cosines and sines (see `sharpening`).

    ValueError for a factor below 1, other numbers that are not positive, and `slow_turns` not below `fast_turns`.
    """

    factor: float
    original_length: int
    fast_turns: float = 32.0
    slow_turns: float = 1.0
    whole_places: bool = True
    amplitude: float = 1.0

    def __post_init__(self) -> None:
        sizes = self.factor >= 1 and self.original_length > 0 and self.amplitude > 0
        if not (sizes and 0 < self.slow_turns < self.fast_turns):
            raise ValueError(
                f"{self}: factor must be at least 1, original_length and amplitude positive, and slow_turns less than "
                "fast_turns"
            )

    def apply(self, ladder_F: Tensor, base: float) -> Tensor:
        """The scaled frequencies, `[F]`, in radians per token, of a ladder that falls from 1 towards 1 / `base`."""
        places = len(ladder_F)
        first, last = (self._place(turns, places, base) for turns in (self.fast_turns, self.slow_turns))
        if self.whole_places:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, 2 * places - 1)
        last = last if last != first else last + 0.001
        place_F = torch.arange(places, dtype=ladder_F.dtype, device=ladder_F.device)
        divided_F = ((place_F - first) / (last - first)).clamp(0, 1)
        return ladder_F * (1 - divided_F + divided_F / self.factor)

    def _place(self, turns: float, places: int, base: float) -> float:
        """Where in the ladder a frequency turns so often over the original length."""
        return places * math.log(self.original_length / (2 * math.pi * turns)) / math.log(base)


def sharpening(factor: float, strength: float = 1.0) -> float:
    """The enlargement for texts `factor` times as long: `0.1 * strength * log(factor) + 1`; 1 up to a factor of 1.

    >>> from ftrain.kernels.yarn import sharpening
    >>> round(sharpening(32.0), 4)
    1.3466
    """
    return 0.1 * strength * math.log(factor) + 1 if factor > 1 else 1.0
