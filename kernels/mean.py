"""A loss as a sum and a count, so that averages over micro-batches and ranks are of tokens, never of averages."""

from collections.abc import Mapping
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from ftrain.kernels.primitive import primitive


def _no_arithmetic(self: tuple, *_: Any) -> NoReturn:
    """A tuple would be joined, repeated or compared part by part."""
    raise ValueError(
        f"a {type(self).__name__} is a sum and a count and takes no part in arithmetic or comparisons: weigh several "
        "losses with ftrain.weighted_sum({'a': a, 'b': b}, {'b': 0.1}), join the same mean of several batches with "
        "Mean.pool([...]), and take its number with .value()"
    )


class Mean(NamedTuple):
    """`total / count` of local numbers, both scalars: `total` differentiable (float), `count` a constant.

    A count is a number of things or a sum of weights, and may be below one. A count of zero makes the value zero with
    zero gradients, so a batch without any label is harmless. `float(mean)`, `mean.item()` and format codes read the
    value, outside of a traced step. Arithmetic is a ValueError: see `weighted_sum` and `Mean.pool`.
    """

    total: Tensor
    count: Tensor  # type: ignore[assignment]  # hides the method of tuple, which nobody needs

    @staticmethod
    def of(value_N: Tensor) -> "Mean":
        """The mean over all elements of a tensor, summed in at least float32."""
        wide = torch.promote_types(value_N.dtype, torch.float32)
        return Mean(value_N.sum(dtype=wide), torch.full((), value_N.numel(), dtype=wide, device=value_N.device))

    @staticmethod
    def pool(means: "list[Mean] | tuple[Mean, ...]") -> "Mean":
        """One mean over what all of them count, such as an evaluation of many batches. ValueError for none."""
        if not means:
            raise ValueError("Mean.pool: there are no means to pool")
        return Mean(torch.stack([m.total for m in means]).sum(), torch.stack([m.count for m in means]).sum())

    def value(self) -> Tensor:
        """The mean over everything the mesh holds (here: of this process' share when nothing is bound)."""
        return WeightedSum((self,), (1.0,)).value()

    def item(self) -> float:
        """The value as a number of Python: not within a traced step, where it is not known yet."""
        return float(self.value())

    def __float__(self) -> float:
        return self.item()

    def __format__(self, spec: str) -> str:
        return format(self.item(), spec) if spec else repr(self)


class WeightedSum(NamedTuple):
    """`sum_i weight_i * mean_i`: the losses of several modalities, whose counts are reduced together, once."""

    terms: tuple[Mean, ...]
    weights: tuple[float, ...]

    def value(self) -> Tensor:
        """The weighted sum of the means, a scalar of at least float32."""
        totals, counts = sum_over_batch(self.totals()), self.counts()
        return self.combine(totals, counts)

    def totals(self) -> Tensor:
        """The total of each term, `[n]`, at least float32."""
        return torch.stack([_wide(t.total) for t in self.terms])

    def counts(self) -> Tensor:
        """The count of each term over the whole batch, `[n]`, at least float32."""
        return sum_over_batch(torch.stack([count_of(t) for t in self.terms]).detach())

    def combine(self, totals_n: Tensor, counts_n: Tensor) -> Tensor:
        """Weigh totals by `weight / count`; a term whose count is zero adds zero, whatever its total."""
        weights_n = torch.stack([torch.full_like(totals_n[0], w) for w in self.weights])
        empty_n = counts_n == 0
        factor_n = weights_n / torch.where(empty_n, 1, counts_n)
        return torch.where(empty_n, 0, torch.where(empty_n, 0, totals_n) * factor_n).sum()


_OPERATORS = ("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "neg", "lt", "le", "gt", "ge")
for _name in _OPERATORS:  # a NamedTuple's body takes fields and methods only
    setattr(Mean, f"__{_name}__", _no_arithmetic)
    setattr(WeightedSum, f"__{_name}__", _no_arithmetic)


def count_of(term: Mean) -> Tensor:
    """The count of a term in the dtype of its total, at least float32: float16 ends at 65,504."""
    return term.count.to(_wide_dtype(term.total))


def share(total: Tensor, count: Tensor) -> Tensor:
    """`total / count` elementwise, and zero where the count is: a guard that leaves counts below one as they are."""
    empty = count == 0
    return torch.where(empty, 0, total / torch.where(empty, 1, count))


def weighted_sum(terms: Mapping[str, Mean], weights: Mapping[str, float]) -> WeightedSum:
    """Weigh the named means; a term without a weight weighs 1, a weight without a term is a modality that is absent."""
    return WeightedSum(tuple(terms.values()), tuple(float(weights.get(name, 1.0)) for name in terms))


@primitive("sum_over_batch")
def sum_over_batch(x: Tensor) -> Tensor:
    """Sum over the ranks that split the batch, and over the micro-batches of `ftrain.accumulate`: the identity for one
    device and one batch."""
    return x


def _wide_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _wide(x: Tensor) -> Tensor:
    return x.to(_wide_dtype(x))
