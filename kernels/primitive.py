"""Primitives: kernels that a trace can rebind, so that a plan can change how they run without touching model code.

`ftrain.jit` binds the few that matter to layout (attention, experts, embedding lookup, loss reduction, merge of
modalities) to their sharded forms while it traces. In eager code the stack of bindings is empty and a primitive is the
plain function it decorates.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

_bindings: ContextVar[tuple[Mapping[str, Callable[..., Any]], ...]] = ContextVar("ftrain_bindings", default=())


def primitive(name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Make the decorated function rebindable under `name`; the plain function stays reachable as `.local`, and what a
    call would run here and now as `.bound()`, for a binding that does something before it.

    >>> from ftrain.kernels.primitive import bind, primitive
    >>> @primitive("double")
    ... def double(x):
    ...     return 2 * x
    >>> with bind({"double": lambda x: f"2 * {x}, elsewhere"}):
    ...     double(3)
    '2 * 3, elsewhere'
    >>> double(3)
    6
    """

    def decorate(local: Callable[P, R]) -> Callable[P, R]:
        def bound() -> Callable[P, R]:
            return next((layer[name] for layer in reversed(_bindings.get()) if name in layer), local)

        @functools.wraps(local)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            return bound()(*args, **kwargs)

        call.local = local  # type: ignore[attr-defined]
        call.bound = bound  # type: ignore[attr-defined]
        return call

    return decorate


@contextmanager
def bind(bindings: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """Within the block, calls of the primitives named in `bindings` go to its functions; inner blocks win over outer
    ones.
    """
    token = _bindings.set((*_bindings.get(), bindings))
    try:
        yield
    finally:
        _bindings.reset(token)
