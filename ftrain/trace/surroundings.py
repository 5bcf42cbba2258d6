"""What a function reads beside its arguments and beside tensors: numbers in closures, globals, modules, options.

A jitted function runs its Python once, so such values are constants of the trace, as numbers among the arguments are:
another value must trace again. Which ones there are is read off the code: names of globals and of attributes that it
loads, cells that it closes over, and the same of the functions and modules that it finds there.
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
_MOST = 64  # entries of a container that are looked at
_MISSING = object()
_LIBRARIES = {"ftrain", "torch", "numpy", "optree", *sys.stdlib_module_names} - {"__main__"}


class Watched(NamedTuple):
    """A value that code reads: what it is called, and how to get it now."""

    name: str
    read: Callable[[], Any]


class Surroundings:
    """The values around a function; `now()` is what must be equal for a trace to fit."""

    def __init__(self, fn: Callable) -> None:
        self._held: list[Any] = []  # so that identities stay those of these objects
        self._seen: set[int] = set()
        self._also: set[tuple[int, str]] = set()
        self._watched: list[Watched] = []
        self._training: list[nn.Module] = []
        self._look_at(fn, getattr(fn, "__name__", type(fn).__name__))

    def now(self) -> tuple:
        """The values as they are, comparable and hashable."""
        return (*[read() for _, read in self._watched], *map(_is_training, self._training))

    def also(self, changed: Iterable[tuple[nn.Module, str]]) -> None:
        """Watch these attributes too: a trace has changed them."""
        for module, key in changed:
            if (id(module), key) not in self._also:
                self._also.add((id(module), key))
                self._held.append(module)
                self._watched.append(Watched(f"{key} of a {type(module).__name__}", partial(_attribute, module, key)))

    @property
    def names(self) -> list[str]:
        """What each of the values of `now` is called."""
        modules = [f"training of a {type(module).__name__}" for module in self._training]
        return [*(w.name for w in self._watched), *modules]

    def _look_at(self, value: Any, name: str) -> None:
        """Watch what is read by way of this function, module or object."""
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
        elif type(value) in (list, tuple) and len(value) <= _MOST:  # of functions, such as a decoder's blocks
            for inner in value:
                self._look_at(inner, name)
        elif _root(type(value)) == "ftrain":  # what the trainer makes of a function, such as `accumulate`
            for key, inner in getattr(value, "__dict__", {}).items():
                self._look_at(inner, key)

    def _function(self, fn: types.FunctionType) -> None:
        cells = zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True)
        if _root(fn) in _LIBRARIES:  # only what it was given can change
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
        self._watched.append(Watched(name, lambda: shown(read())))
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
    return shown(getattr(value, key, _MISSING))


def _loaded(code: types.CodeType) -> set[str]:
    """The names of globals and attributes that code loads, that of functions within it included."""
    return set(code.co_names).union(*(_loaded(c) for c in code.co_consts if isinstance(c, types.CodeType)))


def _root(value: Any) -> str:
    """The top-level package that a function or a class is of."""
    module = getattr(value, "__module__", None)
    return module.partition(".")[0] if isinstance(module, str) else ""


def _is_of_a_library(value: Any) -> bool:
    """True for a function or a class that no user changes, and that was given nothing."""
    if isinstance(value, types.FunctionType):
        return _root(value) in _LIBRARIES and not value.__closure__
    return isinstance(value, type) and _root(value) in _LIBRARIES


def is_plain(value: Any) -> bool:
    """True for a simple value, and for a short list, tuple or dict."""
    return type(value) in _SIMPLE or (type(value) in (list, tuple, dict) and len(value) <= _MOST)


def shown(value: Any) -> Any:
    """What is compared of a value: simple ones by value, short containers of these by content, others by identity."""
    kind = type(value)
    if kind is float and math.isnan(value):
        return "nan"
    if kind in _SIMPLE:
        return (kind, value)
    if kind in (list, tuple) and len(value) <= _MOST:
        return (kind, *map(shown, value))
    if kind is dict and len(value) <= _MOST:
        return (kind, *((k, shown(v)) for k, v in _items(value)))
    return id(value)


def _items(mapping: dict) -> Iterator[tuple[Any, Any]]:
    return ((k, v) for k, v in mapping.items() if type(k) in _SIMPLE)
