"""Places where values are held (attributes, globals, variables of closures, containers) and what they held when a step
was traced.

Every call asks whether all of them hold the same, so the question is asked in C: first whether each place holds the
same object; only what differs is compared as a value.
"""

import marshal
import types
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain, repeat
from operator import attrgetter, is_
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from ftrain.graph.torch_memory import plain_functions
from ftrain.trace.plain_values import LONGEST, SIMPLE, form_of, forms_of

MISSING = object()
"""What a place without a value holds."""

_LARGEST_ARRAY = 2**16  # bytes of the largest array of numpy that is compared by value
_of_proxy: Callable[..., Any] = types.MappingProxyType.get
_content_of = attrgetter("cell_contents")
_requires_gradient = attrgetter("requires_grad")
_kind_of = attrgetter("dtype", "shape")


class Change(NamedTuple):
    """A value that is another one now: its name, and both values where they are plain, else `MISSING`."""

    name: str
    was: Any = MISSING
    now: Any = MISSING


class Watched:
    """Places and what they hold. What is added is remembered as it is at that moment."""

    def __init__(self) -> None:
        self._groups = tuple(_Places(read) for read in _READERS)
        self._dicts, self._classes, self._cells, self._slots = self._groups
        self._plain, self._tensors = _Plain(), _Tensors()
        self._lists, self._tables = _Contents(_entries), _Contents(_keys_and_values)
        self._empty: list[dict[Any, Any]] = []
        self._empty_names: list[str] = []
        self._arrays: list[tuple[Any, bytes, str]] = []
        self._iterators: list[str] = []
        self._known: dict[Any, Any] = {}
        self._checks: list[Callable[[], bool]] | None = None

    def entry(self, mapping: dict[str, Any], key: str, name: str, *, holds: Any = MISSING) -> None:
        """Watch an entry of a dict of names: of a module's globals, or of an object's attributes. `holds`: what it is
        taken to hold, if not what it holds now.
        """
        if self._is_new("entry", mapping, key):
            found = mapping.get(key, MISSING) if holds is MISSING else holds
            self._dicts.add((mapping, key), found, name)
            _watch_value(self, found, name)

    def class_entry(self, owner: type, key: str, name: str) -> None:
        """Watch an attribute of a class."""
        if self._is_new("class", owner, key):
            found = owner.__dict__.get(key, MISSING)
            self._classes.add((owner.__dict__, key), found, name)
            _watch_value(self, found, name)

    def cell(self, cell: types.CellType, name: str) -> None:
        """Watch a variable that a function closes over."""
        if self._is_new("cell", cell, None):
            found = read_cell(cell)
            self._cells.add((cell,), found, name)
            _watch_value(self, found, name)

    def slot(self, owner: Any, key: str, name: str) -> None:
        """Watch an attribute of an object that is no entry of its dict: a slot, or one of a type in C."""
        if self._is_new("slot", owner, key):
            found = getattr(owner, key, MISSING)
            self._slots.add((owner, key), found, name)
            _watch_value(self, found, name)

    def contents(self, container: Any, name: str) -> None:
        """Watch what a list, dict, set or deque holds."""
        if type(container) in (tuple, frozenset) or len(container) > LONGEST or not self._is_new("in", container, None):
            return
        if type(container) in (list, dict, set) and form_of(container) is not None:
            self._plain.add(container, name)
        else:
            (self._tables if isinstance(container, dict) else self._lists).add(container, name)

    def registry(self, registry: dict[Any, Any], name: str) -> None:
        """Watch the hooks or the submodules of a module. Most have none, which is asked of all of them at once."""
        if registry:
            self.contents(registry, name)
        elif self._is_new("registry", registry, None):
            self._empty.append(registry)
            self._empty_names.append(name)

    def array(self, array: Any, name: str) -> None:
        """Watch the numbers in an array of numpy or of Python or in a bytearray, if they are few."""
        of_numpy = isinstance(array, np.ndarray)
        nbytes = array.nbytes if of_numpy else memoryview(array).nbytes
        if nbytes <= _LARGEST_ARRAY and not (of_numpy and array.dtype.hasobject) and self._is_new("array", array, None):
            self._arrays.append((array, _bytes_of(array), name))

    def gradient(self, tensor: Tensor, name: str) -> None:
        """Watch whether a tensor (of any shape) requires a gradient."""
        if self._is_new("tensor", tensor, None):
            self._tensors.add(tensor, name)

    def captured(self, tensors: Iterable[Tensor]) -> None:
        """Watch the dtypes and shapes of tensors that the graph reads."""
        self._tensors.capture(tensors)
        self._checks = None

    def iterator(self, name: str) -> None:
        """Note an iterator, which gives another value each time."""
        self._iterators.append(name)

    def unchanged(self) -> bool:
        """True if every place holds what it held."""
        if self._checks is None:
            self._checks = [*_needed_checks(self)]
        return all(check() for check in self._checks)

    def changes(self) -> Iterator[Change]:
        """What is another value now."""
        for name in self._iterators:
            yield Change(name)
        for places in self._groups:
            yield from places.changes()
        yield from self._plain.changes()
        yield from (Change(name) for contents in (self._lists, self._tables) for name in contents.changes())
        yield from (Change(name) for registry, name in zip(self._empty, self._empty_names, strict=True) if registry)
        yield from self._tensors.changes()
        yield from (Change(name) for array, numbers, name in self._arrays if _bytes_of(array) != numbers)

    @property
    def names(self) -> list[str]:
        """The names of the places, for messages."""
        return [name for places in self._groups for name in places.names]

    def _is_new(self, kind: str, owner: Any, key: Any) -> bool:
        if (kind, id(owner), key) in self._known:
            return False
        self._known[kind, id(owner), key] = owner  # held, so that no other object gets its identity
        self._checks = None
        return True


