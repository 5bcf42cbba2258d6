"""Who writes what: every part of every array once, and copies divided fairly among the ranks that hold them."""

import math

from ftrain.checkpoint.boxes import Box, Division, elements, grid_piece, whole
from ftrain.checkpoint.chunks import chunk_shape
from ftrain.checkpoint.dtypes import dtype_name
from ftrain.checkpoint.folders import part_of, storage_key
from ftrain.checkpoint.leaves import Leaves
from ftrain.checkpoint.manifest import ArrayLeaf

Holders = dict[Box, list[int]]


def stored_arrays(leaves: Leaves, chunk_bytes: int) -> dict[str, ArrayLeaf]:
    """How each tensor will be stored: with its global shape, in chunks none of which two ranks have to share.

    One array per leaf, whatever the mesh: another mesh, one process, or anyone's zarr reads it as it is. The price is
    that chunks must divide the ranks' pieces, so they can be smaller than `chunk_bytes`.
    """
    found = {}
    pieces: dict[int, tuple[int, ...]] = {}
    for path, tensor in leaves.tensors.items():
        division = leaves.divisions.get(path)
        if division is None:
            shape = piece = tuple(tensor.shape)
        else:
            # Leaves of one shape share their boxes.
            key, shape = id(division.boxes), division.shape
            piece = pieces[key] if key in pieces else pieces.setdefault(key, grid_piece(shape, division.boxes.values()))
        found[path] = ArrayLeaf(
            part=part_of(path),
            key=storage_key(path),
            shape=shape,
            dtype=dtype_name(tensor.dtype, path),
            chunk=chunk_shape(shape, piece, itemsize=tensor.itemsize, limit=chunk_bytes),
        )
    return found


def divide_work(leaves: Leaves, world: int) -> list[dict[str, Box]]:
    """For each of `world` ranks the boxes that it writes, by path; every rank finds the same.

    What only one rank holds is that rank's; of what several hold, the largest first goes to the one that has the
    fewest bytes so far.
    """
    loads = [0] * world
    work: list[dict[str, Box]] = [{} for _ in range(world)]
    tasks = []
    known: dict[int, Holders] = {}
    for path, tensor in leaves.tensors.items():
        division = leaves.divisions.get(path)
        if division is None:
            holders = _all_hold(tuple(tensor.shape), world)
        else:
            key = id(division.boxes)
            holders = known[key] if key in known else known.setdefault(key, _holders(division))
        for box, ranks in holders.items():
            tasks.append((len(ranks) > 1, -elements(box) * tensor.itemsize, path, box, ranks))
    for _, minus_bytes, path, box, ranks in sorted(tasks, key=lambda task: task[:4]):
        writer = min(ranks, key=loads.__getitem__)
        loads[writer] -= minus_bytes
        work[writer][path] = box
    return work


def _all_hold(shape: tuple[int, ...], world: int) -> Holders:
    return {whole(shape): list(range(world))} if math.prod(shape) else {}


def _holders(division: Division) -> Holders:
    found: Holders = {}
    for rank, box in division.boxes.items():
        if elements(box):
            found.setdefault(box, []).append(rank)
    return found
