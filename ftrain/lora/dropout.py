"""Dropout of what a delta reads, from a key: a row's numbers are the same on any mesh and when it is recomputed."""

from dataclasses import dataclass
from functools import partial

from torch import Tensor

from ftrain.kernels import random
from ftrain.kernels.pack import draw_over_batch


@dataclass(frozen=True)
class Dropped:
    """Each number of a layer's input is dropped with probability `rate`, and the others are scaled by `1 / (1 - rate)`.

    `key`: int64 `[2]`, of this layer.
    """

    key: Tensor
    rate: float

    def of(self, x: Tensor) -> Tensor:
        """What is left of the input, rows or a batch of rows first: the same shape and dtype."""
        if x.dim() < 2:
            return x
        dim = 1 if x.dim() == 3 and x.shape[0] == 1 else 0  # one pack, or rows
        draw = partial(random.bernoulli, p=1 - self.rate)
        kept = draw_over_batch(draw, self.key, tuple(x.shape), dim=dim)
        return x * (kept.to(x.dtype) / (1 - self.rate))
