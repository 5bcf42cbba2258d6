"""Adapters as PEFT's folders, which vLLM reads too: `adapter_model.safetensors` and `adapter_config.json`."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ftrain.bridge.skeleton import flatten
from ftrain.hf.gather import write_gathered
from ftrain.lora.adapter import Adapter
from ftrain.lora.files import write_json, write_tensors
from ftrain.lora.peft_names import Place, places
from ftrain.lora.trees import SUFFIX
from ftrain.modules.spec import Tree, leaves_with_paths

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


def save(
    delta: Tree,
    adapter: Adapter,
    folder: str | Path,
    *,
    base: str = "",
    task: str | None = "CAUSAL_LM",
    dtype: torch.dtype | None = None,
) -> None:
    """Write the deltas as an adapter that PEFT loads upon the same model.

    - `folder`: is made. `base`: the name or folder of the model, for who reads the adapter.
    - `task`: PEFT's `task_type`; None for none. `dtype`: of the file; that of the deltas if None.

    Where deltas are divided over processes, each calls this, and rank 0 writes. ValueError for a kernel that PEFT has
    no form for, and OSError where the folder cannot be written.
    """
    where, found = Path(folder), places(adapter)
    parts = ("A", "B", "magnitude") if adapter.dora else ("A", "B")
    config = config_of(adapter, found, base=base, task=task)

    def write(leaves: Iterable[tuple[str, Tensor]]) -> None:
        held = {path: x.cpu() if dtype is None else x.cpu().to(dtype) for path, x in leaves}
        tensors = {}
        for place in found:
            keys = place.keys()
            for what in parts:
                tensors[keys[what]] = place.written(what, held[f"{place.target.path}{SUFFIX}.{what}"])
        write_tensors(where / WEIGHTS, tensors, {})
        write_json(where / CONFIG, config)

    write_gathered(flatten(delta), write)


def config_of(adapter: Adapter, found: list[Place], *, base: str, task: str | None) -> dict[str, Any]:
    """What `adapter_config.json` says of an adapter with these places."""
    ranks, alphas = (Counter(x) for x in zip(*((t.rank, t.alpha) for t in adapter.targets), strict=True))
    rank, alpha = ranks.most_common(1)[0][0], alphas.most_common(1)[0][0]
    modules = [place for place in found if place.parameter is None]
    return {
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": base or None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": _plain(alpha),
        "rank_pattern": {p.module: p.target.rank for p in found if p.target.rank != rank},
        "alpha_pattern": {p.module: _plain(p.target.alpha) for p in found if p.target.alpha != alpha},
        "lora_dropout": adapter.dropout,
        "use_rslora": adapter.rslora,
        "use_dora": adapter.dora,
        "bias": "none",
        "fan_in_fan_out": any(not p.outputs_first for p in modules),
        "target_modules": short_names(adapter, modules),
        "target_parameters": sorted({p.parameter for p in found if p.parameter is not None}) or None,
    }


def short_names(adapter: Adapter, found: list[Place]) -> list[str]:
    """The modules, those of which all of one name are changed by that name alone."""
    if adapter.names:
        known = {name.name for name in adapter.names if len(name.name.split(".")) > 1}
    else:
        known = {path for path, spec in leaves_with_paths(adapter.base) if len(spec.shape) > 1}
    changed = {place.module for place in found}
    left = {name.removesuffix(".weight") for name in known if name.endswith(".weight")} - changed
    others = {_short(module) for module in left}
    return sorted({_short(module) if _short(module) not in others else module for module in changed})


def _short(module: str) -> str:
    """The last part of a name that is no number: PEFT takes every module that ends with it, layers by number too."""
    parts = module.split(".")
    first = next((i for i in reversed(range(len(parts))) if not parts[i].isdigit()), 0)
    return ".".join(parts[first:])


def _plain(number: float) -> float | int:
    return int(number) if float(number).is_integer() else number
