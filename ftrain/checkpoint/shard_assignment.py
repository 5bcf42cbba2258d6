"""Who writes what: every part of every array once, and copies divided fairly among the ranks that hold them."""

import math

from ftrain.checkpoint.chunks import chunk_shape
from ftrain.checkpoint.dtypes import dtype_name
from ftrain.checkpoint.folders import part_of, storage_key
from ftrain.checkpoint.leaves import Leaves
from ftrain.checkpoint.manifest import ArrayLeaf
from ftrain.checkpoint.shard_layout import ShardLayout, Slice, elements, grid_piece, whole

Holders = dict[Slice, list[int]]


def stored_arrays(leaves: Leaves, chunk_bytes: int) -> dict[str, ArrayLeaf]:
    """How each tensor will be stored: with its global shape, in chunks none of which two ranks have to share.

    One array per leaf, whatever the mesh: another mesh, one process, or anyone's zarr reads it as it is. The price is
    that chunks must divide the ranks' pieces, so they can be smaller than `chunk_bytes`.
    """
    found = {}
    pieces: dict[int, tuple[int, ...]] = {}
    for path, tensor in leaves.tensors.items():
        layout = leaves.layouts.get(path)
        if layout is None:
            shape = piece = tuple(tensor.shape)
        else:
            # Leaves of one shape share their slices.
            key, shape = id(layout.slices), layout.shape
            piece = pieces[key] if key in pieces else pieces.setdefault(key, grid_piece(shape, layout.slices.values()))
        found[path] = ArrayLeaf(
            part=part_of(path),
            key=storage_key(path),
            shape=shape,
            dtype=dtype_name(tensor.dtype, path),
            chunk=chunk_shape(shape, piece, itemsize=tensor.itemsize, limit=chunk_bytes),
        )
    return found


def assign_shards(leaves: Leaves, world: int) -> list[dict[str, Slice]]:
    """For each of `world` ranks the slices that it writes, by path; every rank finds the same.

    What only one rank holds is that rank's; of what several hold, the largest first goes to the one that has the
    fewest bytes so far.
    """
    loads = [0] * world
    work: list[dict[str, Slice]] = [{} for _ in range(world)]
    tasks = []
    known: dict[int, Holders] = {}
    for path, tensor in leaves.tensors.items():
        layout = leaves.layouts.get(path)
        if layout is None:
            holders = _all_hold(tuple(tensor.shape), world)
        else:
            key = id(layout.slices)
            holders = known[key] if key in known else known.setdefault(key, _holders(layout))
        for box, ranks in holders.items():
            tasks.append((len(ranks) > 1, -elements(box) * tensor.itemsize, path, box, ranks))
    for _, minus_bytes, path, box, ranks in sorted(tasks, key=lambda task: task[:4]):
        writer = min(ranks, key=loads.__getitem__)
        loads[writer] -= minus_bytes
        work[writer][path] = box
    return work


def _all_hold(shape: tuple[int, ...], world: int) -> Holders:
    return {whole(shape): list(range(world))} if math.prod(shape) else {}


def _holders(layout: ShardLayout) -> Holders:
    found: Holders = {}
    for rank, box in layout.slices.items():
        if elements(box):
            found.setdefault(box, []).append(rank)
    return found
