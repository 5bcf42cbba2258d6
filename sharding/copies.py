"""Checks of what processes were given: copies of a leaf must be equal, shares of a batch must differ."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ftrain.sharding.bits import hash_bits
from ftrain.sharding.mesh import Mesh
from ftrain.sharding.placement import Placement


class Held(NamedTuple):
    """What this process holds of a leaf; `placement` None means its own share of the batch."""

    path: str
    piece: Tensor
    placement: Placement | None


class Copy(NamedTuple):
    """Two ranks that hold the same part of a leaf, and not the same numbers."""

    path: str
    ranks: tuple[int, int]


def compare_processes(held: Sequence[Held], mesh: Mesh) -> tuple[Copy | None, bool]:
    """The first leaf whose copies differ, and whether all data ranks were given one and the same batch.

    All processes call this together, with the same leaves. Copies are compared by a 64-bit hash of their bits.
    """
    copied = [h for h in held if h.placement is None or _has_copies(h.placement, mesh)]
    if not copied:
        return None, False
    own_L = torch.stack([hash_bits(h.piece).cpu() for h in copied])
    hashes_RL = _gather(own_L)
    shares = [i for i, h in enumerate(copied) if h.placement is None]
    packs = range(0, mesh.size, mesh.sequence)
    same = len(packs) > 1 and bool(shares) and all(len({hashes_RL[r][i] for r in packs}) == 1 for i in shares)
    for i, leaf in enumerate(copied):
        first: dict[tuple[tuple[int, int], ...], int] = {}
        for rank in range(mesh.size) if leaf.placement is not None else ():
            other = first.setdefault(leaf.placement.windows(mesh, rank), rank)  # type: ignore[union-attr]
            if hashes_RL[other][i] != hashes_RL[rank][i]:
                return Copy(leaf.path, (other, rank)), same
    return None, same


def _has_copies(placement: Placement, mesh: Mesh) -> bool:
    return len({placement.windows(mesh, rank) for rank in range(mesh.size)}) < mesh.size


def _gather(own_L: Tensor) -> list[list[int]]:
    """The hashes of all ranks, `[rank][leaf]`."""
    own_L = own_L.cuda() if dist.get_backend() == "nccl" else own_L
    found = [torch.empty_like(own_L) for _ in range(dist.get_world_size())]
    dist.all_gather(found, own_L)
    return [row.tolist() for row in found]
