"""The graph of a step as data: nodes, loops, memory they look at, the lines they came from.

Each module is one subject; `ftrain.graph.loop` holds `loop` and `loop_body`. They are loaded when first asked for.
"""

from typing import TYPE_CHECKING

from ftrain.lazy import lazy_modules as _lazy_modules

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

__getattr__ = _lazy_modules(__name__, __all__)
