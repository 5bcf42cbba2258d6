"""A loss as a sum and a count, so that averages over micro-batches and ranks are of tokens, never of averages."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.primitive import primitive


class Mean(NamedTuple):
    """`total / count` of local numbers, both scalars: `total` differentiable (float), `count` a constant.

    A count of zero makes the value zero with zero gradients, so a batch without any label is harmless.
    """

    total: Tensor
    count: Tensor  # type: ignore[assignment]  # hides the method of tuple, which nobody needs

    @staticmethod
    def of(value_N: Tensor) -> "Mean":
        """The mean over all elements of a tensor."""
        count = torch.full((), value_N.numel(), dtype=torch.float32, device=value_N.device)
        return Mean(value_N.sum(), count)

    def value(self) -> Tensor:
        """The mean over everything the mesh holds (here: of this process' share when nothing is bound)."""
        return WeightedSum((self,), (1.0,)).value()


class WeightedSum(NamedTuple):
    """`sum_i weight_i * mean_i`: the losses of several modalities, whose counts are reduced together, once."""

    terms: tuple[Mean, ...]
    weights: tuple[float, ...]

    def value(self) -> Tensor:
        """The weighted sum of the means, a scalar."""
        totals, counts = sum_over_batch(torch.stack([t.total for t in self.terms])), self.counts()
        return self.combine(totals, counts)

    def counts(self) -> Tensor:
        """The count of each term over the whole batch, `[n]`."""
        return sum_over_batch(torch.stack([t.count.to(t.total.dtype) for t in self.terms]).detach())

    def combine(self, totals_n: Tensor, counts_n: Tensor) -> Tensor:
        """Weigh totals by `weight / count`; a zero count gives zero."""
        weights_n = torch.stack([torch.full_like(totals_n[0], w) for w in self.weights])
        return (totals_n * (weights_n / counts_n.clamp(min=1))).sum()


def weighted_sum(terms: Mapping[str, Mean], weights: Mapping[str, float]) -> WeightedSum:
    """Weigh the named means; a term without a weight weighs 1, a weight without a term is a modality that is absent."""
    return WeightedSum(tuple(terms.values()), tuple(float(weights.get(name, 1.0)) for name in terms))


@primitive("sum_over_batch")
def sum_over_batch(x: Tensor) -> Tensor:
    """Sum over the ranks that split the batch: the identity on one device."""
    return x
