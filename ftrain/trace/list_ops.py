"""Splits `torch._foreach_*` functions into one call per tensor, for lists with pieces of arrays."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

_PREFIX = "_foreach_"
_NAMES = {"norm": torch.linalg.vector_norm, "max": torch.amax, "copy_": Tensor.copy_}


def one_by_one(
    func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]] | None:
    """For each tensor of the lists, the function of one tensor with its arguments.

    None if `func` is not a `torch._foreach_*` function, or has no form for one tensor.
    """
    name = getattr(func, "__name__", "")
    if not name.startswith(_PREFIX) or not args or not isinstance(args[0], list | tuple):
        return None
    single = name.removeprefix(_PREFIX)
    function = _NAMES.get(single) or getattr(Tensor if single.endswith("_") else torch, single, None)
    if function is None:
        return None
    count = len(args[0])

    def at(value: Any, i: int) -> Any:
        return value[i] if isinstance(value, list | tuple) and len(value) == count else value

    options = {"value" if key == "scalars" else key: value for key, value in kwargs.items()}
    return [
        _single(function, single, tuple(at(a, i) for a in args), {k: at(v, i) for k, v in options.items()})
        for i in range(count)
    ]


def _single(
    function: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    """One call. A positional scalar of `addcmul` and `addcdiv` becomes the keyword `value`."""
    if name.rstrip("_") in ("addcmul", "addcdiv") and len(args) > 3:
        return function, args[:3], {**kwargs, "value": args[3]}
    return function, args, kwargs