def _watch_value(watched: Watched, value: Any, name: str) -> None:
    if type(value) in (list, dict, set):
        watched._plain.hold(value)
        watched.contents(value, name)


def _needed_checks(watched: Watched) -> Iterator[Callable[[], bool]]:
    """The checks of what there is, since every call makes them."""
    if watched._iterators:
        yield lambda: False
    for places in watched._groups:
        if places.names:
            yield partial(places.unchanged, watched._plain.accept)
    if watched._plain.names:
        yield watched._plain.unchanged
    if watched._empty:
        yield lambda: not any(watched._empty)
    yield from (contents.unchanged for contents in (watched._lists, watched._tables) if contents.names)
    if watched._tensors.any:
        yield watched._tensors.unchanged
    if watched._arrays:
        yield lambda: all(_bytes_of(array) == numbers for array, numbers, _ in watched._arrays)


class _Plain:
    """Containers that are compared by value, all of them at once."""

    def __init__(self) -> None:
        self._values: list[Any] = []
        self._forms: list[bytes] = []
        self.names: list[str] = []
        self._holders: Counter[int] = Counter()
        self._at: dict[int, int] = {}

    def add(self, value: Any, name: str) -> None:
        form = form_of(value)
        assert form is not None
        self._at[id(value)] = len(self._values)
        self._values.append(value)
        self._forms.append(form)
        self.names.append(name)

    def hold(self, value: Any) -> None:
        """Note one more place that holds a value."""
        self._holders[id(value)] += 1

    def unchanged(self) -> bool:
        return forms_of(self._values) == self._forms

    def changes(self) -> Iterator[Change]:
        for value, form, name in zip(self._values, self._forms, self.names, strict=True):
            if form_of(value) != form:
                yield Change(name, marshal.loads(form), value)

    def accept(self, was: Any, now: Any) -> bool:
        """True if a place may hold `now` instead of `was`: an equal plain value, which is watched in its stead."""
        at = self._at.get(id(was))
        if at is None:
            return type(was) is type(now) and type(now) not in (list, dict, set) and _equal(was, now)
        if type(was) is not type(now) or self._holders[id(was)] > 1 or form_of(now) != self._forms[at]:
            return False
        del self._at[id(was)], self._holders[id(was)]
        self._values[at] = now
        self._at[id(now)] = at
        self._holders[id(now)] += 1
        return self._holders[id(now)] == 1


class _Tensors:
    """Whether tensors require gradients, and the dtypes and shapes of those that the graph reads."""

    def __init__(self) -> None:
        self._tensors: list[Tensor] = []
        self._names: list[str] = []
        self._gradients: list[bool] = []
        self._kinds: list[Any] = []
        self._captured: list[Tensor] = []

    @property
    def any(self) -> bool:
        return bool(self._tensors or self._captured)

    def add(self, tensor: Tensor, name: str) -> None:
        self._tensors.append(tensor)
        self._names.append(name)
        with plain_functions():
            self._gradients.append(tensor.requires_grad)

    def capture(self, tensors: Iterable[Tensor]) -> None:
        self._captured = [*tensors]
        with plain_functions():
            self._kinds = [*map(_kind_of, self._captured)]

    def unchanged(self) -> bool:
        with plain_functions():  # a leaf that was donated refuses every use
            return [*map(_requires_gradient, self._tensors)] == self._gradients and [
                *map(_kind_of, self._captured)
            ] == self._kinds

    def changes(self) -> Iterator[Change]:
        with plain_functions():
            now, kinds = [*map(_requires_gradient, self._tensors)], [*map(_kind_of, self._captured)]
        for name, before, is_now in zip(self._names, self._gradients, now, strict=True):
            if before != is_now:
                yield Change(f"requires_grad of {name}", before, is_now)
        if kinds != self._kinds:
            yield Change("the shape or dtype of a tensor that the step captures")


