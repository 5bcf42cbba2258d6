"""In which dtype a step computes: masters stay as they are, the loss sees them cast."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ftrain import tree

Choice = Literal["auto", "float32", "bfloat16"]
"""What a command line offers; "auto" is bfloat16 on CUDA and float32 elsewhere."""


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

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype."""
        return getattr(torch, self.compute)

    def cast(self, params: Any) -> Any:
        """Parameters as losses see them: float32 leaves in the compute dtype, others as they are.

        For what runs outside of a step, such as generation; inside of one see `ftrain.forward`.
        """
        return tree.map(lambda leaf: leaf.to(self.dtype) if leaf.dtype == torch.float32 else leaf, params)


def precision_on(device: torch.device, choice: str = "auto") -> Precision:
    """The precision that a command line chose, for a run on `device`. ValueError if it is not one of `Choice`."""
    if choice not in get_args(Choice):
        raise ValueError(f"--precision {choice!r} is not one of {', '.join(get_args(Choice))}")
    by_device = "bfloat16" if device.type == "cuda" else "float32"
    return Precision(compute=by_device if choice == "auto" else choice)


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
    return precision.dtype


def reduce_dtype() -> torch.dtype | None:
    """The dtype in which gradients are summed over ranks; None is the gradient's own."""
    precision = _current.get()
    return None if precision is None else getattr(torch, precision.reduce)
