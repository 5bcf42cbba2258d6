"""In which dtype a step computes: masters stay as they are, the loss sees them cast."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Precision:
    """`compute`: the dtype in which `value_and_grad` shows float32 parameters to the loss; `reduce`: of gradient sums.

    The cast is part of the differentiated function, so gradients arrive in the masters' dtype. Names are torch's,
    e.g. "bfloat16".
    """

    compute: str = "float32"
    reduce: str = "float32"

    def __post_init__(self) -> None:
        for field in ("compute", "reduce"):
            name = getattr(self, field)
            dtype = getattr(torch, name, None)
            if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
                raise ValueError(f"Precision({field}={name!r}): not a floating dtype of torch, e.g. 'bfloat16'")


_current: ContextVar[Precision | None] = ContextVar("ftrain_precision", default=None)


@contextmanager
def computing_in(precision: Precision | None) -> Iterator[None]:
    """Within the block parameters are shown to losses in `precision.compute`."""
    token = _current.set(precision)
    try:
        yield
    finally:
        _current.reset(token)


def compute_dtype(leaf: Tensor) -> torch.dtype:
    """The dtype in which a loss sees a parameter: of float32 leaves the compute dtype, of others their own."""
    precision = _current.get()
    if precision is None or leaf.dtype != torch.float32:
        return leaf.dtype
    return getattr(torch, precision.compute)


def reduce_dtype() -> torch.dtype | None:
    """The dtype in which gradients are summed over ranks; None is the gradient's own."""
    precision = _current.get()
    return None if precision is None else getattr(torch, precision.reduce)
