"""From safetensors to a tree of parameters: tensor by tensor, each rank only what it keeps."""

import itertools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ftrain.checkpoint.leaves import named_leaves
from ftrain.checkpoint.shard_layout import Slice, whole
from ftrain.hf.files import HfFolder, Stored, opened
from ftrain.hf.range import require_in_range
from ftrain.hf.shards import Entry
from ftrain.modules.hf_names import DERIVED, HfTensor
from ftrain.modules.spec import leaves_with_paths, map_with_paths

_ROWS = 256


def load_hf(
    folder: str | Path | HfFolder,
    specs: Any,
    names: Iterable[HfTensor],
    *,
    windows: Mapping[str, Slice] | None = None,
    device: torch.device | str = "cpu",
    unexpected: Literal["error", "ignore"] = "error",
) -> Any:
    """A tree of parameters as `specs` describe it, from the safetensors of `folder`.

    Files are mapped into memory one after the other, and each tensor is copied to its place: beyond the result there is
    at most one tensor in memory, and the pages of one file.

    Args:
        folder: holds `model.safetensors`, or shards and their index.
        specs: the tree of `ParamSpec`s; numbers are cast to their dtypes.
        names: which tensor is which leaf, and how it lies (see `ftrain.modules.hf_names`).
        windows: for the leaf at a path only this part of it, of which only the bytes needed are read; the leaf then has
            the shape of the part. `Placement.windows` gives the parts of a rank. Default: whole leaves.
        device: where the result is.
        unexpected: what to do about tensors of the folder that no name stands for.

    Raises:
        ValueError: a tensor is missing, unexpected, or of another shape; a leaf gets nothing or only a part; a tied
            weight and its copy differ; a number is beyond the range of the spec's dtype; a file is missing or damaged.

    The format: https://github.com/huggingface/safetensors#format.

    >>> import ftrain, tempfile, torch
    >>> from ftrain.hf import load_hf, save_hf
    >>> from ftrain.modules import decoder
    >>> from ftrain.modules.hf_config import hf_config
    >>> from ftrain.modules.hf_names import decoder_names
    >>> cfg, folder = decoder.preset("llama-tiny"), tempfile.mkdtemp()
    >>> params = ftrain.init(decoder.specs(cfg), ftrain.key(0))
    >>> save_hf(params, folder, hf_config(cfg), decoder_names(cfg))
    >>> loaded = load_hf(folder, decoder.specs(cfg), decoder_names(cfg))
    >>> all(torch.equal(a, b) for a, b in zip(ftrain.tree.leaves(params), ftrain.tree.leaves(loaded)))
    True
    """
    here = folder if isinstance(folder, HfFolder) else HfFolder.open(folder)
    wanted = {path: Entry(spec.shape, spec.dtype) for path, spec in leaves_with_paths(specs)}
    names = tuple(names)
    check_fit(here, wanted, names, unexpected=unexpected)
    for path in windows or ():
        if path not in wanted:
            raise ValueError(f"windows name {path!r}, where the specs have no parameter")
    parts = {path: _window(path, entry.shape, windows) for path, entry in wanted.items()}
    leaves = read_parts(here, wanted, names, parts, device=device)
    return map_with_paths(lambda path, _: leaves[path], specs)


def fill_hf(
    params: Any,
    folder: str | Path | HfFolder,
    names: Iterable[HfTensor],
    *,
    unexpected: Literal["error", "ignore"] = "error",
) -> None:
    """Overwrite the tensors of a tree of parameters, in place, with what `folder` holds.

    On a mesh of processes every rank calls it, for parameters that are spread over ranks (those of a state from
    `step.init`, say): of each array a rank reads the part that it holds.

    Args:
        params: tensors of any device and strides, or DTensors; numbers are cast to their dtypes.
        folder, names, unexpected: as for `load_hf`.

    Raises:
        ValueError: as `load_hf`; what was read until then is overwritten.
    """
    here = folder if isinstance(folder, HfFolder) else HfFolder.open(folder)
    held, names = named_leaves(params), tuple(names)
    layouts = held.layouts
    shapes = {path: layouts[path].shape if path in layouts else tuple(t.shape) for path, t in held.tensors.items()}
    wanted = {path: Entry(shapes[path], tensor.dtype) for path, tensor in held.tensors.items()}
    check_fit(here, wanted, names, unexpected=unexpected)
    parts = {path: layouts[path].mine if path in layouts else whole(shape) for path, shape in shapes.items()}
    _fill(here, names, held.tensors, parts)


