"""A loss as a sum and a count, so that averages over micro-batches and ranks are of tokens, never of averages."""

from collections.abc import Mapping
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from ftrain.kernels.primitive import primitive


def _no_arithmetic(self: tuple[Any, ...], *_: Any) -> NoReturn:
    """A tuple would be joined, repeated or compared part by part."""
    raise ValueError(
        f"a {type(self).__name__} is a sum and a count and takes no part in arithmetic or comparisons: weigh several "
        "losses with ftrain.weighted_sum({'a': a, 'b': b}, {'b': 0.1}), join the same mean of several batches with "
        "Mean.pool([...]), and take its number with .value()"
    )


class Mean(NamedTuple):
    """A loss as `total / count`, which `ftrain.value_and_grad` differentiates and a mesh sums before it divides.

    - `total`: 0-d floating, the sum of what is averaged (nats of tokens, squared errors of pixels); differentiable.
    - `count`: 0-d, a constant: how many things were summed, or the sum of their weights. It may be below one.

    A count of zero makes the value zero with zero gradients, so a batch without any label is harmless. `float(mean)`,
    `mean.item()` and format codes read the value, outside of a traced step. Arithmetic and comparisons raise
    ValueError: see `weighted_sum` and `Mean.pool`.

    >>> import torch
    >>> from ftrain import Mean
    >>> loss = Mean(total=torch.tensor(6.0), count=torch.tensor(4.0))
    >>> f"{loss:.2f}"
    '1.50'
    """

    total: Tensor
    count: Tensor  # type: ignore[assignment]  # hides the method of tuple, which nobody needs

    @staticmethod
    def of(value_N: Tensor) -> "Mean":
        """The mean over all elements of a tensor of any shape: `total` and `count` in at least float32. ValueError for
        a Python number.

        >>> Mean.of(torch.tensor([1.0, 2.0, 6.0])).item()
        3.0
        """
        if not isinstance(value_N, Tensor):
            raise ValueError(f"Mean.of({value_N!r}): give a tensor of all that is averaged")
        wide = torch.promote_types(value_N.dtype, torch.float32)
        return Mean(value_N.sum(dtype=wide), torch.full((), value_N.numel(), dtype=wide, device=value_N.device))

    @staticmethod
    def pool(means: "list[Mean] | tuple[Mean, ...]") -> "Mean":
        """One mean over what all of them count, such as an evaluation of many batches. ValueError for none.

        Totals and counts are summed apart, so a batch with more labels weighs more.

        >>> few, many = Mean.of(torch.tensor([4.0])), Mean.of(torch.tensor([1.0, 1.0, 1.0]))
        >>> Mean.pool([few, many]).item()
        1.75
        """
        if not means:
            raise ValueError("Mean.pool: there are no means to pool")
        return Mean(torch.stack([m.total for m in means]).sum(), torch.stack([m.count for m in means]).sum())

    def value(self) -> Tensor:
        """The mean over everything that the mesh holds, 0-d, at least float32 and differentiable in `total`.

        Outside of a step on a mesh it is the mean of this process's share.
        """
        return WeightedSum((self,), (1.0,)).value()

    def item(self) -> float:
        """The value as a Python float. Within a traced step it is not known yet, which is a ValueError there."""
        return float(self.value())

    def __float__(self) -> float:
        return self.item()

    def __format__(self, spec: str) -> str:
        return format(self.item(), spec) if spec else repr(self)


