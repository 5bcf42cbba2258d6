"""From a pure function to a graph: the tracer, gradients, the trace for a rank of a mesh, and what a trace refuses.

Users find `grad`, `value_and_grad`, `forward`, `accumulate`, `Precision` and `Aval` in `ftrain` itself. `__all__` lists
the modules that other rooms import, one subject each. They are loaded when first used.
"""

import importlib as _importlib
from types import ModuleType as _ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ftrain.trace import (
        accumulate,
        ambient,
        captured,
        functionalize,
        grad,
        piece_sizes,
        precision,
        preview,
        provenance,
        refusals,
        spmd,
        spmd_rules,
        spread,
        spread_fixes,
        surroundings,
        tracer,
    )

__all__ = [
    "accumulate",
    "ambient",
    "captured",
    "functionalize",
    "grad",
    "piece_sizes",
    "precision",
    "preview",
    "provenance",
    "refusals",
    "spmd",
    "spmd_rules",
    "spread",
    "spread_fixes",
    "surroundings",
    "tracer",
]


def __getattr__(name: str) -> _ModuleType:
    if name in __all__:
        return _importlib.import_module(f"ftrain.trace.{name}")
    raise AttributeError(f"ftrain.trace has no module {name!r}; it has {', '.join(__all__)}")