def read_parts(
    here: HfFolder,
    wanted: Mapping[str, Entry],
    names: Iterable[HfTensor],
    parts: Mapping[str, Slice],
    *,
    device: torch.device | str = "cpu",
) -> dict[str, Tensor]:
    """These parts of leaves, by path; `wanted` describes the whole ones. What `check_fit` refuses goes unnoticed.

    Args:
        here: the folder that holds the tensors.
        wanted: shape and dtype of each whole leaf, by path; numbers are cast to the dtype.
        names: which tensor is which leaf.
        parts: for each leaf that is read, a start and a length per dim; the result has these lengths.
        device: where the result is.

    Raises:
        ValueError: a file is missing or damaged, a number is beyond the range of the dtype, or a tied weight and its
            copy differ.
    """
    sizes = {path: tuple(length for _, length in part) for path, part in parts.items()}
    leaves = {path: torch.empty(sizes[path], dtype=wanted[path].dtype, device=device) for path in parts}
    _fill(here, names, leaves, parts)
    return leaves


def check_fit(
    here: HfFolder,
    wanted: Mapping[str, Entry],
    names: tuple[HfTensor, ...],
    *,
    unexpected: Literal["error", "ignore"] = "error",
) -> None:
    """Check that the folder's tensors fill every leaf; nothing is read for it but headers.

    Raises:
        ValueError: a tensor is missing, unexpected or of another shape, or a leaf gets nothing or only a part.
    """
    _check(here, wanted, names)
    if unexpected == "error":
        here.require_all_known((name.name for name in names), besides=DERIVED)


def stored_dtypes(here: HfFolder, names: Iterable[HfTensor]) -> dict[str, torch.dtype]:
    """The dtype in which each leaf is on disk; of stacked tensors one that holds all.

    Raises:
        ValueError: the folder has no tensor of a name.
    """
    found: dict[str, torch.dtype] = {}
    for name in names:
        if not name.copy:
            dtype = here.find(name.name, wanted_for=name.leaf).dtype
            found[name.leaf] = torch.promote_types(found.get(name.leaf, dtype), dtype)
    return found


