"""Adapters as one file for programs that draw: ComfyUI's names, kohya's, and those of diffusers' pipelines.

    ComfyUI    diffusion_model.blocks.0.attn.q.lora_A.weight, .lora_B.weight, .alpha
    kohya      lora_unet_blocks_0_attn_q.lora_down.weight, .lora_up.weight, .alpha
    diffusers  transformer.blocks.0.attn.to_q.lora_A.weight, .lora_B.weight, and PEFT's configuration in the header

`alpha` is written in the first two, since a reader takes the scale `alpha / rank` from it, and 1 without it.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

from ftrain.bridge.skeleton import flatten
from ftrain.hf.gather import write_gathered
from ftrain.lora.adapter import Adapter
from ftrain.lora.files import write_tensors
from ftrain.lora.peft import config_of
from ftrain.lora.peft_names import Place, places
from ftrain.lora.trees import SUFFIX
from ftrain.modules.spec import Tree

Style = Literal["comfyui", "kohya", "diffusers"]
_NAMES: Mapping[Style, tuple[str, dict[str, str]]] = MappingProxyType(
    {
        "comfyui": ("diffusion_model.", {"A": "lora_A.weight", "B": "lora_B.weight", "magnitude": "dora_scale"}),
        "kohya": ("lora_unet_", {"A": "lora_down.weight", "B": "lora_up.weight", "magnitude": "dora_scale"}),
        "diffusers": (
            "transformer.",
            {"A": "lora_A.weight", "B": "lora_B.weight", "magnitude": "lora_magnitude_vector"},
        ),
    }
)


def save_file(
    delta: Tree,
    adapter: Adapter,
    file: str | Path,
    *,
    style: Style = "comfyui",
    prefix: str | None = None,
    base: str = "",
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Write the deltas of linear layers and convolutions into one file of safetensors.

    - `style`: "comfyui", "kohya" or "diffusers" (`load_lora_weights` of a pipeline). A model whose tensors programs
      call otherwise than Hugging Face's folders has its names for each (`Adapter.other_names`).
    - `prefix`: of all names; that of the style if None ("lora_te_" is kohya's for text encoders).
    - `base`: the name of the model, for the file's header. `dtype`: of the file.

    Where deltas are divided over processes, each calls this, and rank 0 writes. ValueError for an unknown style, and
    for targets of other kinds.
    """
    if style not in _NAMES:
        raise ValueError(f"lora: style {style!r} is not one of {', '.join(_NAMES)}")
    own, parts = _NAMES[style]
    prefix = own if prefix is None else prefix
    found = places(replace(adapter, names=adapter.other_names.get(style, adapter.names)))
    for place in found:
        if place.form not in ("linear", "convolution") or place.index is not None:
            kind = place.target.kind
            raise ValueError(f"lora: {place.target.path!r} is of kind {kind}, for which {style} has no names")
    ranks = sorted({place.target.rank for place in found})
    header = {"ss_network_dim": str(ranks[-1]), "ss_network_alpha": f"{found[0].target.alpha:g}", "base_model": base}
    if style == "diffusers":
        told = {prefix + key: value for key, value in config_of(adapter, found, base="", task=None).items()}
        header = {"lora_adapter_metadata": json.dumps(told, sort_keys=True), "base_model": base}

    def write(leaves: Iterable[tuple[str, Tensor]]) -> None:
        held = dict(leaves)
        tensors: dict[str, Tensor] = {}
        for place in found:
            name = prefix + (place.module.replace(".", "_") if style == "kohya" else place.module)
            for what, ending in parts.items():
                if what != "magnitude" or adapter.dora:
                    tensors[f"{name}.{ending}"] = _written(place, what, held, style).to("cpu", dtype)
            if style != "diffusers":
                tensors[f"{name}.alpha"] = torch.tensor(_alpha(place, rslora=adapter.rslora), dtype=torch.float32)
        write_tensors(Path(file), tensors, header)

    write_gathered(flatten(delta), write)


def _written(place: Place, what: str, held: Mapping[str, Tensor], style: Style) -> Tensor:
    x = held[f"{place.target.path}{SUFFIX}.{what}"]
    if what == "magnitude" and style != "diffusers":
        return x.reshape(-1, *(1 for _ in place.target.shape[1:]))
    return place.written(what, x)


def _alpha(place: Place, *, rslora: bool) -> float:
    """What gives our scale where a reader divides by the rank."""
    target = place.target
    return target.scale * target.rank if rslora else target.alpha
