"""What an optimizer needs of leaves that are pieces of arrays, where it looks beyond single numbers. Without autograd.

A piece is padded with zeros where a dim does not divide; nothing here counts the padding.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ftrain.sharding.collectives import gather_pieces, sum_over
from ftrain.sharding.mesh import Mesh
from ftrain.sharding.placement import Placement


def sum_over_shards(values_N: Tensor, placements: Sequence[Placement], mesh: Mesh) -> Tensor:
    """One number per leaf, `[N]`, summed over the ranks that hold the leaf's pieces; copies are not counted twice."""
    over = [_axes(p) for p in placements]
    out_N = values_N
    for axes in sorted({a for a in over if a}):
        mine_N = torch.tensor([a == axes for a in over], device=values_N.device)
        out_N = torch.where(mine_N, sum_over(values_N, mesh.group(*axes), None, "norm"), out_N)
    return out_N


def whole_of(piece: Tensor, placement: Placement, mesh: Mesh, *, why: str = "optimizer_gather") -> Tensor:
    """The array of which `piece` (of the placement's `local_shape`) is a part; of a dim of experts each rank keeps its
    own. `why`: the purpose of its collectives.
    """
    for split in placement.splits:
        if split.gathered:
            piece = gather_pieces(piece, mesh.group(*split.axes), split.dim, why)
            piece = piece.narrow(split.dim, 0, placement.shape[split.dim])
    return piece


def piece_of(whole: Tensor, placement: Placement) -> Tensor:
    """This rank's piece, of the placement's `local_shape`, of what `whole_of` gives (of its `used_shape`)."""
    starts = placement.starts()
    for split in placement.splits:
        if split.gathered:
            length = placement.local_shape[split.dim]
            short = length * split.size - whole.shape[split.dim]
            if short:
                padding = [(0, short) if d == split.dim else (0, 0) for d in reversed(range(whole.dim()))]
                whole = torch.nn.functional.pad(whole, [n for pair in padding for n in pair])
            index = starts[split.dim] + torch.arange(length)
            whole = whole.index_select(split.dim, index.to(whole.device))
    return whole


def fill_padding(piece: Tensor, dim: int, start: int | Tensor, size: int, fill: float) -> Tensor:
    """A piece (any shape) that begins at index `start` (int or 0-d int64) of `size` along `dim`, its padding set to
    `fill`.
    """
    inside = (start + torch.arange(piece.shape[dim]) < size).to(piece.device)
    return torch.where(
        inside.view([-1 if d == dim else 1 for d in range(piece.dim())]), piece, _number(fill, piece.dtype)
    )


def _number(fill: float, dtype: torch.dtype) -> float | int | bool:
    """A number that a dtype holds, so that filling changes no dtype: its least or largest for an infinity."""
    if dtype == torch.bool:
        return fill > 0
    if dtype.is_floating_point or dtype.is_complex:
        return fill
    return int(fill) if math.isfinite(fill) else torch.iinfo(dtype).max if fill > 0 else torch.iinfo(dtype).min


def mean_over(x: Tensor, dims: Sequence[int], placement: Placement, mesh: Mesh) -> Tensor:
    """The mean over these dims of the whole array, kept as dims of size 1, in the dtype of `x`.

    `x`: this rank's piece, of the placement's `local_shape`, padded with zeros. `mesh`: of the placement.
    """
    total = x.sum(tuple(dims), keepdim=True)
    count = 1
    for dim in dims:
        count *= placement.shape[dim]
    for split in placement.splits:
        if split.dim in dims:
            total = sum_over(total, mesh.group(*split.axes), None, "norm")
    return total / count


def _axes(placement: Placement) -> tuple[str, ...]:
    """The axes over which an array is divided, in one order."""
    found = {a for s in placement.splits for a in s.axes}
    if found == {"expert", "expert_shard"}:
        return ("expert_shard", "expert")
    return tuple(a for a in ("replicate", "shard", "sequence", "expert_shard", "expert") if a in found)
