"""Passes: changes of a graph that keep every bit of every value, one a file.

`ftrain.step.pipeline` holds their order. `__all__` lists the modules; they are loaded when first used.
"""

from typing import TYPE_CHECKING

from ftrain.lazy import lazy_modules as _lazy_modules

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

__getattr__ = _lazy_modules(__name__, __all__)
