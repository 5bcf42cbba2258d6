"""Packages whose names are loaded when they are first asked for, so that importing one imports none of its files."""

import importlib
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any


def lazy_modules(package: str, names: Sequence[str]) -> Callable[[str], ModuleType]:
    """The `__getattr__` of a package that offers these of its modules; AttributeError for any other name.

    >>> load = lazy_modules("ftrain.graph", ["loop", "text"])
    >>> load("text").__name__
    'ftrain.graph.text'
    """

    def load(name: str) -> ModuleType:
        if name in names:
            return importlib.import_module(f"{package}.{name}")
        raise AttributeError(f"{package} has no module {name!r}; it has {', '.join(names)}")

    return load


def lazy_names(package: str, places: Mapping[str, Sequence[str]]) -> Callable[[str], Any]:
    """The `__getattr__` of a package that offers names of its modules, given by module; AttributeError for any other.

    >>> load = lazy_names("ftrain.graph", {"text": ["show_bytes"]})
    >>> load("show_bytes")(2048)
    '2 KiB'
    """
    place_of = {name: module for module, names in places.items() for name in names}

    def load(name: str) -> Any:
        if name in place_of:
            return getattr(importlib.import_module(f"{package}.{place_of[name]}"), name)
        raise AttributeError(f"{package} has no {name!r}; it has {', '.join(sorted(place_of))}")

    return load
