"""Restore one checkpoint into the shape of an abstract state, checking all that is read."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tensorstore as ts
import torch
from torch import Tensor

from ftrain import tree
from ftrain.checkpoint import manifest as manifests
from ftrain.checkpoint.arrays import Piece, read_part
from ftrain.checkpoint.dtypes import as_array, dtype_name
from ftrain.checkpoint.errors import DamagedCheckpoint
from ftrain.checkpoint.folders import latest, step_folder, steps
from ftrain.checkpoint.leaves import named_leaves
from ftrain.checkpoint.manifest import ArrayLeaf, Manifest, Scalar
from ftrain.private import FakeTensor

_WINDOW_BYTES = 2**29


def restore(
    abstract_state: Any, root: str | Path, step: int | None = None, *, partial: bool = False, donate: bool = False
) -> Any:
    """The state saved at `step` (default: the latest) as a tree like `abstract_state`.

    Args:
        abstract_state: a tree whose tensors give shape, dtype and device (what is on `meta` comes back on the CPU);
            other leaves give the type. Only the values of `donate`d tensors are looked at.
        root: the folder that holds `global_step_N`.
        partial: leaves that were saved but are not in `abstract_state` are left alone rather than an error.
        donate: contiguous CPU tensors of `abstract_state` are overwritten and become leaves of the result, so that no
            second copy of the state is in memory. After an error they hold anything.

    Raises:
        DamagedCheckpoint: a file or leaf is missing, short or was changed; it is named.
        ValueError: there is no such step, or the saved leaves are not those of `abstract_state`.
    """
    folder = _folder(Path(root), step)
    manifest = manifests.load(folder)
    wanted = named_leaves(abstract_state)
    saved: dict[str, ArrayLeaf | Scalar] = {**manifest.arrays, **manifest.scalars}
    _check_names(folder, list(wanted.tensors) + list(wanted.scalars), saved, partial)
    _check_leaves(folder, {**wanted.tensors, **wanted.scalars}, saved)
    _check_files(folder, manifest, {manifest.arrays[path].part for path in wanted.tensors})
    tensors = _read(folder, manifest, wanted.tensors, donate)
    values = [tensors[path] if path in tensors else manifest.scalars[path] for path in tree.paths(abstract_state)]
    return tree.unflatten(tree.flatten(abstract_state)[1], values)


def _folder(root: Path, step: int | None) -> Path:
    here = steps(root)
    wanted = latest(root) if step is None else step
    if wanted is None:
        raise ValueError(f"{root} holds no checkpoint: it has no folder global_step_N with a manifest")
    if wanted not in here:
        raise ValueError(f"{root} holds no step {wanted}; it holds {', '.join(map(str, here)) or 'none'}")
    return step_folder(root, wanted)


def _check_names(folder: Path, wanted: Iterable[str], saved: Iterable[str], partial: bool) -> None:
    wanted, saved = set(wanted), set(saved)
    lost = sorted(wanted - saved)
    if lost:
        near = tree.nearest(lost[0], sorted(saved - wanted))
        hint = f"; saved under the name {near!r}?" if near else ""
        raise ValueError(f"{folder} has no leaf {_few(lost)}{hint}")
    unused = sorted(saved - wanted)
    if unused and not partial:
        raise ValueError(
            f"{folder} holds {_few(unused)}, which the state to restore has not: "
            "add it to the state, or pass partial=True to leave it out"
        )


def _few(names: list[str]) -> str:
    return repr(names[0]) + (f" (nor {len(names) - 1} others)" if len(names) > 1 else "")


def _check_leaves(folder: Path, wanted: dict[str, Any], saved: dict[str, ArrayLeaf | Scalar]) -> None:
    for path, leaf in wanted.items():
        here, there = _kind(path, leaf), _kind(path, saved[path])
        if here != there:
            raise ValueError(
                f"{path!r} is {there} in {folder} but {here} in the state to restore: "
                "restore with the configuration it was saved with, and convert afterwards"
            )


def _kind(path: str, leaf: Any) -> str:
    if isinstance(leaf, Tensor):
        return f"{dtype_name(leaf.dtype, path)}{list(leaf.shape)}"
    if isinstance(leaf, ArrayLeaf):
        return f"{leaf.dtype}{list(leaf.shape)}"
    return f"of type {type(leaf).__name__}"


def _check_files(folder: Path, manifest: Manifest, parts: set[str]) -> None:
    """Find missing, short and changed files by name before tensorstore stumbles over them."""
    for name, record in manifest.files.items():
        path = folder / name
        if name.split("/", 1)[0] not in parts:
            continue
        if not path.is_file():
            raise DamagedCheckpoint(f"{path} is missing: restore another step")
        size = path.stat().st_size
        if size != record.bytes:
            raise DamagedCheckpoint(f"{path} has {size} bytes instead of {record.bytes}: restore another step")
        if manifest.checksum and record.sha256 not in (None, manifests.file_digest(path)):
            raise DamagedCheckpoint(f"{path} is damaged (its checksum is wrong): restore another step")


def _read(folder: Path, manifest: Manifest, wanted: dict[str, Tensor], donate: bool) -> dict[str, Tensor]:
    """Read part by part, and within a part in windows, so that host copies of device tensors stay few."""
    found: dict[str, Tensor] = {}
    context = ts.Context()
    for window in _windows(wanted, manifest):
        part = manifest.arrays[window[0]].part
        host = {path: _room(wanted[path], donate) for path in window}
        pieces = {path: [Piece((0,) * room.ndim, as_array(room))] for path, room in host.items()}
        leaves = {path: manifest.arrays[path] for path in window}
        read_part(folder / part, leaves, pieces, manifest.database, manifest.checksum, context)
        for path in window:
            device = wanted[path].device
            found[path] = host[path] if device.type == "meta" else host[path].to(device)
    return found


def _windows(wanted: dict[str, Tensor], manifest: Manifest) -> Iterable[list[str]]:
    """Leaves of one part, in order, of about `_WINDOW_BYTES` together or a single larger one."""
    window: list[str] = []
    size = 0
    for path in sorted(wanted, key=lambda path: manifest.arrays[path].part):
        other_part = bool(window) and manifest.arrays[window[0]].part != manifest.arrays[path].part
        if other_part or (window and size + wanted[path].nbytes > _WINDOW_BYTES):
            yield window
            window, size = [], 0
        window.append(path)
        size += wanted[path].nbytes
    if window:
        yield window


def _room(leaf: Tensor, donate: bool) -> Tensor:
    if donate and leaf.device.type == "cpu" and leaf.is_contiguous() and not isinstance(leaf, FakeTensor):
        return leaf
    return torch.empty(leaf.shape, dtype=leaf.dtype, pin_memory=leaf.device.type == "cuda")
