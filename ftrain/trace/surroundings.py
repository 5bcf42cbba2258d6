"""The values that a function reads besides its arguments and tensors: in closures, globals, modules and options.

A jitted function runs its Python code once, so such values are constants of the trace, like numbers among the
arguments: another value needs another trace. They are found from the code: the names of the globals and attributes that
it loads, the variables that it closes over, and the same of the functions and modules found there.
"""

import math
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from operator import attrgetter
from typing import Any, NamedTuple

from torch import Tensor, nn

_SIMPLE = (bool, int, float, complex, str, bytes, type(None))
_MOST = 64  # entries of a container that is compared by value
_MISSING = object()
_LIBRARIES = {"ftrain", "torch", "numpy", "optree", *sys.stdlib_module_names} - {"__main__"}


class Watched(NamedTuple):
    """A value that code reads: its name for messages, and a function that reads it now, in comparable form."""

    name: str
    read: Callable[[], Any]


class Surroundings:
    """The values that a function reads besides its arguments. `now()` is a part of the key of its traces."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        self._held: list[Any] = []  # so that no other object gets their identities
        self._seen: set[int] = set()
        self._also: set[tuple[int, str]] = set()
        self._watched: list[Watched] = []
        self._training: list[nn.Module] = []
        self._look_at(fn, getattr(fn, "__name__", type(fn).__name__))

    def now(self) -> tuple[Any, ...]:
        """The current values, in comparable and hashable form."""
        return (*[read() for _, read in self._watched], *map(_is_training, self._training))

    def watch_attributes(self, changed: Iterable[tuple[nn.Module, str]]) -> None:
        """Watch these attributes too (module and name), which a trace has changed."""
        for module, key in changed:
            if (id(module), key) not in self._also:
                self._also.add((id(module), key))
                self._held.append(module)
                self._watched.append(Watched(f"{key} of a {type(module).__name__}", partial(_attribute, module, key)))

    @property
    def names(self) -> list[str]:
        """The name of each value of `now`, for messages."""
        modules = [f"training of a {type(module).__name__}" for module in self._training]
        return [*(w.name for w in self._watched), *modules]

    def _look_at(self, value: Any, name: str) -> None:
        """Watch the values that are read through this function, module or object."""
        if id(value) in self._seen or isinstance(value, Tensor | type | types.ModuleType | types.BuiltinFunctionType):
            return
        self._seen.add(id(value))
        self._held.append(value)
        if isinstance(value, types.MethodType):
            self._look_at(value.__func__, name)
            self._attributes(value.__self__, _loaded(value.__func__.__code__), "self")
        elif isinstance(value, partial):
            self._look_at(value.func, name)
        elif isinstance(value, types.FunctionType):
            self._function(value)
        elif isinstance(value, nn.Module):
            self._module(value)
        elif type(value) in (list, tuple) and len(value) <= _MOST:  # functions in a list, such as a decoder's blocks
            for inner in value:
                self._look_at(inner, name)
        elif _root(type(value)) == "ftrain":  # a function wrapped by the trainer, e.g. by `accumulate`
            for key, inner in getattr(value, "__dict__", {}).items():
                self._look_at(inner, key)

    def _function(self, fn: types.FunctionType) -> None:
        cells = zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True)
        if _root(fn) in _LIBRARIES:  # only its closure can change
            for name, cell in cells:
                self._look_at(_content(cell), name)
            return
        loaded = _loaded(fn.__code__)
        for name, cell in cells:
            self._watch(name, partial(_content, cell), loaded)
        for name in sorted(loaded & set(fn.__globals__)):
            self._watch(name, partial(fn.__globals__.get, name, _MISSING), loaded)

    def _watch(self, name: str, read: Callable[[], Any], loaded: set[str]) -> None:
        value = read()
        if isinstance(value, types.ModuleType | types.BuiltinFunctionType) or _is_of_a_library(value):
            return
        self._held.append(value)
        self._watched.append(Watched(name, lambda: comparable(read())))
        self._look_at(value, name)
        if not isinstance(value, (nn.Module, types.FunctionType, types.MethodType, Tensor, *_SIMPLE)):
            self._attributes(value, loaded, name)

    def _attributes(self, value: Any, loaded: set[str], name: str) -> None:
        """The attributes of an object, or of a class, that the code loads by name."""
        if isinstance(value, nn.Module):
            self._look_at(value, name)
            return
        for key in sorted(loaded & set(getattr(value, "__dict__", ()))):
            found = value.__dict__[key]
            if isinstance(found, types.FunctionType) and isinstance(value, type):
                continue  # a method
            self._held.append(found)
            self._watched.append(Watched(f"{name}.{key}", partial(_attribute, value, key)))
            self._look_at(found, f"{name}.{key}")

    def _module(self, module: nn.Module) -> None:
        for part in module.modules():
            self._training.append(part)
            forward = getattr(type(part).forward, "__code__", None)
            numbers = {k for k, v in vars(part).items() if is_plain(v) and k != "training"}
            for key in sorted(numbers & (_loaded(forward) if forward is not None else set())):
                self._watched.append(Watched(f"{key} of a {type(part).__name__}", partial(_attribute, part, key)))


_is_training = attrgetter("training")


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not bound yet
        return _MISSING


def _attribute(value: Any, key: str) -> Any:
    return comparable(getattr(value, key, _MISSING))


def _loaded(code: types.CodeType) -> set[str]:
    """The names of globals and attributes that code loads, nested functions included."""
    return set(code.co_names).union(*(_loaded(c) for c in code.co_consts if isinstance(c, types.CodeType)))


def _root(value: Any) -> str:
    """The top-level package of a function or a class."""
    module = getattr(value, "__module__", None)
    return module.partition(".")[0] if isinstance(module, str) else ""


def _is_of_a_library(value: Any) -> bool:
    """True for a function without closure, or a class, of a library, which no user changes."""
    if isinstance(value, types.FunctionType):
        return _root(value) in _LIBRARIES and not value.__closure__
    return isinstance(value, type) and _root(value) in _LIBRARIES


def is_plain(value: Any) -> bool:
    """True for None, a bool, number, str or bytes, and for a list, tuple or dict of at most 64 entries."""
    return type(value) in _SIMPLE or (type(value) in (list, tuple, dict) and len(value) <= _MOST)


def comparable(value: Any) -> Any:
    """The form of a value that is compared: simple values and short containers by value, other objects by identity.

    >>> from ftrain.trace.surroundings import comparable
    >>> comparable([1, 2.0]) == comparable([1, 2.0]), comparable([1]) == comparable([True])
    (True, False)
    """
    kind = type(value)
    if kind is float and math.isnan(value):
        return "nan"
    if kind in _SIMPLE:
        return (kind, value)
    if kind in (list, tuple) and len(value) <= _MOST:
        return (kind, *map(comparable, value))
    if kind is dict and len(value) <= _MOST:
        return (kind, *((k, comparable(v)) for k, v in _items(value)))
    return id(value)


def _items(mapping: dict[Any, Any]) -> Iterator[tuple[Any, Any]]:
    return ((k, v) for k, v in mapping.items() if type(k) in _SIMPLE)
