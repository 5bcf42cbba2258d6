"""Folders of diffusers' models: which class a configuration is of, and weights in and out by diffusers' own names."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ftrain.bridge.skeleton import flatten, nest
from ftrain.checkpoint.leaves import named_leaves
from ftrain.checkpoint.shard_layout import whole
from ftrain.files.outside import JSON_BYTES
from ftrain.hf.files import CONFIG, HfFolder, opened, parse_json, read_member
from ftrain.hf.range import require_in_range
from ftrain.modules.spec import Tree

STEM = "diffusion_pytorch_model"
"""What the files of weights are called, before `.safetensors`."""


def read_config(source: str | Path | Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The class of diffusers that a folder, or what its `config.json` says, is of; and the configuration.

    ValueError for a folder without a configuration, or of a class that this diffusers does not know. ImportError, with
    what to install, without diffusers.
    """
    try:
        import diffusers
    except ImportError as error:
        raise ImportError("the bridge to diffusers needs it: pip install 'ftrain-omni[diffusers]'") from error
    found, where = (dict(source), "the configuration") if isinstance(source, Mapping) else _of_folder(Path(source))
    name = found.get("_class_name")
    kind = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not (isinstance(kind, type) and issubclass(kind, diffusers.ModelMixin)):
        written = found.get("_diffusers_version")
        newer = f"it was written by diffusers {written}; " if written else ""
        raise ValueError(
            f"{where}: diffusers {diffusers.__version__} knows no model of class {name!r} (_class_name): {newer}"
            "install a version that knows it, or bridge a module of your own (ftrain.bridge.from_module)"
        )
    if found.get("quantization_config"):
        raise ValueError(
            f"{where}: its weights are quantized: load them with diffusers, model.dequantize(), and save_pretrained to "
            "a folder of its own"
        )
    return kind, found


def _of_folder(folder: Path) -> tuple[dict[str, Any], str]:
    if not (folder / CONFIG).is_file() and (folder / "model_index.json").is_file():
        parts = sorted(p.parent.name for p in folder.glob(f"*/{CONFIG}"))
        raise ValueError(f"{folder} is a pipeline of several models: give the folder of one, of {', '.join(parts)}")
    return parse_json(read_member(folder, CONFIG, limit=JSON_BYTES), str(folder / CONFIG)), str(folder)


def load(module: nn.Module, folder: Path, specs: Tree, into: Tree | None = None) -> Tree:
    """The parameters of `module` (which may be without memory) from a folder, one tensor after the other.

    `into`: a tree of parameters to be overwritten, of which each rank reads and keeps its own part; None: a new tree as
    `specs` describe it. ValueError for a tensor that is missing, unexpected or of another shape, and for numbers beyond
    a dtype.
    """
    stored = HfFolder.open(folder, stem=STEM).tensors
    wanted, others = flatten(specs), set(module.state_dict()) - set(flatten(specs))
    for name, spec in wanted.items():
        if name not in stored:
            raise ValueError(f"{folder} has nothing for {name!r}")
        if stored[name].shape != tuple(spec.shape):
            raise ValueError(f"{folder}: {name!r} has shape {list(stored[name].shape)}, not {list(spec.shape)}")
    strange = sorted(set(stored) - set(wanted) - others)
    if strange:
        raise ValueError(f"{folder}: it holds {strange[0]!r}, which {type(module).__name__} has not")
    if into is None:
        into = nest({name: torch.empty(spec.shape, dtype=spec.dtype) for name, spec in wanted.items()})
    held = named_leaves(into)
    for name in wanted:
        layout = held.layouts.get(name)
        part = layout.mine if layout is not None else whole(stored[name].shape)
        with opened(stored[name].file) as tensors, torch.no_grad():
            piece = tensors.get_slice(name)[tuple(slice(start, start + size) for start, size in part)]
            own = held.tensors[name][tuple(slice(0, size) for _, size in part)]  # a piece may be padded
            own.copy_(piece)
        require_in_range(piece, own, f"{folder}: {name}")
    return into


def save(module: nn.Module, held: Mapping[str, Tensor], params: Tree, folder: str | Path) -> None:
    """Write the parameters, and the buffers in `held` that a checkpoint has, as diffusers' `save_pretrained` does.

    `folder`: is made; `config.json` is written too. The result loads with strict names.
    """
    known = set(module.state_dict())
    own = copy.deepcopy(module)
    tensors = {name: x.detach() for name, x in flatten(params).items()}
    own.load_state_dict({**{name: x for name, x in held.items() if name in known}, **tensors}, assign=True)
    own.save_pretrained(folder)  # type: ignore[operator]