def hf_shape(name: HfTensor, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that the tensor has there when our leaf has this one."""
    own = shape if name.index is None else shape[1:]
    return (*own[:-2], own[-1], own[-2]) if name.transposed else own


def row_dim(name: HfTensor, dims: int) -> int:
    """The dim of our leaf, of so many, whose ranges are ranges of bytes there."""
    return -1 if name.transposed and name.index is None and dims == 2 else 0


def part_of_leaf(name: HfTensor, leaf: Tensor) -> Tensor:
    """The view of our leaf (of its whole shape) that this tensor holds, dims in the order they have there.

    >>> import torch
    >>> from ftrain.hf.load import part_of_leaf
    >>> from ftrain.modules.hf_names import HfTensor
    >>> stacked_EDF = torch.zeros(4, 8, 16)  # experts are one leaf here, and a tensor each there
    >>> part_of_leaf(HfTensor("experts.2.up_proj.weight", "moe.w_up_EDF", transposed=True, index=2), stacked_EDF).shape
    torch.Size([16, 8])
    """
    own = leaf if name.index is None else leaf[name.index]
    return own.mT if name.transposed else own


def _check(here: HfFolder, wanted: Mapping[str, Entry], names: tuple[HfTensor, ...]) -> None:
    """Every leaf is filled by tensors of the right shapes."""
    given: dict[str, list[int | None]] = {path: [] for path in wanted}
    for name in names:
        if name.leaf not in wanted:
            raise ValueError(f"the names put {name.name!r} at {name.leaf!r}, where the specs have no parameter")
        if name.copy and name.name not in here.tensors:
            continue
        stored = here.find(name.name, wanted_for=name.leaf)
        expected = hf_shape(name, wanted[name.leaf].shape)
        if stored.shape != expected:
            raise ValueError(
                f"{stored.shown}: {name.name!r} has shape {list(stored.shape)}, but our {name.leaf!r} "
                f"{list(wanted[name.leaf].shape)} needs {list(expected)}: use the configuration of these weights"
            )
        if not name.copy:
            given[name.leaf].append(name.index)
    for path, indices in given.items():
        if indices != [None] and sorted(i for i in indices if i is not None) != list(range(wanted[path].shape[0])):
            raise ValueError(
                f"the names give {path!r} {list(wanted[path].shape)} "
                + (f"the parts {indices} of its first dim" if indices else "no tensor")
                + ": load the leaves they cover, and make the others with ftrain.init"
            )


def _window(path: str, shape: tuple[int, ...], windows: Mapping[str, Slice] | None) -> Slice:
    part = whole(shape) if windows is None else windows.get(path, whole(shape))
    fits = len(part) == len(shape) and all(
        start >= 0 and length >= 0 and start + length <= size for (start, length), size in zip(part, shape, strict=True)
    )
    if not fits:
        raise ValueError(f"{path!r} {list(shape)} has no part {part}: a start and a length within each dim")
    return part


def _fill(here: HfFolder, names: Iterable[HfTensor], leaves: Mapping[str, Tensor], parts: Mapping[str, Slice]) -> None:
    """Read what the names say into these leaves, each of which is a part of the array at its path."""
    present = [name for name in names if name.leaf in leaves and name.name in here.tensors]
    # Copies last: what they repeat must be there to compare with.
    present.sort(key=lambda name: (name.copy, here.tensors[name.name].file))
    for (_, file), group in itertools.groupby(present, key=lambda name: (name.copy, here.tensors[name.name].file)):
        with opened(file) as tensors:
            for name in group:
                _fill_one(tensors, name, here.tensors[name.name], leaves[name.leaf], parts[name.leaf])


def _fill_one(tensors: Any, name: HfTensor, stored: Stored, leaf: Tensor, part: Slice) -> None:
    """Read the part of one tensor that lies in the leaf's window, and put it there (of a copy: compare it)."""
    room, own = leaf, part
    if name.index is not None:
        start, length = part[0]
        if not start <= name.index < start + length:
            return
        room, own = leaf[name.index - start], part[1:]
    if room.numel() == 0:
        return
    there = (*own[:-2], own[-1], own[-2]) if name.transposed else own
    entry = tensors.get_slice(name.name)
    values = entry[tuple(slice(start, start + n) for start, n in there)] if own else tensors.get_tensor(name.name)
    if name.copy:
        _require_equal(stored, name, room, values)
        return
    if name.transposed and room.device.type == "cpu":
        _copy_transposed(room, values)
    else:
        values = values.to(room.device)
        room.copy_(values.mT if name.transposed else values)
    require_in_range(values.mT if name.transposed else values, room, f"{stored.shown}: {name.name!r}")


def _copy_transposed(room: Tensor, values: Tensor) -> None:
    """Some rows at a time: that is up to twice as fast, as torch transposes by blocks only what it need not cast."""
    if values.dim() > 2:
        for own, matrix in zip(room, values, strict=True):
            _copy_transposed(own, matrix)
        return
    for first, rows in enumerate(values.split(_ROWS)):
        room[:, first * _ROWS : first * _ROWS + rows.shape[0]] = rows.mT.contiguous()


def _require_equal(stored: Stored, name: HfTensor, room: Tensor, values: Tensor) -> None:
    if not torch.equal(room, (values.mT if name.transposed else values).to(room)):
        raise ValueError(
            f"{stored.shown}: {name.name!r} should repeat our {name.leaf!r}, but differs: "
            "these weights are not tied; set tie_word_embeddings to false in config.json"
        )
