"""Weights of transformers' folders in and out: streamed, by the names and conversions that transformers itself uses."""

from collections.abc import Callable, Iterator, Mapping, Set
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ftrain.bridge.skeleton import fixed, flatten, nest
from ftrain.checkpoint.leaves import named_leaves
from ftrain.checkpoint.shard_layout import Slice, whole
from ftrain.hf.files import HfFolder, opened
from ftrain.hf.gather import write_gathered
from ftrain.hf.range import require_in_range
from ftrain.modules.hf_names import HfTensor, Names
from ftrain.modules.spec import Tree


@dataclass
class _Group:
    """Stored tensors that make one parameter, or several. `converter`: None for one that is taken as it is."""

    converter: Any = None
    names: list[str] = field(default_factory=list)


def load(module: nn.Module, folder: HfFolder, specs: Tree, into: Tree | None = None) -> Tree:
    """The parameters of `module` (which may be without memory) from a folder: a new tree as `specs` describe it.

    `into`: a tree of parameters to be overwritten instead, of which each rank reads and keeps its own part. Beyond the
    result there is at most one group in memory: a tensor, or those of a layer that are stored apart and used together.

    ValueError for a tensor that is missing, unexpected, quantized or of another shape, for numbers beyond a dtype, and
    for two names of one parameter with different numbers.
    """
    _require_plain(folder)
    wanted = flatten(specs)
    if into is None:
        into = nest({name: torch.empty(spec.shape, dtype=spec.dtype) for name, spec in wanted.items()})
    held = named_leaves(into)
    tied = _tied(module)
    missing, others = set(wanted), {*dict(module.named_buffers()), *fixed(module)}
    for stored, tensor in _parameters(module, folder):
        name = tied.get(stored, stored)
        if name not in wanted:
            if name in others:
                continue
            raise ValueError(f"{folder.path}: it holds {name!r}, which {type(module).__name__} has not")
        if tuple(tensor.shape) != tuple(wanted[name].shape):
            raise ValueError(f"{folder.path}: {name!r} has shape {list(tensor.shape)}, not {list(wanted[name].shape)}")
        layout = held.layouts.get(name)
        part = layout.mine if layout is not None else whole(tuple(tensor.shape))
        if name in missing:
            _copy(held.tensors[name], tensor, part, f"{folder.path}: {stored}")
        elif not _repeats(held.tensors[name], tensor, part):
            raise ValueError(
                f"{folder.path}: {stored!r} should repeat the numbers of {name!r} under another name, but differs: "
                "these weights are not tied; set tie_word_embeddings to false in config.json"
            )
        missing.discard(name)
    if missing:
        raise ValueError(f"{folder.path} has nothing for {sorted(missing)[0]!r} ({len(missing)} missing)")
    return into


def loader(module: nn.Module, folder: Path | None, specs: Tree) -> Callable[..., Tree] | None:
    """A function that reads the parameters of a folder, into new tensors or those of `into`; None without a folder."""

    def read(into: Tree | None = None) -> Tree:
        assert folder is not None
        return load(module, HfFolder.open(folder), specs, into)

    return None if folder is None else read


def reader(module: nn.Module, folder: Path | None, specs: Tree) -> Callable[[str], Tensor] | None:
    """A function that reads one parameter of a folder, whole, in the dtype of its spec; None without a folder. The
    function raises ValueError for one that is missing or of another shape.
    """

    def read(path: str) -> Tensor:
        assert folder is not None
        here, spec, tied = HfFolder.open(folder), flatten(specs)[path], _tied(module)
        _require_plain(here)
        names = {path, *(name for name, own in tied.items() if own == path)}
        found = next((x for name, x in _parameters(module, here, names) if tied.get(name, name) == path), None)
        if found is None or tuple(found.shape) != tuple(spec.shape):
            told = "nothing" if found is None else f"shape {list(found.shape)}"
            raise ValueError(f"{folder} has {told} for {path!r}, which has shape {list(spec.shape)}")
        made = torch.empty(spec.shape, dtype=spec.dtype)
        _copy(made, found, whole(tuple(spec.shape)), f"{folder}: {path}")
        return made

    return None if folder is None else read


def stored_buffers(module: nn.Module, folder: str | Path) -> dict[str, Tensor]:
    """What a folder holds beside the parameters that are trained, by name: statistics of a normalization, biases of a
    router, tables of positions. Empty for a folder without weights. ValueError for one of another shape.
    """
    if not any(Path(folder).glob("*.safetensors*")):
        return {}
    own: dict[str, Tensor] = {**dict(module.named_buffers()), **fixed(module)}
    read = dict(_parameters(module, HfFolder.open(folder), own.keys()))
    for name, tensor in read.items():
        if tensor.shape != own[name].shape:
            raise ValueError(f"{folder}: {name!r} has shape {list(tensor.shape)}, not {list(own[name].shape)}")
    return {name: tensor.to(own[name].dtype) for name, tensor in read.items()}


