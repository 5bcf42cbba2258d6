"""Attributes of objects and classes, looked up without a call of any code of theirs."""

import sys
import types
from collections.abc import Mapping
from typing import Any

from ftrain.trace.watched import MISSING, Watched

LIBRARIES = {"ftrain", "torch", "numpy", "optree", *sys.stdlib_module_names} - {"__main__"}
"""Top-level packages whose own code and classes are taken to stay as they are."""

_NONE: Mapping[str, Any] = types.MappingProxyType({})


def root_of(value: Any) -> str:
    """The top-level package of a function or a class."""
    module = getattr(value, "__module__", None)
    return module.partition(".")[0] if isinstance(module, str) else ""


def attributes_of(value: Any) -> Any:
    """The `__dict__` of an object, without a call of its own `__getattr__`; empty if it has none."""
    try:
        return object.__getattribute__(value, "__dict__")
    except AttributeError:
        return _NONE


def keys_of(value: Any) -> set[str]:
    """The names of the attributes that an object holds; for a class, those of the user's classes among its bases too.

    >>> from ftrain.trace.attribute_lookup import keys_of
    >>> First = type("First", (), {"rate": 0.5, "__module__": "a_file_of_the_user"})
    >>> "rate" in keys_of(type("Second", (First,), {}))
    True
    """
    if not isinstance(value, type):
        return set(attributes_of(value))
    return {key for owner in value.__mro__ if root_of(owner) not in LIBRARIES for key in owner.__dict__}


def found_in(kind: type, key: str) -> Any:
    """An attribute as the class that has it holds it, e.g. a property; `MISSING` if no class of `kind`'s has it."""
    return next((owner.__dict__[key] for owner in kind.__mro__ if key in owner.__dict__), MISSING)


def watch_class(watched: Watched, kind: type, key: str, name: str) -> None:
    """Watch an attribute that a class may have from a base: in each class up to the one that has it."""
    for owner in kind.__mro__:
        if root_of(owner) not in LIBRARIES:
            watched.class_entry(owner, key, name)
        if key in owner.__dict__:
            return


def positions_with_defaults(fn: types.FunctionType) -> range:
    """The positions of the arguments that a call may leave out."""
    code = fn.__code__
    return range(code.co_argcount - len(fn.__defaults__ or ()), code.co_argcount + code.co_kwonlyargcount)