def _equal(a: Any, b: Any) -> bool:
    if type(a) is tuple and type(b) is tuple and len(a) == len(b):
        return all(x is y or _equal(x, y) for x, y in zip(a, b, strict=True))
    form = form_of(a) if type(a) is type(b) else None
    return form is not None and form == form_of(b)


class _Places:
    """Places of one kind, which one function reads."""

    def __init__(self, read: Callable[..., list[Any]]) -> None:
        self._read = read
        self._columns: list[list[Any]] = []
        self._found: list[Any] = []
        self.names: list[str] = []

    def add(self, place: tuple[Any, ...], found: Any, name: str) -> None:
        self._columns = self._columns or [[] for _ in place]
        for column, part in zip(self._columns, place, strict=True):
            column.append(part)
        self._found.append(found)
        self.names.append(name)

    def unchanged(self, accept: Callable[[Any, Any], bool]) -> bool:
        """True if each place holds the same object, or one that `accept(was, now)` takes."""
        now = self._read(*self._columns)
        if all(map(is_, now, self._found)):
            return True
        for i, (a, b) in enumerate(zip(self._found, now, strict=True)):
            if a is not b:
                if not accept(a, b):
                    return False
                self._found[i] = b
        return True

    def changes(self) -> Iterator[Change]:
        now = self._read(*self._columns) if self._found else []
        for was, is_now, name in zip(self._found, now, self.names, strict=True):
            if was is not is_now and not _equal(was, is_now):
                simple = type(was) in SIMPLE and type(is_now) in SIMPLE
                yield Change(name, was, is_now) if simple else Change(name)


class _Contents:
    """Containers of objects, of which each entry is compared by identity, and by value where it is plain."""

    def __init__(self, entries: Callable[[list[Any]], list[Any]]) -> None:
        self._entries = entries
        self._containers: list[Any] = []
        self._sizes: list[int] = []
        self._found: list[Any] = []
        self.names: list[str] = []

    def add(self, container: Any, name: str) -> None:
        self._containers.append(container)
        self._sizes.append(len(container))
        self._found += self._entries([container])
        self.names.append(name)

    def unchanged(self) -> bool:
        if [*map(len, self._containers)] != self._sizes:
            return False
        now = self._entries(self._containers)
        return all(map(is_, now, self._found)) or self._equal(now, self._found)

    def _equal(self, now: Sequence[Any], found: list[Any]) -> bool:
        if not all(a is b or (type(a) is type(b) and _equal(a, b)) for a, b in zip(now, found, strict=True)):
            return False
        self._found = [*now]
        return True

    def changes(self) -> Iterator[str]:
        at = 0
        for container, size, name in zip(self._containers, self._sizes, self.names, strict=True):
            now, before = self._entries([container]), self._found[at : at + size * self._per_entry]
            at += size * self._per_entry
            if len(now) != len(before) or not all(a is b or _equal(a, b) for a, b in zip(now, before, strict=True)):
                yield name

    @property
    def _per_entry(self) -> int:
        return 2 if self._entries is _keys_and_values else 1


def _entries(containers: list[Any]) -> list[Any]:
    return [*chain.from_iterable(containers)]


def _keys_and_values(tables: list[dict[Any, Any]]) -> list[Any]:
    return [*chain.from_iterable(chain.from_iterable((t, t.values()) for t in tables))]


def _read_entries(mappings: list[dict[Any, Any]], keys: list[str]) -> list[Any]:
    return [*map(dict.get, mappings, keys, repeat(MISSING))]


def _read_classes(attributes: list[Any], keys: list[str]) -> list[Any]:
    return [*map(_of_proxy, attributes, keys, repeat(MISSING))]


def _read_cells(cells: list[types.CellType]) -> list[Any]:
    try:
        return [*map(_content_of, cells)]
    except ValueError:
        return [*map(read_cell, cells)]


def _read_slots(owners: list[Any], keys: list[str]) -> list[Any]:
    return [*map(getattr, owners, keys, repeat(MISSING))]


_READERS = (_read_entries, _read_classes, _read_cells, _read_slots)


def read_cell(cell: types.CellType) -> Any:
    """What a variable of a closure holds; `MISSING` before it is bound."""
    try:
        return cell.cell_contents
    except ValueError:
        return MISSING


def _bytes_of(array: Any) -> bytes:
    if not isinstance(array, np.ndarray):
        return bytes(array)
    return str((array.dtype, array.shape)).encode() + array.tobytes()
