"""What a document costs to train on, so that packs with equal numbers of tokens can have equal work.

n tokens of a document, N documents.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

CostOf = Callable[[np.ndarray], np.ndarray]
"""From the lengths of documents, int64 `[N]`, to what each costs, float64 `[N]`, in any one unit."""


@dataclass(frozen=True)
class Cost:
    """`linear * n + quadratic * n**2`: what a token costs wherever it is, and what attention costs.

    Any unit will do; costs that rows bring themselves (`Group.cost`: encoders of media) are in the same one.

    >>> Cost(linear=1.0, quadratic=0.5)(np.array([2, 4])).tolist()
    [4.0, 12.0]
    """

    linear: float = 1.0
    quadratic: float = 0.0

    def __post_init__(self) -> None:
        """ValueError for a price below zero, or where nothing costs anything."""
        if self.linear < 0 or self.quadratic < 0 or self.linear + self.quadratic <= 0:
            raise ValueError(
                f"Cost(linear={self.linear}, quadratic={self.quadratic}): prices are at least 0, and one is above 0"
            )

    def __call__(self, lengths: np.ndarray) -> np.ndarray:
        """What documents of these lengths, int64 `[N]`, cost each: float64 `[N]`."""
        n = np.asarray(lengths, np.float64)
        return self.linear * n + self.quadratic * n * n

    @staticmethod
    def of_sizes(*, parameters: int, layers: int, width: int) -> "Cost":
        """In FLOPs of a forward pass of a causal decoder.

        - `parameters`: those that a token is multiplied with (of experts only the chosen ones; no token table).
        - `layers`: those with attention; `width`: query heads times head dim of one of them.

        A token meets each parameter in one multiplication and one addition, and in each layer `n / 2` tokens before it
        on average, once for scores and once for values.

        >>> Cost.of_sizes(parameters=10, layers=3, width=4)
        Cost(linear=20.0, quadratic=24.0)
        """
        return Cost(linear=2.0 * parameters, quadratic=2.0 * layers * width)

    @staticmethod
    def of_width(width: int) -> "Cost":
        """Of a usual decoder of this width, whose layers have `12 * width**2` parameters, in units of one token.

        >>> Cost.of_width(1024)(np.array([12288])).tolist()
        [24576.0]
        """
        return Cost(linear=1.0, quadratic=1.0 / (12 * width))
