"""The dtypes in which a step computes: master parameters keep their dtype, and the loss gets them cast."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ftrain import tree
from ftrain.sharding.paths import Rules, match

Choice = Literal["auto", "float32", "bfloat16"]
"""The choices of a command line; "auto" is bfloat16 on CUDA and float32 elsewhere."""


_SHORT = {"bf16": "bfloat16", "fp32": "float32", "fp64": "float64", "fp16": "float16", "half": "float16"}
_KNOWN = ("float32", "bfloat16", "float64")


@dataclass(frozen=True)
class Precision:
    """The dtypes of compute and of gradient sums in a step.

    - `compute`: the dtype to which `value_and_grad` casts float32 parameters for the loss. The cast is part of the
      differentiated function, so gradients have the dtype of the parameters.
    - `reduce`: the dtype in which gradients are summed over ranks.
    - `keep`: globs of the parameters that stay as they are (`ftrain.sharding.paths.match`), by their path in the
      argument that is differentiated: what a family computes in float32, as
      `ftrain.modules.families.wan_config.keep_float32` says.

    Each is "bfloat16", "float32" or "float64", a short name ("bf16", "fp32", "fp64"), or a torch dtype; the attribute
    holds the full name. ValueError for any other: float16 needs loss scaling and float8 needs scaled products, which
    ftrain does not have; in a step for a glob that no parameter has.

    >>> import torch
    >>> import ftrain
    >>> precision = ftrain.Precision("bf16")
    >>> precision
    Precision(compute='bfloat16', reduce='float32', keep=())
    >>> precision.cast({"w": torch.ones(2), "steps": torch.tensor(3)})
    {'w': tensor([1., 1.], dtype=torch.bfloat16), 'steps': tensor(3)}
    """

    compute: str = "float32"
    reduce: str = "float32"
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for field in ("compute", "reduce"):
            object.__setattr__(self, field, _dtype_name(getattr(self, field), f"Precision({field}=...)"))

    @staticmethod
    def of(value: "Precision | str | torch.dtype | None") -> "Precision | None":
        """A `Precision` from a dtype or its name; a `Precision` and None are returned as they are.

        ValueError for a dtype in which a step cannot compute.
        """
        if value is None or isinstance(value, Precision):
            return value
        return Precision(compute=_dtype_name(value, "precision"))

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype."""
        return getattr(torch, self.compute)

    def cast(self, params: Any) -> Any:
        """The tree with float32 leaves cast to the compute dtype; other leaves are the same.

        For code outside of a step, such as generation. Inside of a step use `ftrain.forward`.
        """
        return tree.map_with_path(lambda path, x: x.to(self.dtype) if self.casts(path, x) else x, params)

    def casts(self, path: str, leaf: Tensor) -> bool:
        """True for a parameter, of any shape, that a loss gets in the compute dtype."""
        return leaf.dtype == torch.float32 and not any(match(path, glob) for glob in self.keep)


def precision_on(device: torch.device, choice: str = "auto") -> Precision:
    """The precision of a run on `device` for a command line's `choice`, one of `Choice`; ValueError for another."""
    if choice not in get_args(Choice):
        raise ValueError(f"--precision {choice!r} is not one of {', '.join(get_args(Choice))}")
    by_device = "bfloat16" if device.type == "cuda" else "float32"
    return Precision(compute=by_device if choice == "auto" else choice)


_current: ContextVar[Precision | None] = ContextVar("ftrain_precision", default=None)
_seen: ContextVar[set[str] | None] = ContextVar("ftrain_precision_seen", default=None)


@contextmanager
def computing_in(precision: Precision | None) -> Iterator[None]:
    """Within the block `precision` is that of the step under way; None for that of the parameters.

    ValueError after it for a glob of `keep` that no parameter of the step has.
    """
    paths = set[str]()
    tokens = _current.set(precision), _seen.set(paths)
    try:
        yield
    finally:
        _current.reset(tokens[0])
        _seen.reset(tokens[1])
    if precision is not None and precision.keep and paths:
        Rules(dict.fromkeys(precision.keep, True), of="Precision(keep=...)").require_used(sorted(paths))


def compute_dtype(leaf: Tensor, path: str) -> torch.dtype:
    """The dtype that a loss gets for a parameter of any shape: the compute dtype for float32, else its own.

    `path`: of the parameter in the tree that the loss takes.
    """
    precision, seen = _current.get(), _seen.get()
    if seen is not None:
        seen.add(path)
    return leaf.dtype if precision is None or not precision.casts(path, leaf) else precision.dtype


def reduce_dtype() -> torch.dtype | None:
    """The dtype in which gradients are summed over ranks; None for the gradient's own."""
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
            f"{of}: float16 holds magnitudes from 6e-8 to 65,504, so gradients are lost without loss scaling, which "
            "ftrain does not have: use 'bfloat16', which has the range of float32"
        )
    if isinstance(name, str) and name.startswith("float8"):
        raise ValueError(f"{of}: {name} needs scaled products, which ftrain does not have: use 'bfloat16'")
    known = ", ".join(repr(k) for k in _KNOWN)
    raise ValueError(f"{of}: {value!r} is not one of {known}, or the torch dtype, as in ftrain.Precision('bfloat16')")
