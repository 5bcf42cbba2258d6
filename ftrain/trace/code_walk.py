"""The walk through what a function reaches: functions by their code, objects by the attributes that the code names."""

import collections
import contextlib
import functools
import gc
import operator
import os
import sys
import threading
import types
from array import array
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ftrain.trace.attribute_lookup import (
    LIBRARIES,
    attributes_of,
    found_in,
    keys_of,
    positions_with_defaults,
    root_of,
    watch_class,
)
from ftrain.trace.code_reads import Reads, Root, reads_of
from ftrain.trace.held_generators import GENERATORS
from ftrain.trace.own_draws import OF_NUMPY, OF_PYTHON
from ftrain.trace.plain_values import LONGEST, SIMPLE
from ftrain.trace.watched import MISSING, Watched, read_cell

_MOST_VALUES = 20_000  # functions and objects that are looked at
_UNKNOWN = object()
_ITERABLE: tuple[Any, ...] = ((), [], {}, set(), "", range(0), {}.items(), {}.values())
_CONTEXT: Any = type(contextlib.contextmanager(lambda: iter(()))())
_ITERATORS: tuple[type, ...] = (types.GeneratorType, *{type(iter(c)) for c in _ITERABLE})
_UNREAD = {"__init__", "__new__", "__repr__", "__str__", "__del__", "__setattr__", "__delattr__", "__init_subclass__"}
_TABLES = ("_parameters", "_buffers", "_modules")
_HOOKS = tuple(name for name in vars(nn.Module()) if name.endswith("hooks"))
_REGISTRIES = frozenset(vars(nn.Module())) - {"training"}


