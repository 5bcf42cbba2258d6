"""Checkpoints written and read part by part, for states that are larger than memory.

What is written is what `ftrain.checkpoint.save` writes, and what is read is checked as `restore` checks it.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from ftrain.checkpoint import manifest as manifests
from ftrain.checkpoint.ages import next_order
from ftrain.checkpoint.arrays import DEFAULT_STORAGE, Piece, Storage, write_part
from ftrain.checkpoint.checked import read_checked
from ftrain.checkpoint.direct import tree_bytes
from ftrain.checkpoint.dtypes import DTYPES, as_array
from ftrain.checkpoint.errors import DamagedCheckpoint
from ftrain.checkpoint.extents import extents
from ftrain.checkpoint.folders import step_number
from ftrain.checkpoint.leaves import Leaves
from ftrain.checkpoint.manifest import ArrayLeaf, Manifest
from ftrain.checkpoint.open_store import StoreLike, open_store
from ftrain.checkpoint.placed import parameters_of
from ftrain.checkpoint.read import check_files, existing
from ftrain.checkpoint.shard_assignment import stored_arrays
from ftrain.checkpoint.shard_layout import Slice
from ftrain.checkpoint.store import NewStep, join
from ftrain.checkpoint.sums import chunk_sums, joined


@dataclass(frozen=True)
class Range:
    """A part of an array: `length` indices of `dim` from `start` on, other dims whole; of a scalar all there is."""

    dim: int
    start: int
    length: int

    def box(self, shape: tuple[int, ...]) -> Slice:
        """For each dim the first index and the length."""
        box = [(0, size) for size in shape]
        if shape:
            box[self.dim] = (self.start, self.length)
        return tuple(box)


Group = dict[str, Range]


def save_stream(
    root: StoreLike,
    step: int,
    leaves: Mapping[str, Tensor],
    produce: Callable[[Group], Mapping[str, Tensor]],
    *,
    limit: int,
    storage: Storage = DEFAULT_STORAGE,
    specs: Any = None,
) -> None:
    """Save step `step` of `root` as `checkpoint.save` does, never holding more than about `limit` bytes of it.

    `leaves` describes the state: a tensor on meta for each dotted path. `produce` is asked for one group of parts after
    the other, in the order of `leaves`, and gives their contiguous values on the CPU. What it raises leaves `root` as
    it was. `specs` as for `Checkpointer`.

    Raises:
        ValueError: another run writes into `root`.
        OSError: the disk is full, the folder is read-only, ...
    """
    step, store = step_number(step), open_store(root)
    arrays = stored_arrays(Leaves(dict(leaves), {}), storage.chunk_bytes)
    lock = store.lock()
    try:
        new = store.begin(step)
        try:
            sums = _write(new, arrays, produce, leaves, limit, storage)
            made = Manifest(
                step=step,
                database=storage.database,
                checksum=storage.checksum,
                arrays=arrays,
                scalars={},
                metrics={},
                files=new.records(),
                base=new.base,
                parameters=parameters_of(specs),
                order=next_order(store),
                sums=joined(arrays, [sums]) if storage.checksum else {},
            )
            new.commit(manifests.dumps(made))
        except BaseException:
            new.abort()
            raise
    finally:
        lock.release()


class SavedArrays:
    """The arrays of one step below a path of the state, read part by part; `arrays` describes them by full path.

    A context manager. What is read is of one version of the step, or an error.
    """

    def __init__(self, root: StoreLike, step: int, below: str) -> None:
        """Read the manifest, and see that the files that hold these arrays are there, as they were written.

        Raises:
            ValueError: there is no such step, or nothing below that path.
            DamagedCheckpoint: the manifest or a file is missing or was changed; it is named.
        """
        store = open_store(root)
        self._held = store.hold(existing(store, step))
        try:
            manifest = manifests.read(self._held)
            self.arrays = {path: leaf for path, leaf in manifest.arrays.items() if path.startswith(f"{below}.")}
            if not self.arrays:
                tops = sorted({path.split(".")[0] for path in manifest.arrays})
                raise ValueError(
                    f"step {step} of {store.show()} has no tensors below {below!r}; it has {', '.join(tops)}"
                )
            self._manifest, self._context = manifest, self._held.context()
            self._check({leaf.part for leaf in self.arrays.values()})
        except BaseException:
            self._held.close()
            raise

    def __enter__(self) -> "SavedArrays":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._held.close()

    def _check(self, parts: set[str]) -> None:
        """Files as recorded, and trees that neither lead elsewhere nor unpack to more than they may."""
        check_files(self._held, self._manifest, parts)
        for part in parts if self._manifest.database else ():
            name = join([self._manifest.base, part])
            files = self._held.files(name)
            try:
                if files is not None:
                    extents(self._held.kvstore(name), self._context, files, limit=tree_bytes(self._manifest))
            except (ValueError, OSError) as error:
                raise DamagedCheckpoint(f"{self._held.show(name)} is damaged: {error}; convert another step") from error

    def read(self, group: Group) -> dict[str, Tensor]:
        """The values of these parts, on the CPU.

        Raises:
            DamagedCheckpoint: a chunk is missing or was changed; its leaf is named.
        """
        found: dict[str, Tensor] = {}
        for path, part in group.items():
            leaf = self.arrays[path]
            box = part.box(leaf.shape)
            found[path] = torch.empty([length for _, length in box], dtype=DTYPES[leaf.dtype])
            pieces = {path: [Piece(tuple(start for start, _ in box), as_array(found[path]))]}
            name = join([self._manifest.base, leaf.part])
            where, shown = self._held.kvstore(name), self._held.show(name)
            read_checked(where, {path: leaf}, pieces, self._manifest, self._context, shown)
        if not self._held.is_frozen and self._held.is_replaced():
            raise DamagedCheckpoint(f"{self._held.show()} was saved again while it was read: convert it once more")
        return found


def groups(
    sizes: Mapping[str, tuple[int, ...]], item: Mapping[str, int], grain: Mapping[str, Range], limit: int
) -> Iterator[Group]:
    """Parts of arrays, all of each array together, in groups of about `limit` bytes or a single smallest part.

    `sizes` are shapes, `item` bytes per element; `grain` says along which dim an array may be divided, and the `length`
    of which every part but the last must be a multiple.
    """
    group: Group = {}
    room = limit
    for path, shape in sizes.items():
        nbytes = math.prod(shape) * item[path]
        if group and nbytes > room:
            yield group
            group, room = {}, limit
        if nbytes <= limit or not shape:
            group[path] = Range(grain[path].dim, 0, shape[grain[path].dim] if shape else 1)
            room -= nbytes
            continue
        dim, unit = grain[path].dim, grain[path].length
        row = nbytes // shape[dim]
        length = max(unit, limit // row // unit * unit)
        for start in range(0, shape[dim], length):
            yield {path: Range(dim, start, min(length, shape[dim] - start))}
    if group:
        yield group


def _write(
    new: NewStep,
    arrays: Mapping[str, ArrayLeaf],
    produce: Callable[[Group], Mapping[str, Tensor]],
    leaves: Mapping[str, Tensor],
    limit: int,
    storage: Storage,
) -> dict[str, dict[int, int]]:
    """Write all groups; the sums of their chunks."""
    context = new.context()
    sums: dict[str, dict[int, int]] = {path: {} for path in arrays}
    grain = {path: Range(0, 0, leaf.chunk[0] if leaf.chunk else 1) for path, leaf in arrays.items()}
    items = {path: tensor.itemsize for path, tensor in leaves.items()}
    begun: set[str] = set()
    for group in groups({path: leaf.shape for path, leaf in arrays.items()}, items, grain, limit):
        values = produce(group)
        for part in sorted({arrays[path].part for path in group}):
            here = [path for path in group if arrays[path].part == part]
            pieces = {p: [Piece(tuple(s for s, _ in group[p].box(arrays[p].shape)), as_array(values[p]))] for p in here}
            for path in here if storage.checksum else ():
                sums[path] |= chunk_sums(arrays[path], pieces[path][0])
            for create in (True, False):
                some = {path: arrays[path] for path in here if (path not in begun) == create}
                if some:
                    write_part(new.kvstore(part), some, pieces, storage, context, create=create)
        begun.update(group)
    return sums
