"""Objects in the place of a weight: a kernel asks them first, so that a weight need not exist to be multiplied by.

A low-rank sum `w + a @ b` multiplies by its parts; a quantized weight is decoded for the product alone. A kernel that
takes weights is decorated by `asks_stand_ins`; whoever makes such objects derives them from `StandIn`.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


class StandIn:
    """What stands for a weight of a kernel."""

    def run(self, kernel: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The result of `kernel(*args, **kwargs)`, among whose arguments this object is. NotImplementedError for a
        class that does not say how.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say how {kernel.__name__} multiplies by it")


def asks_stand_ins(kernel: Callable[P, R]) -> Callable[P, R]:
    """Decorate a kernel: a call with a `StandIn` among its arguments, or in a list of them, is made by that object.

    >>> from ftrain.kernels.stand_in import StandIn, asks_stand_ins
    >>> class Two(StandIn):
    ...     def run(self, kernel, args, kwargs):
    ...         return kernel(*(2 if a is self else a for a in args), **kwargs)
    >>> @asks_stand_ins
    ... def double(x):
    ...     return 2 * x
    >>> double(Two())
    4
    """

    @functools.wraps(kernel)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        for value in (*args, *kwargs.values()):
            found = _first(value)
            if found is not None:
                result: R = found.run(call, args, kwargs)
                return result
        return kernel(*args, **kwargs)

    return call


def _first(value: Any) -> StandIn | None:
    if isinstance(value, StandIn):
        return value
    if isinstance(value, list | tuple):
        return next((part for part in value if isinstance(part, StandIn)), None)
    return None