class CodeWalk:
    """Finds what a function reads: functions by their code, objects by the attributes that the code names."""

    def __init__(self, watched: Watched, slots: list[tuple[dict[str, Any], str, Tensor, str]]) -> None:
        self._watched, self._slots = watched, slots
        self.generators: list[tuple[Any, str]] = []
        self.draws_of_numpy = False
        self._seen: dict[Any, Any] = {}
        self._queue: list[tuple[Any, str]] = []
        self._objects: list[tuple[Any, str]] = []
        self._names: set[str] = set()
        self._any_name = False

    def run(self, fn: Callable[..., Any], *, is_step: bool) -> None:
        """Walk from a function. `is_step`: its arguments are those of a call."""
        name = getattr(fn, "__name__", type(fn).__name__)
        if is_step and isinstance(fn, types.FunctionType):
            self._function(fn, MISSING, name, is_step=True)
        elif is_step and isinstance(fn, types.MethodType) and isinstance(fn.__func__, types.FunctionType):
            self._function(fn.__func__, fn.__self__, name, is_step=True)
        else:
            self._used(fn, name)
        before = (-1, -1, False)
        while True:
            while self._queue:
                self._look_into(*self._queue.pop())
            now = len(self._objects), len(self._names), self._any_name
            if now == before:
                return
            before = now
            for value, name in [*self._objects]:
                self._named(value, name)

    def _is_new(self, *key: Any) -> bool:
        if key in self._seen or len(self._seen) > _MOST_VALUES:
            return False
        self._seen[key] = True
        return True

    # functions

    def _function(self, fn: types.FunctionType, bound: Any, name: str, *, is_step: bool = False) -> None:
        """Watch what a function reads. `bound`: its first argument, if that is known."""
        if not self._is_new("function", id(fn), id(bound)):
            return
        if isinstance(bound, _CONTEXT):  # a decorator, which makes a new one for each call of what it decorates
            if hasattr(bound, "func"):  # one that was entered makes no new one
                self._used(bound.func, name)
            return
        reads, of_library = reads_of(fn.__code__), root_of(fn) in LIBRARIES and not is_step
        for key in ("__defaults__", "__kwdefaults__", "__code__") if not of_library else ():
            if getattr(fn, key) is not None:
                self._watched.slot(fn, key, f"{key} of {name}")
        for value in (*(fn.__defaults__ or ()), *(fn.__kwdefaults__ or {}).values()):
            self._used(value, f"a default of {name}")
        if not of_library:
            self._names |= reads.names
            self._any_name |= reads.any_name
        for key in sorted(reads.inherited) if bound is not MISSING else ():
            _inherited(self, bound, key)
        if of_library:
            for key, cell in zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True):
                self._used(read_cell(cell), key)
        self._chains(fn, bound, reads, of_library=of_library, is_step=is_step)

    def _chains(self, fn: Any, bound: Any, reads: Reads, *, of_library: bool, is_step: bool) -> None:
        for chains, whole in ((reads.wholes, True), (reads.chains, False)):
            for root, attributes in sorted(chains, key=str):
                if root[0] == "argument" and (root[1] != 0 or bound is MISSING):
                    if not of_library and (not is_step or root[1] in positions_with_defaults(fn)):
                        self._names.update(attributes)
                        self._any_name |= whole
                elif not of_library or root[0] == "argument":
                    value, name = _value_of(self._watched, root, fn, bound)
                    self._follow(value, attributes, name, whole=whole)

    def _follow(self, value: Any, attributes: tuple[str, ...], name: str, *, whole: bool) -> None:
        for i, key in enumerate(attributes):
            if isinstance(value, Tensor) or type(value) in SIMPLE:
                break
            value, name = self._attribute(value, key, name), _named_in(value, key, name)
            if value is _UNKNOWN:
                self._names.update(attributes[i + 1 :])
                return
        if whole:
            if type(attributes_of(value)) is dict:
                self._watched.contents(attributes_of(value), f"the attributes of {name}")
            for key in [*attributes_of(value)]:
                self._used(self._attribute(value, key, name), f"{name}.{key}")
        self._used(value, name)

    # attributes

    def _attribute(self, value: Any, key: str, name: str) -> Any:
        """The value of an attribute, which is watched; `_UNKNOWN` if code computes it, which is then looked at."""
        holder, name = name, _named_in(value, key, name)
        if root_of(type(value)) == "logging":  # a logger remembers what it was asked, and gives no numbers
            return MISSING
        if isinstance(value, types.ModuleType):
            if value is os and key in ("environ", "getenv"):
                self._used(os.environ, "os.environ")
            if value is np and key == "random":
                return np.random
            if value is np.random and getattr(getattr(value, key, None), "__self__", None) is OF_NUMPY:
                self.draws_of_numpy = True
            if value.__name__.partition(".")[0] in LIBRARIES:
                return MISSING
            self._watched.entry(value.__dict__, key, name)
            return value.__dict__.get(key, MISSING)
        if isinstance(value, type):
            return _of_class(self, value, key, name)
        if isinstance(value, GENERATORS):
            self._used(value, holder)
            return _UNKNOWN
        raw = found_in(type(value), key)
        if isinstance(raw, property):
            watch_class(self._watched, type(value), key, name)
            return self._computed(raw.fget, value, key)
        if isinstance(raw, types.MemberDescriptorType) or (raw is MISSING and isinstance(value, threading.local)):
            self._watched.slot(value, key, name)
            return getattr(value, key, MISSING)
        attributes = attributes_of(value)
        if type(attributes) is dict:
            if isinstance(value, nn.Module) and key not in attributes:
                for table in _TABLES:
                    if key in attributes.get(table, ()):
                        self._used(value, name)
                        return attributes[table][key]
            self._watched.entry(attributes, key, name)
            if key in attributes:
                return attributes[key]
        if raw is MISSING:
            computes = getattr(type(value), "__getattr__", None)
            if computes is not None and not isinstance(value, nn.Module):
                self._used(value, holder)
            return self._computed(computes, value, key)
        if isinstance(raw, functools.cached_property):
            return self._computed(raw.func, value, key)
        watch_class(self._watched, type(value), key, name)
        return self._bound(raw, value, holder)

    def _bound(self, raw: Any, value: Any, name: str) -> Any:
        """What an attribute of a class is for one of its objects."""
        if isinstance(raw, types.FunctionType):
            return types.MethodType(raw, value)
        if isinstance(raw, classmethod):
            return types.MethodType(raw.__func__, type(value))
        if isinstance(raw, staticmethod):
            return raw.__func__
        if hasattr(type(raw), "__get__"):  # a method in C, or a descriptor of the user's own
            self._used(value, name)
            return self._computed(type(raw).__get__, raw, name)
        return raw

    def _computed(self, fn: Any, value: Any, name: str) -> Any:
        if isinstance(fn, types.FunctionType):
            self._function(fn, value, name)
        return _UNKNOWN

    # objects

    def _used(self, value: Any, name: str) -> None:
        """A value that code uses for something else than its attributes: look at it, once."""
        if type(value) in SIMPLE or value is MISSING or value is _UNKNOWN or root_of(type(value)) == "logging":
            return
        if isinstance(value, Tensor):
            self._watched.gradient(value, name)
        elif isinstance(value, types.MethodType):  # a new object at each look
            self._queue.append((value, name))
        elif self._is_new("value", id(value)):
            self._seen["held", id(value)] = value
            self._queue.append((value, name))

    def _look_into(self, value: Any, name: str) -> None:
        if isinstance(value, types.MethodType):
            if isinstance(value.__func__, types.FunctionType):
                self._function(value.__func__, value.__self__, name)
            else:
                self._used(value.__self__, name)
                self._used(value.__func__, name)
        elif isinstance(value, types.FunctionType):
            self._function(value, MISSING, name)
        elif isinstance(value, types.BuiltinFunctionType):  # a method of a list, or of a generator
            self._used(None if isinstance(value.__self__, types.ModuleType) else value.__self__, name)
        elif isinstance(value, functools.partial):
            _partial(self, value, name)
        elif isinstance(value, operator.attrgetter | operator.methodcaller):
            self._names.update(name for text in value.__reduce__()[1] for name in str(text).split("."))
        elif isinstance(value, classmethod | staticmethod | property):
            self._used(value.fget if isinstance(value, property) else value.__func__, name)
        elif value is OF_NUMPY:
            self.draws_of_numpy = True
        elif isinstance(value, (*GENERATORS, torch.Generator)):
            if isinstance(value, GENERATORS) and value is not OF_PYTHON:
                self.generators.append((value, name))
        elif isinstance(value, np.ndarray | array | bytearray):
            self._watched.array(value, name)
        elif isinstance(value, _ITERATORS) or type(value).__module__ == "itertools":
            self._watched.iterator(name)
        elif isinstance(value, dict | list | tuple | set | frozenset | collections.deque):
            self._container(value, name)
        elif isinstance(value, type(os.environ)):
            self._watched.contents(vars(value)["_data"], name)
        elif isinstance(value, types.MappingProxyType):
            self._used(gc.get_referents(value)[0], name)
        elif isinstance(value, nn.Module):
            _module(self, value, name)
        elif isinstance(value, type):
            self._class(value, name)
        elif isinstance(value, types.ModuleType):
            if value.__name__.partition(".")[0] not in LIBRARIES:
                self._objects.append((value, name))
        elif callable(value) and "__wrapped__" in attributes_of(value):  # a jitted or a cached function
            self._used(attributes_of(value)["__wrapped__"], name)
        elif root_of(type(value)) == "ftrain":  # a function wrapped by the trainer, e.g. by `accumulate`
            for key, inner in attributes_of(value).items():
                self._used(inner, key)
        else:
            self._object(value, name)

    def _container(self, value: Any, name: str) -> None:
        self._watched.contents(value, name)
        if len(value) <= LONGEST:
            for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
                if type(inner) not in SIMPLE:
                    self._used(inner, f"{name}[{key!r}]" if type(key) in SIMPLE else name)
        if type(value).__module__ != "builtins":
            self._object(value, name)

    def _class(self, value: type, name: str) -> None:
        if root_of(value) in LIBRARIES:
            return
        for raw in [*value.__dict__.values()]:
            if isinstance(raw, types.FunctionType) and raw.__name__ in ("__init__", "__new__", "__post_init__"):
                self._function(raw, MISSING, name)
        self._objects.append((value, name))

    def _object(self, value: Any, name: str) -> None:
        """An object of which code may read any attribute that it names, and which operators may ask."""
        self._objects.append((value, name))
        for owner in type(value).__mro__:
            for key, raw in [*owner.__dict__.items()] if owner is not object else ():
                if key.startswith("__") and key not in _UNREAD and isinstance(raw, types.FunctionType):
                    self._function(raw, value, name)

    def _named(self, value: Any, name: str) -> None:
        """Look at the attributes of an object whose names the code loads from something."""
        held = keys_of(value) - (_REGISTRIES if isinstance(value, nn.Module) else frozenset())
        any_name = self._any_name and not isinstance(value, nn.Module | types.ModuleType | type)
        keys = held if any_name else held & self._names
        for owner in type(value).__mro__ if not isinstance(value, types.ModuleType) else ():
            if owner is not nn.Module and (root_of(owner) not in LIBRARIES):
                keys |= set(owner.__dict__) & self._names
        for key in sorted(k for k in keys if self._is_new("named", id(value), k)):
            self._used(self._attribute(value, key, name), _named_in(value, key, name))


