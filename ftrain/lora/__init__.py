"""Adapters of low rank for any model: deltas that are trained beside frozen parameters, and folders of them.

    adapter = lora.add(model, "all-linear", rank=16)
    loss, grads = ftrain.value_and_grad(lambda delta, base, batch: model.loss(lora.bind(base, delta, adapter), batch))(...)
"""

from typing import TYPE_CHECKING

from ftrain.lazy import lazy_names

if TYPE_CHECKING:
    from ftrain.lora.adapter import Adapter, add
    from ftrain.lora.binding import bind, merge
    from ftrain.lora.quantized import quantize, quantized_specs

__all__ = ["Adapter", "add", "bind", "merge", "quantize", "quantized_specs"]
__getattr__ = lazy_names(
    "ftrain.lora",
    {"adapter": ("Adapter", "add"), "binding": ("bind", "merge"), "quantized": ("quantize", "quantized_specs")},
)
