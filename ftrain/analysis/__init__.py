"""The cost of a graph: memory over time, FLOPs, bytes and microseconds, measured on this machine or simulated.

`__all__` lists the modules that users and other rooms import, one subject each. They are loaded when first used.
"""

from typing import TYPE_CHECKING

from ftrain.lazy import lazy_modules as _lazy_modules

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

__getattr__ = _lazy_modules(__name__, __all__)
