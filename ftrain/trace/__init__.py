"""From a pure function to a graph: the tracer, gradients, the trace for a rank of a mesh, and what a trace refuses.

Users find `grad`, `value_and_grad`, `forward`, `accumulate`, `Precision` and `Aval` in `ftrain` itself. `__all__` lists
the modules that other rooms import, one subject each. They are loaded when first used.
"""

from typing import TYPE_CHECKING

from ftrain.lazy import lazy_modules as _lazy_modules

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

__getattr__ = _lazy_modules(__name__, __all__)