def _named_in(value: Any, key: str, name: str) -> str:
    return f"{key} of a {type(value).__name__}" if isinstance(value, nn.Module) else f"{name}.{key}"


def _value_of(watched: Watched, root: Root, fn: types.FunctionType, bound: Any) -> tuple[Any, str]:
    kind, key = root
    if kind == "argument":
        return bound, "self"
    name = str(key)
    if kind == "global":
        if name not in fn.__globals__:
            return MISSING, name
        watched.entry(fn.__globals__, name, name)
        return fn.__globals__[name], name
    if kind == "file":
        return sys.modules.get(name, MISSING), name
    cell = (fn.__closure__ or ())[fn.__code__.co_freevars.index(name)]
    watched.cell(cell, name)
    return read_cell(cell), name


def _inherited(walk: CodeWalk, bound: Any, key: str) -> None:
    """What `super()` may find: an attribute of each class of an object, or of a class."""
    kind = bound if isinstance(bound, type) else type(bound)
    for owner in kind.__mro__:
        raw, is_own = owner.__dict__.get(key, MISSING), root_of(owner) not in LIBRARIES
        if is_own:
            walk._watched.class_entry(owner, key, f"{owner.__name__}.{key}")
        if isinstance(raw, types.FunctionType | property):
            walk._computed(raw.fget if isinstance(raw, property) else raw, bound, key)
        elif isinstance(raw, classmethod):
            walk._used(types.MethodType(raw.__func__, kind), key)
        elif is_own:
            walk._used(raw, key)