def saver(module: nn.Module, held: Mapping[str, Tensor]) -> Callable[..., None]:
    """`save` of a module and its buffers, as the function that a model has. It is no `partial`: what a `partial` calls
    counts as read by each step that reads its model, and the writing of a folder would trace all steps again.
    """

    def saved(params: Tree, folder: str | Path, state: Tree | None = None) -> None:
        save(module, held, params, folder, state)

    return saved


def save(
    module: nn.Module, held: Mapping[str, Tensor], params: Tree, folder: str | Path, state: Tree | None = None
) -> None:
    """Write the parameters, and the buffers in `held` that a checkpoint has, as transformers' `save_pretrained` does.

    `state`: by their paths, buffers that are written in the place of those in `held`, in their dtypes. `folder`: is
    made; `config.json` is written too. The result loads with strict names. Where parameters are divided over processes,
    each calls this, and rank 0 writes; it then holds all of them.
    """
    known = set(module.state_dict())

    def write(leaves: Iterator[tuple[str, Tensor]]) -> None:
        tensors = {name: x.cpu() for name, x in leaves}
        tensors |= {name: tensors.get(name, x).to(x.dtype) for name, x in held.items() if name in known}
        tensors |= {name: tensors[own] for name, own in _tied(module).items() if own in tensors}
        # of a copy: transformers notes in the configuration what it wrote, which a step that reads it would see
        deepcopy(module).save_pretrained(folder, state_dict=tensors)  # type: ignore[operator]

    write_gathered({**flatten(params), **flatten(state or {})}, write)


def names_of(module: nn.Module, specs: Tree) -> Names:
    """What a folder calls the parameters of `specs`, where one of them has several names; empty where none is tied."""
    leaves = flatten(specs)
    tied = {name: own for name, own in _tied(module).items() if own in leaves}
    if not tied:
        return ()
    own = (HfTensor(name, name) for name in leaves)
    return (*own, *(HfTensor(name, path, copy=True) for name, path in tied.items()))


def _copy(target: Tensor, tensor: Tensor, part: Slice, where: str) -> None:
    own, piece = _parts(target, tensor, part)
    with torch.no_grad():
        own.copy_(piece)
    require_in_range(piece, own, where)


def _repeats(target: Tensor, tensor: Tensor, part: Slice) -> bool:
    own, piece = _parts(target, tensor, part)
    return torch.equal(own, piece.to(own))


def _parts(target: Tensor, tensor: Tensor, part: Slice) -> tuple[Tensor, Tensor]:
    """Of a rank's piece, which may be padded, what is filled, and of a file's tensor what belongs there."""
    piece = tensor[tuple(slice(start, start + size) for start, size in part)]
    return target[tuple(slice(0, size) for _, size in part)], piece


def _tied(module: nn.Module) -> dict[str, str]:
    """The names of tied parameters that the tree has under another name, and that name."""
    first: dict[int, str] = {}
    found = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        own = first.setdefault(id(parameter), name)
        if own != name:
            found[name] = own
    return found


def _parameters(module: nn.Module, folder: HfFolder, only: Set[str] | None = None) -> Iterator[tuple[str, Tensor]]:
    """The module's parameters and buffers by name, converted from what the folder holds, group by group.

    `only`: leave out the groups of other names.
    """
    reader = _Reader(folder)
    for target, group in _groups(module, folder).items():
        if only is not None and target not in only:
            continue
        if group.converter is None:
            yield target, reader.read(group.names[0])
            continue
        made = group.converter.convert(target, model=module, config=module.config)
        for name, value in made.items():
            yield name, value[0] if isinstance(value, list) else value


def _groups(module: nn.Module, folder: HfFolder) -> dict[str, _Group]:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    transforms = get_model_conversion_mapping(module)  # type: ignore[arg-type]
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    reader, known = _Reader(folder), module.state_dict()
    found: dict[str, _Group] = {}
    for name in sorted(folder.tensors, key=_natural):
        target, pattern = rename_source_key(name, renamings, converters, module.base_model_prefix, known)  # type: ignore[arg-type]
        group = found.setdefault(target, _Group())
        group.names.append(name)
        if pattern is not None:
            group.converter = group.converter or deepcopy(by_pattern[pattern])
            group.converter.add_tensor(target, name, pattern, _later(reader, name))
    return found


def _later(reader: "_Reader", name: str) -> Callable[[], Tensor]:
    return lambda: reader.read(name)


class _Reader:
    """Reads tensors of a folder, one at a time."""

    def __init__(self, folder: HfFolder) -> None:
        self._folder = folder

    def read(self, name: str) -> Tensor:
        stored = self._folder.tensors[name]
        with opened(stored.file) as tensors:
            found: Tensor = tensors.get_tensor(name)
            return found


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """A key that sorts numbers in names by their size."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in name.split(".")]


def _require_plain(folder: HfFolder) -> None:
    """ValueError for a folder of quantized weights."""
    how = folder.config().get("quantization_config")
    if how:
        method = how.get("quant_method", "another format") if isinstance(how, dict) else how
        raise ValueError(
            f"{folder.path}: its weights are quantized ({method}): load them with transformers, "
            "model.dequantize(), and save_pretrained to a folder of its own"
        )
