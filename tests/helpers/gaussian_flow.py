"""Flow matching of normal data, whose velocities, paths, losses and perfect students are known exactly."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Gaussian:
    """Data whose numbers are independent, of one `mean` and `std`."""

    mean: float = 0.0
    std: float = 1.0

    def variance(self, time):
        """Of `(1 - t) data + t noise`; a number, or times of any shape."""
        return (1 - time) ** 2 * self.std**2 + time**2

    def velocity(self, x: Tensor, time_N: Tensor) -> Tensor:
        """The best velocity at `x` `[N, P]`: the mean of noise less data, given `x`."""
        t = time_N[:, None]
        slope = (t - (1 - t) * self.std**2) / self.variance(t)
        return slope * (x - (1 - t) * self.mean) - self.mean

    def loss(self, time):
        """The loss of the best velocity at one time: what of noise less data `x` does not tell."""
        return self.std**2 / self.variance(time)

    def path(self, x: Tensor, time: float, to: float) -> Tensor:
        """Where the exact flow takes `x` from one time to another."""
        ratio = (self.variance(to) / self.variance(time)) ** 0.5
        return (1 - to) * self.mean + ratio * (x - (1 - time) * self.mean)

    def score(self, x: Tensor, time: float) -> Tensor:
        """The gradient of the log density of noisy data."""
        return -(x - (1 - time) * self.mean) / self.variance(time)

    def sample(self, *shape: int, seed: int = 0) -> Tensor:
        """Data in float64."""
        drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return self.mean + self.std * drawn
