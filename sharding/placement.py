"""Where the pieces of one array are: which dims are divided over which axes, and what each rank holds."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ftrain.sharding.collectives import all_gather, copy_to_ranks
from ftrain.sharding.mesh import EXPERT_AXES, Mesh
from ftrain.sharding.spmd import axis_index


class Split(NamedTuple):
    """A dim divided into `size` pieces of equal length over `axes`; the last ones are padded.

    `gathered`: pieces are joined before use (FSDP); else each rank computes with its own (experts).
    """

    dim: int
    axes: tuple[str, ...]
    size: int
    gathered: bool = True


@dataclass(frozen=True)
class Placement:
    """Where an array of global `shape` is: its `splits`, and the axes along which ranks hold `copies`.

    A rank's piece is padded with zeros where a dim does not divide evenly, so that all ranks hold equal shapes.

    >>> from ftrain.sharding import Mesh
    >>> from ftrain.sharding.placement import place
    >>> placement = place((10, 6), ("embed", "mlp"), mesh=Mesh(shard=4), parameters=("shard",), experts=False)
    >>> placement.local_shape, placement.windows(Mesh(shard=4), 3)
    ((3, 6), ((9, 1), (0, 6)))
    """

    shape: tuple[int, ...]
    splits: tuple[Split, ...] = ()
    copies: tuple[str, ...] = ()

    @property
    def local_shape(self) -> tuple[int, ...]:
        """The shape of every rank's piece, padding included."""
        sizes = list(self.shape)
        for split in self.splits:
            sizes[split.dim] = -(-sizes[split.dim] // split.size)
        return tuple(sizes)

    @property
    def used_shape(self) -> tuple[int, ...]:
        """The shape that a rank computes with: pieces joined, but for those of experts."""
        sizes = list(self.shape)
        for split in self.splits:
            if not split.gathered:
                sizes[split.dim] //= split.size
        return tuple(sizes)

    @functools.lru_cache(maxsize=1 << 14)  # noqa: B019  # of frozen values, asked for every leaf of every step
    def windows(self, mesh: Mesh, rank: int) -> tuple[tuple[int, int], ...]:
        """For each dim the first index and the length of the part of the array that `rank` of `mesh` holds, padding
        left out.
        """
        found = [(0, size) for size in self.shape]
        for split in self.splits:
            step = self.local_shape[split.dim]
            start = min(self.shape[split.dim], _index(mesh, rank, split.axes) * step)
            found[split.dim] = (start, min(step, self.shape[split.dim] - start))
        return tuple(found)

    def shard(self, whole: Tensor, mesh: Mesh, rank: int) -> Tensor:
        """The piece of `rank` of `mesh`, padded with zeros to `local_shape`, contiguous and in memory of its own.

        `whole`: the array of `shape`, any dtype.
        """
        piece = whole
        for dim, (start, length) in enumerate(self.windows(mesh, rank)):
            piece = piece.narrow(dim, start, length)
        if tuple(piece.shape) == self.local_shape:
            return piece.clone(memory_format=torch.contiguous_format)
        padded = whole.new_zeros(self.local_shape)
        padded[tuple(slice(0, n) for n in piece.shape)] = piece
        return padded

    def join(self, pieces: Sequence[Tensor], mesh: Mesh) -> Tensor:
        """The whole array, of `shape` and the pieces' dtype, from the pieces of all ranks of `mesh` in order.

        `pieces`: of `local_shape`, padded; of copies the first is taken.
        """
        if not self.splits:
            return pieces[0]
        whole = pieces[0].new_empty(self.shape)
        seen = set()
        for rank, piece in enumerate(pieces):
            windows = self.windows(mesh, rank)
            if windows not in seen:
                seen.add(windows)
                at = tuple(slice(start, start + length) for start, length in windows)
                whole[at] = piece[tuple(slice(0, length) for _, length in windows)]
        return whole

    def starts(self) -> tuple[int | Tensor, ...]:
        """The global index of this rank's first element in each dim, 0-d int64 in a trace (see `axis_index`)."""
        found: list[int | Tensor] = [0] * len(self.shape)
        for split in self.splits:
            found[split.dim] = axis_index("+".join(split.axes)) * self.local_shape[split.dim]
        return tuple(found)


def place(
    shape: Sequence[int], axes: Sequence[str | None], *, mesh: Mesh, parameters: tuple[str, ...], experts: bool
) -> Placement:
    """The placement of a parameter of `shape` whose dims mean `axes` (words of `ftrain.sharding.logical_axes`).

    With `experts` a dim called "expert" is divided over the axis of experts, and the rest over `expert_shard`. The
    other division, over the axes `parameters`, takes the first dim that pays, but never one whose meaning is None, nor
    a stack of layers, which is read layer by layer. Axes of size 1 divide nothing. ValueError where the experts do not
    divide.
    """
    shape = tuple(shape)
    splits: list[Split] = []
    base: tuple[str, ...] = ("replicate", "shard", "sequence")
    if experts and "expert" in axes and mesh.expert > 1:
        dim = list(axes).index("expert")
        if shape[dim] % mesh.expert:
            raise ValueError(f"{shape[dim]} experts cannot be divided over expert={mesh.expert} ranks")
        splits.append(Split(dim, ("expert",), mesh.expert, gathered=False))
        parameters = ("expert_shard",) if parameters else ()
        base = tuple(a for a in EXPERT_AXES if a != "expert")
    size = math.prod(mesh.axis_size(a) for a in parameters)
    taken = {s.dim for s in splits} | {d for d, axis in enumerate(axes) if axis in (None, "layers")}
    divided = _fsdp_dim(shape, size, taken) if size > 1 else None
    if divided is not None:
        splits.append(Split(divided, parameters, size))
    copies = tuple(a for a in base if mesh.axis_size(a) > 1 and (divided is None or a not in parameters))
    return Placement(shape, tuple(splits), copies)


def _fsdp_dim(shape: tuple[int, ...], size: int, taken: set[int]) -> int | None:
    """The dim to divide: the first (gathered without a copy) unless padding would cost much, and another is even."""
    free = [d for d in range(len(shape)) if d not in taken]
    if not free:
        return None
    even = [d for d in free if shape[d] % size == 0]
    if free[0] in even or not even:
        return free[0] if free[0] in even else max(free, key=lambda d: shape[d])
    return free[0] if shape[free[0]] >= 8 * size else even[0]


def use(
    piece: Tensor,
    placement: Placement,
    mesh: Mesh,
    *,
    dtype: torch.dtype | None = None,
    reduce: torch.dtype | None = None,
) -> Tensor:
    """The parameter as a rank computes with it, of `used_shape`, in `dtype` (cast before it is sent; None: its own).

    `piece`: this rank's, of `local_shape`. Its transpose sums gradients in `reduce` over the ranks whose data they come
    from, and divides them again.
    """
    if placement.copies:
        group = mesh.group(*placement.copies)
        piece = copy_to_ranks(piece, group, purpose="gradient_sum", reduce=reduce)
    for split in placement.splits:
        if split.gathered:
            group = mesh.group(*split.axes)
            piece = all_gather(piece, group, purpose="fsdp_gather", dim=split.dim, dtype=dtype, reduce=reduce)
            if piece.shape[split.dim] != placement.shape[split.dim]:
                piece = piece.narrow(split.dim, 0, placement.shape[split.dim])
    return piece if dtype is None else piece.to(dtype)


def _index(mesh: Mesh, rank: int, axes: tuple[str, ...]) -> int:
    index = 0
    for axis in axes:
        index = index * mesh.axis_size(axis) + mesh.coordinate(rank, axis)
    return index
