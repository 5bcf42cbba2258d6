"""The cost of a graph: memory over time, FLOPs, bytes and microseconds, measured on this machine or simulated.

`__all__` lists the modules that users and other rooms import, one subject each. They are loaded when first used.
"""

import importlib as _importlib
from types import ModuleType as _ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ftrain.analysis import (
        cluster,
        communication,
        cuda_allocator,
        device_ops,
        flops,
        hardware,
        liveness,
        memory_timeline,
        meter,
        op_times,
        pieces,
        simulate,
        workspace,
        workspace_cuda,
    )

__all__ = [
    "cluster",
    "communication",
    "cuda_allocator",
    "device_ops",
    "flops",
    "hardware",
    "liveness",
    "memory_timeline",
    "meter",
    "op_times",
    "pieces",
    "simulate",
    "workspace",
    "workspace_cuda",
]


def __getattr__(name: str) -> _ModuleType:
    if name in __all__:
        return _importlib.import_module(f"ftrain.analysis.{name}")
    raise AttributeError(f"ftrain.analysis has no module {name!r}; it has {', '.join(__all__)}")
