"""The graph of a step as data: nodes, loops, memory they look at, the lines they came from.

Each module is one subject; `ftrain.graph.loop` holds `loop` and `loop_body`. They are loaded when first asked for.
"""

import importlib as _importlib
from types import ModuleType as _ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ftrain.graph import (
        absent_device,
        aliasing,
        collectives,
        failing_node,
        fused,
        host_waits,
        in_place_ops,
        layers,
        layouts,
        loop,
        op_effects,
        order,
        sizes,
        source,
        text,
        torch_private,
        writes,
    )

__all__ = [
    "absent_device",
    "aliasing",
    "collectives",
    "failing_node",
    "fused",
    "host_waits",
    "in_place_ops",
    "layers",
    "layouts",
    "loop",
    "op_effects",
    "order",
    "sizes",
    "source",
    "text",
    "torch_private",
    "writes",
]


def __getattr__(name: str) -> _ModuleType:
    if name in __all__:
        return _importlib.import_module(f"ftrain.graph.{name}")
    raise AttributeError(f"ftrain.graph has no module {name!r}; it has {', '.join(__all__)}")
