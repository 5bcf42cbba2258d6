"""Adapters of low rank for any model: deltas that are trained beside frozen parameters, and folders of them.

    adapter = lora.add(model, "all-linear", rank=16)
    loss, grads = ftrain.value_and_grad(lambda delta, base, batch: model.loss(lora.bind(base, delta, adapter), batch))(...)
"""

from typing import TYPE_CHECKING

from ftrain.lazy import lazy_names

if TYPE_CHECKING:
    from ftrain.lora.adapter import Adapter, add
    from ftrain.lora.binding import bind, merge
    from ftrain.lora.peft import save
    from ftrain.lora.peft_load import load
    from ftrain.lora.quantized import quantize, quantized_specs

__all__ = ["Adapter", "add", "bind", "load", "merge", "quantize", "quantized_specs", "save"]
__getattr__ = lazy_names(
    "ftrain.lora",
    {
        "adapter": ("Adapter", "add"),
        "binding": ("bind", "merge"),
        "peft": ("save",),
        "peft_load": ("load",),
        "quantized": ("quantize", "quantized_specs"),
    },
)
