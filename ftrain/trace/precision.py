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


_SHORT = {"bf16": "bfloat16", "fp32": "float32", "fp64": "float64", "fp16": "float16", "half": "float16"}
_KNOWN = ("float32", "bfloat16", "float64")


@dataclass(frozen=True)
class Precision:
    """`compute`: the dtype in which `value_and_grad` shows float32 parameters to the loss; `reduce`: of gradient sums.

    The cast is part of the differentiated function, so gradients arrive in the masters' dtype. Each is "bfloat16",
    "float32" or "float64", or "bf16", "fp32", "fp64", or torch's dtype. ValueError for any other: float16 needs a
    scaled loss and float8 scaled products, and neither is here.
    """

    compute: str = "float32"
    reduce: str = "float32"

    def __post_init__(self) -> None:
        for field in ("compute", "reduce"):
            object.__setattr__(self, field, _dtype_name(getattr(self, field), f"Precision({field}=...)"))

    @staticmethod
    def of(value: "Precision | str | torch.dtype | None") -> "Precision | None":
        """A `Precision` as it is, or one that computes in a dtype or in the dtype of a name; ValueError for others."""
        if value is None or isinstance(value, Precision):
            return value
        return Precision(compute=_dtype_name(value, "precision"))

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


def _dtype_name(value: str | torch.dtype, of: str) -> str:
    """The name of one of the dtypes in which a step can compute."""
    name = str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value
    name = _SHORT.get(name, name) if isinstance(name, str) else name
    if name in _KNOWN:
        return name
    if name == "float16":
        raise ValueError(
            f"{of}: float16 ends at 65,504 and at 6e-8, so gradients are lost without a scaled loss, which is not "
            "here: take 'bfloat16', which has the range of float32"
        )
    if isinstance(name, str) and name.startswith("float8"):
        raise ValueError(f"{of}: {name} needs scaled products, which are not here: take 'bfloat16'")
    known = ", ".join(repr(k) for k in _KNOWN)
    raise ValueError(f"{of}: {value!r} is not one of {known}, or torch's dtype, as in ftrain.Precision('bfloat16')")
