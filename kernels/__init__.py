"""Math with hand-written forward and backward, one file per op: `ftrain.kernels.rope` holds `rope` and `rope_table`.

ARCHITECTURE.md tells how a kernel is made. Modules are loaded when they are first asked for.
"""

import importlib as _importlib
from types import ModuleType as _ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ftrain.kernels import (
        adamw,
        attention,
        backend,
        chunks,
        documents,
        dtypes,
        embedding,
        experts,
        first_order,
        grouped_mm,
        layer_norm,
        linear_cross_entropy,
        mean,
        moe,
        offload,
        opaque,
        pack,
        philox,
        primitive,
        random,
        rms_norm,
        rope,
        squares,
        swiglu,
        wide_mm,
        workspace,
    )

__all__ = [
    "adamw",
    "attention",
    "backend",
    "chunks",
    "documents",
    "dtypes",
    "embedding",
    "experts",
    "first_order",
    "grouped_mm",
    "layer_norm",
    "linear_cross_entropy",
    "mean",
    "moe",
    "offload",
    "opaque",
    "pack",
    "philox",
    "primitive",
    "random",
    "rms_norm",
    "rope",
    "squares",
    "swiglu",
    "wide_mm",
    "workspace",
]


def __getattr__(name: str) -> _ModuleType:
    if name in __all__:
        return _importlib.import_module(f"ftrain.kernels.{name}")
    raise AttributeError(f"ftrain.kernels has no module {name!r}; it has {', '.join(__all__)}")
