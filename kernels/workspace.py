"""What each opaque op costs beyond its shapes: workspace bytes and flops, for a memory planner and a cost model.

A rule is a plain function of the op's own arguments (real or fake tensors, numbers); it looks at shapes, dtypes and
devices alone. It takes parts of a tensor by `narrow`, `select` and `split`: `x[...]` asks for the library of x's
device, which may not be here. Each kernel file declares its rules in two constant dicts, `WORKSPACE` and `FLOPS`, from
the op's name (`"ftrain::attention_forward"`) to the rule; here they are put side by side.

- `WORKSPACE`: peak bytes that the op holds beyond its inputs and outputs while it runs. Where that depends on data, the
  bound. An op that is not listed holds nothing that matters.
- `FLOPS`: floating-point operations of the op's matmuls, two per multiply-add. An op that is not listed has none.
"""

from collections.abc import Callable
from importlib import import_module

_FILES = [
    import_module(f"ftrain.kernels.{name}")
    for name in (
        "adamw",
        "attention_cost",
        "ctc",
        "embedding",
        "grouped_mm",
        "layer_norm",
        "linear_cross_entropy_cost",
        "memory_scan",
        "moe",
        "philox",
        "quantiles",
        "rms_norm",
        "rope",
        "squares",
        "swiglu",
        "wide_mm",
    )
]


def _joined(table: str) -> dict[str, Callable[..., int]]:
    return {op: rule for file in _FILES for op, rule in getattr(file, table, {}).items()}


WORKSPACE = _joined("WORKSPACE")
FLOPS = _joined("FLOPS")
