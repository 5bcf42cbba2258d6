"""Adapters of low rank for any model: deltas that are trained beside frozen parameters, and folders of them.

adapter = lora.add(model, "all-linear", rank=16)

def loss(delta, base, batch):
    return model.loss(lora.bind(base, delta, adapter), batch)

loss, grads = ftrain.value_and_grad(loss)(state.params, state.extra, batch)
"""

from typing import TYPE_CHECKING

from ftrain.lazy import lazy_names

if TYPE_CHECKING:
    from ftrain.lora.adapter import Adapter, add
    from ftrain.lora.binding import bind, merge
    from ftrain.lora.one_file import save_file
    from ftrain.lora.peft import save
    from ftrain.lora.peft_load import load
    from ftrain.lora.quantized import quantize, quantized_specs
    from ftrain.lora.rates import plus
    from ftrain.lora.singular_start import beyond, pissa, pissa_into, shift_base

__all__ = [
    "Adapter",
    "add",
    "beyond",
    "bind",
    "load",
    "merge",
    "pissa",
    "pissa_into",
    "plus",
    "quantize",
    "quantized_specs",
    "save",
    "save_file",
    "shift_base",
]
__getattr__ = lazy_names(
    "ftrain.lora",
    {
        "adapter": ("Adapter", "add"),
        "binding": ("bind", "merge"),
        "one_file": ("save_file",),
        "peft": ("save",),
        "peft_load": ("load",),
        "singular_start": ("beyond", "pissa", "pissa_into", "shift_base"),
        "quantized": ("quantize", "quantized_specs"),
        "rates": ("plus",),
    },
)
