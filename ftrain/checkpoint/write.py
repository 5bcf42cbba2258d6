"""Commit one checkpoint: everything under a temporary name, synced, then the manifest, then two renames."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ftrain.checkpoint import manifest as manifests
from ftrain.checkpoint.arrays import DEFAULT_STORAGE, Piece, Storage, write_part
from ftrain.checkpoint.clean import remove_leftovers
from ftrain.checkpoint.dtypes import as_array
from ftrain.checkpoint.durable import make_folder, publish, sync_tree, write_text
from ftrain.checkpoint.folders import LATEST, MANIFEST, step_folder, temporary
from ftrain.checkpoint.leaves import Leaves, array_leaf, named_leaves
from ftrain.checkpoint.lock import WriterLock
from ftrain.checkpoint.manifest import FileRecord, Manifest

_HASHED_BYTES = 2**20


def save(
    state: Any,
    root: str | Path,
    step: int,
    *,
    metrics: Mapping[str, float] | None = None,
    storage: Storage = DEFAULT_STORAGE,
) -> None:
    """Save a tree as step `step` of `root` and return when it is on the disk. `Checkpointer` does so in background.

    Raises:
        ValueError: a leaf cannot be saved, or another run writes into `root`.
        OSError: the disk is full, the folder is read-only, ...; what was saved before is untouched.
    """
    leaves = named_leaves(state)
    make_folder(Path(root))
    lock = WriterLock(Path(root))
    try:
        remove_leftovers(Path(root))
        write_checkpoint(Path(root), step, leaves, storage=storage, metrics=metrics or {})
    finally:
        lock.release()


def write_checkpoint(root: Path, step: int, leaves: Leaves, *, storage: Storage, metrics: Mapping[str, float]) -> None:
    """Write the leaves as step `step` of `root`; when this returns, they survive a power cut.

    The order makes a step exist or not: data, sync, manifest, sync, rename to `global_step_N`, sync, replace
    `latest_checkpointed_iteration.txt` by rename, sync. A crash leaves the previous `latest` and a folder with a
    temporary name. Tensors on the CPU that are contiguous are read where they lie.
    """
    made = temporary(step_folder(root, step))
    made.mkdir()
    try:
        _fill(made, step, leaves, storage, metrics)
        publish(made, step_folder(root, step))
        write_text(root / LATEST, f"{step}\n")
    except BaseException:
        # What could not be written is removed at once: on a full disk, room for the next try. A second error here would
        # hide the first, and the next save cleans up anyway.
        shutil.rmtree(made, ignore_errors=True)
        raise


def _fill(made: Path, step: int, leaves: Leaves, storage: Storage, metrics: Mapping[str, float]) -> None:
    arrays = {path: array_leaf(path, tensor, storage.chunk_bytes) for path, tensor in leaves.tensors.items()}
    pieces = {path: [_whole_piece(tensor)] for path, tensor in leaves.tensors.items()}
    for part in sorted({leaf.part for leaf in arrays.values()}):
        write_part(made / part, {path: leaf for path, leaf in arrays.items() if leaf.part == part}, pieces, storage)
    sync_tree(made)
    manifest = Manifest(
        step=step,
        database=storage.database,
        checksum=storage.checksum,
        arrays=arrays,
        scalars=leaves.scalars,
        metrics=dict(metrics),
        files=_records(made),
    )
    write_text(made / MANIFEST, manifests.dumps(manifest))


def _whole_piece(tensor: Tensor) -> Piece:
    values = as_array(tensor.to("cpu", memory_format=torch.contiguous_format).resolve_conj().resolve_neg().contiguous())
    return Piece((0,) * values.ndim, values)


def _records(folder: Path) -> dict[str, FileRecord]:
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        size = path.stat().st_size
        digest = manifests.file_digest(path) if size <= _HASHED_BYTES else None
        found[path.relative_to(folder).as_posix()] = FileRecord(size, digest)
    return found
