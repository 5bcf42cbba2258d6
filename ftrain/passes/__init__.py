"""Passes: changes of a graph that keep every bit of every value, one a file.

`ftrain.step.pipeline` holds their order. `__all__` lists the modules; they are loaded when first used.
"""

import importlib as _importlib
from types import ModuleType as _ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ftrain.passes import (
        bucket,
        clean,
        donate,
        early_reductions,
        early_updates,
        fuse,
        join_waits,
        overlap,
        paths,
        reinplace,
        reuse,
        sink_gathers,
    )

__all__ = [
    "bucket",
    "clean",
    "donate",
    "early_reductions",
    "early_updates",
    "fuse",
    "join_waits",
    "overlap",
    "paths",
    "reinplace",
    "reuse",
    "sink_gathers",
]


def __getattr__(name: str) -> _ModuleType:
    if name in __all__:
        return _importlib.import_module(f"ftrain.passes.{name}")
    raise AttributeError(f"ftrain.passes has no module {name!r}; it has {', '.join(__all__)}")