class WeightedSum(NamedTuple):
    """`sum_i weight_i * mean_i`: the losses of several modalities, whose counts are summed over the mesh in one
    message.

    `weighted_sum` makes one. Like a `Mean` it may be returned by a loss; arithmetic on it raises ValueError.
    """

    terms: tuple[Mean, ...]
    weights: tuple[float, ...]

    def value(self) -> Tensor:
        """The weighted sum of the means over everything that the mesh holds: 0-d, at least float32, differentiable."""
        totals, counts = sum_over_batch(self.totals()), self.counts()
        return self.combine(totals, counts)

    def item(self) -> float:
        """The value as a Python float. Within a traced step it is not known yet, which is a ValueError there."""
        return float(self.value())

    def __float__(self) -> float:
        return self.item()

    def __format__(self, spec: str) -> str:
        return format(self.item(), spec) if spec else repr(self)

    def totals(self) -> Tensor:
        """The total of each term on this rank, `[n]`, at least float32."""
        return torch.stack([_wide(t.total) for t in self.terms])

    def counts(self) -> Tensor:
        """The count of each term over the whole batch of the mesh, `[n]`, at least float32 and without a gradient."""
        return sum_over_batch(torch.stack([count_of(t) for t in self.terms]).detach())

    def combine(self, totals_n: Tensor, counts_n: Tensor) -> Tensor:
        """`sum_i weight_i * totals_i / counts_i`, 0-d; a term whose count is zero adds zero, whatever its total (NaN
        included).
        """
        weights_n = torch.stack([torch.full_like(totals_n[0], w) for w in self.weights])
        empty_n = counts_n == 0
        factor_n = weights_n / torch.where(empty_n, 1, counts_n)
        return torch.where(empty_n, 0, torch.where(empty_n, 0, totals_n) * factor_n).sum()


_OPERATORS = ("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "neg", "lt", "le", "gt", "ge")
for _name in _OPERATORS:  # a NamedTuple's body takes fields and methods only
    setattr(Mean, f"__{_name}__", _no_arithmetic)
    setattr(WeightedSum, f"__{_name}__", _no_arithmetic)


def count_of(term: Mean) -> Tensor:
    """The count of a term in the dtype of its total, 0-d, at least float32: float16 ends at 65,504."""
    return term.count.to(_wide_dtype(term.total))


def share(total: Tensor, count: Tensor) -> Tensor:
    """`total / count` elementwise for tensors of one shape, and zero where the count is zero. Counts below one stay as
    they are, since zero alone is guarded.
    """
    empty = count == 0
    return torch.where(empty, 0, total / torch.where(empty, 1, count))


def mean_where(x_N: Tensor, counted_N: Tensor) -> Mean:
    """The mean of `x_N` `[N]` over the entries that are counted (bool `[N]`); what the others hold is not read.

    >>> import torch
    >>> from ftrain.kernels.mean import mean_where
    >>> mean_where(torch.tensor([1.0, 5.0, 3.0]), torch.tensor([True, False, True])).item()
    2.0
    """
    return Mean(torch.where(counted_N, x_N, 0).sum(), counted_N.sum().to(x_N.dtype))


def weighted_sum(terms: Mapping[str, Mean], weights: Mapping[str, float]) -> WeightedSum:
    """The sum of named means, each times its weight: `terms` maps a name to its mean, `weights` a name to a number.

    A term without a weight weighs 1. A weight without a term belongs to a modality that is absent from the batch, and
    is left out.

    >>> import torch
    >>> from ftrain import Mean, weighted_sum
    >>> text, audio = Mean.of(torch.tensor([2.0, 4.0])), Mean.of(torch.tensor([10.0]))
    >>> weighted_sum({"text": text, "audio": audio}, {"audio": 0.1, "video": 1.0}).value().item()
    4.0
    """
    return WeightedSum(tuple(terms.values()), tuple(float(weights.get(name, 1.0)) for name in terms))


@primitive("sum_over_batch")
def sum_over_batch(x: Tensor) -> Tensor:
    """The sum of a tensor of any shape over the ranks that split the batch, and over the micro-batches of
    `ftrain.accumulate`. On one device with one batch it is the identity.

    A loss may use it as on one device, in each row too (`h - sum_over_batch(h.sum(0)) / rows`): gradients are summed
    over the ranks as well.
    """
    return x


def _wide_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _wide(x: Tensor) -> Tensor:
    return x.to(_wide_dtype(x))
