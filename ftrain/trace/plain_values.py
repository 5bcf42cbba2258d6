"""Values that are compared by what they are and not by identity: numbers, strings, and containers of nothing else."""

import marshal
import math
from collections.abc import Iterator
from itertools import chain, repeat
from typing import Any

import numpy as np
import torch

SIMPLE = (bool, int, float, complex, str, bytes, type(None))
_MOST = 64  # entries of a container that is compared by value
_CONTAINERS = (list, tuple, dict, set, frozenset)
LONGEST = 4096
"""Entries of the largest container that is looked into."""


def form_of(value: Any) -> bytes | None:
    """A plain value as bytes, which are equal for values of equal types, numbers and order; None for one that is not
    plain. Plain are numbers, strings, None, and lists, tuples, dicts and sets of at most 4096 plain values.

    >>> from ftrain.trace.plain_values import form_of
    >>> form_of([1, 2.0]) == form_of([1, 2.0]), form_of([1]) == form_of([True]), form_of(0.0) == form_of(-0.0)
    (True, False, False)
    """
    if type(value) in _CONTAINERS and not _is_plain_container(value):
        return None
    if type(value) in SIMPLE or type(value) in _CONTAINERS:
        return marshal.dumps(value, 2)
    if isinstance(value, np.generic):
        return f"{value.dtype}".encode() + value.tobytes()
    return repr(value).encode() if isinstance(value, torch.device | torch.Size) else None


def forms_of(values: list[Any]) -> list[bytes] | None:
    """`form_of` each of some plain values, as fast as can be; None if one of them is plain no more."""
    try:
        return [*map(marshal.dumps, values, repeat(2))]
    except ValueError:
        return None


def _is_plain_container(value: Any) -> bool:
    if len(value) > LONGEST:
        return False
    inner = chain(value, value.values()) if isinstance(value, dict) else value
    return all(type(v) in SIMPLE or (type(v) in _CONTAINERS and _is_plain_container(v)) for v in inner)


def is_plain(value: Any) -> bool:
    """True for None, a bool, number, str or bytes, and for a list, tuple or dict of at most 64 entries."""
    return type(value) in SIMPLE or (type(value) in (list, tuple, dict) and len(value) <= _MOST)


def comparable(value: Any) -> Any:
    """The form of a value that is compared: simple values and short containers by value, other objects by identity.

    >>> from ftrain.trace.plain_values import comparable
    >>> comparable([1, 2.0]) == comparable([1, 2.0]), comparable([1]) == comparable([True])
    (True, False)
    """
    kind = type(value)
    if kind is float and math.isnan(value):
        return "nan"
    if kind in SIMPLE:
        return (kind, value)
    if kind in (list, tuple) and len(value) <= _MOST:
        return (kind, *map(comparable, value))
    if kind is dict and len(value) <= _MOST:
        return (kind, *((k, comparable(v)) for k, v in _items(value)))
    return id(value)


def _items(mapping: dict[Any, Any]) -> Iterator[tuple[Any, Any]]:
    return ((k, v) for k, v in mapping.items() if type(k) in SIMPLE)
