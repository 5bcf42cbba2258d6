"""A step as a method of a class, as a copy, and in a pickle: the same options, made again for another function."""

import copy
import types
from collections.abc import Callable
from typing import Any

from ftrain.step.compile import name_of


class Remade:
    """What makes a step again from its function and options, without its traces."""

    def __init__(
        self, fn: Callable[..., Any], remake: Callable[[Callable[..., Any]], Any] | None, *, is_method: bool
    ) -> None:
        """`remake`: makes a step of another function with the same options. `is_method`: `fn` looks like a method."""
        self._fn, self._remake, self._is_method = fn, remake, is_method

    def __set_name__(self, kind: type, name: str) -> None:
        """Note that the function is a method: it was defined in the body of the class `kind`."""
        self._is_method |= getattr(self._fn, "__qualname__", "") == f"{kind.__qualname__}.{name_of(self._fn)}"

    def __get__(self, owner: Any, kind: type | None = None) -> Any:
        """The step of an object, if this is a jitted method. Each object has a step, and traces, of its own. ValueError
        for an object that has no `__dict__` to keep it in.

        >>> import torch, ftrain
        >>> class Trainer:
        ...     rate = 0.5
        ...     @ftrain.jit(donate="state")
        ...     def step(self, state, batch):
        ...         return state - self.rate * batch
        >>> Trainer().step(torch.ones(2), torch.ones(2))
        tensor([0.5000, 0.5000])
        """
        if owner is None or self._remake is None or not self._is_method:
            return self
        kept = getattr(owner, "__dict__", None)
        if not isinstance(kept, dict):
            raise ValueError(
                f"{name_of(self._fn)} is a jitted method, and a {type(owner).__name__} has no __dict__ to keep its "
                "traces in: give its class one (no __slots__), or jit a plain function of the numbers that it reads"
            )
        key = f"_jitted_{name_of(self._fn)}"
        found = kept.get(key)
        if not isinstance(found, Remade) or not found._is_of(self._fn, owner):
            found = kept[key] = self._remake(types.MethodType(self._fn, owner))
        return found

    def _is_of(self, fn: Callable[..., Any], owner: Any) -> bool:
        """True for a step of the method `fn` of `owner`; not so where `owner` is a copy of another object."""
        method = self._fn
        return isinstance(method, types.MethodType) and method.__self__ is owner and method.__func__ is fn

    def __reduce__(self) -> Any:
        """A step is pickled as its function and options, without its traces."""
        return super().__reduce__() if self._remake is None else (self._remake, (self._fn,))

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A step of a copy of the function, without its traces; a plain function is not copied, as always."""
        if self._remake is None:
            return self
        return self._remake(copy.deepcopy(self._fn, memo))