def _of_class(walk: CodeWalk, value: type, key: str, name: str) -> Any:
    """The value of an attribute of a class."""
    raw = found_in(value, key)
    watch_class(walk._watched, value, key, name)
    if raw is MISSING:
        computes = found_in(type(value), key)  # a property of the class's own class
        return walk._computed(computes.fget if isinstance(computes, property) else None, value, key)
    if isinstance(raw, classmethod):
        return types.MethodType(raw.__func__, value)
    return raw.__func__ if isinstance(raw, staticmethod) else raw


def _partial(walk: CodeWalk, value: functools.partial[Any], name: str) -> None:
    for i, given in enumerate(value.args):
        walk._used(given, f"argument {i} of {name}")
    walk._container(value.keywords, name)
    if isinstance(value.func, types.FunctionType) and value.args:
        walk._function(value.func, value.args[0], name)
    walk._used(value.func, name)


def _module(walk: CodeWalk, module: nn.Module, name: str) -> None:
    for part in module.modules():
        kind = type(part).__name__
        if part is not module and not walk._is_new("value", id(part)):
            continue
        attributes = vars(part)
        walk._watched.entry(attributes, "training", f"training of a {kind}")
        walk._watched.registry(attributes["_modules"], f"the modules of a {kind}")
        for key in _HOOKS:
            hooks = attributes.get(key)
            if isinstance(hooks, dict):
                walk._watched.registry(hooks, f"{key.strip('_')} of a {kind}")
                for hook in hooks.values():
                    walk._used(hook, key)
        for key in ("_parameters", "_buffers"):
            for inner, tensor in attributes[key].items():
                if isinstance(tensor, Tensor):
                    walk._watched.gradient(tensor, f"{inner} of a {kind}")
                    walk._slots.append((attributes[key], inner, tensor, f"{inner} of a {kind}"))
        forward = attributes.get("forward", getattr(type(part), "forward", None))
        if isinstance(forward, types.FunctionType) and "forward" not in attributes:
            walk._function(forward, part, kind)
        else:
            walk._used(forward, kind)
        walk._objects.append((part, kind))
