"""Which part of an array each rank holds: a slice per rank, read off a DTensor or given by hand."""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

Slice = tuple[tuple[int, int], ...]
"""For each dim the first index and the length: what `sharding.Placement.windows` gives."""


@dataclasses.dataclass(frozen=True)
class Window:
    """An abstract leaf: a part of an array of global `shape`, restored as a CPU tensor of the part's lengths.

    `box` has for each dim the first index and the length.

    Raises:
        ValueError: the box is not inside the array.

    >>> import tempfile, torch
    >>> from ftrain.checkpoint import Window, restore, save
    >>> folder = tempfile.mkdtemp()
    >>> save({"w": torch.arange(12.0).reshape(3, 4)}, folder, 1)
    >>> restore({"w": Window((3, 4), torch.float32, ((1, 2), (0, 2)))}, folder)
    {'w': tensor([[4., 5.],
            [8., 9.]])}
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    box: Slice

    def __post_init__(self) -> None:
        inside = len(self.box) == len(self.shape) and all(
            start >= 0 and length >= 0 and start + length <= size
            for (start, length), size in zip(self.box, self.shape, strict=True)
        )
        if not inside:
            raise ValueError(f"Window: the box {self.box} is not inside an array of shape {list(self.shape)}")


@dataclasses.dataclass(frozen=True)
class ShardLayout:
    """An array of global `shape` that is spread over ranks: this process holds `mine`; `slices` tells what each rank
    holds (ranks that are not in it hold nothing).
    """

    shape: tuple[int, ...]
    mine: Slice
    slices: Mapping[int, Slice]


def whole(shape: Iterable[int]) -> Slice:
    """The slice that is all of an array."""
    return tuple((0, size) for size in shape)


def elements(box: Slice) -> int:
    """How many elements a slice holds."""
    return math.prod(length for _, length in box)


class ShardLayouts:
    """How the DTensors of one state are divided, on all ranks of their meshes, without talking to them.

    A state has thousands of leaves and few ways to divide them; each is worked out once.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[int, tuple[Placement, ...], tuple[int, ...]], ShardLayout] = {}

    def of(self, array: DTensor, local: Tensor, path: str) -> ShardLayout:
        """How `array` is divided, whose part on this process is `local`, of the lengths that `torch.chunk` gives it.

        Raises:
            ValueError: it holds partial sums, is divided in a way that is no box per rank, or `local` has another
                shape; the leaf `path` is named.
        """
        mesh, placements, shape = array.device_mesh, tuple(array.placements), tuple(array.shape)
        key = (id(mesh), placements, shape)
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = _divide(mesh, placements, shape, path)
        held = tuple(local.shape)
        if held != tuple(length for _, length in found.mine):
            raise ValueError(
                f"{path!r} holds {list(held)} on rank {dist.get_rank()}, but {placements} of {list(shape)} over {mesh} "
                f"gives it {found.mine}: its pieces are not those of torch.chunk"
            )
        return found


def _divide(mesh: DeviceMesh, placements: tuple[Placement, ...], shape: tuple[int, ...], path: str) -> ShardLayout:
    odd = [p for p in placements if type(p) not in (Shard, Replicate)]
    if odd:
        raise ValueError(
            f"{path!r} is placed as {placements}: a checkpoint holds arrays that are divided (Shard) or copied "
            f"(Replicate), not {odd[0]}; call .redistribute() on it first"
        )
    ranks = mesh.mesh
    coordinates = itertools.product(*map(range, ranks.shape))
    slices = {
        rank: _box(shape, tuple(ranks.shape), coordinate, placements)
        for rank, coordinate in zip(ranks.flatten().tolist(), coordinates, strict=True)
    }
    return ShardLayout(shape, slices[dist.get_rank()], slices)


def _box(
    shape: tuple[int, ...], sizes: tuple[int, ...], coordinate: tuple[int, ...], placements: tuple[Placement, ...]
) -> Slice:
    """Each axis of the mesh cuts what the axes before it left into blocks of equal length, the last ones shorter."""
    box = list(whole(shape))
    for size, index, placement in zip(sizes, coordinate, placements, strict=True):
        if isinstance(placement, Shard):
            dim = placement.dim % len(shape)
            start, length = box[dim]
            step = -(-length // size)
            skipped = min(length, index * step)
            box[dim] = (start + skipped, min(step, length - skipped))
    return tuple(box)


def grid_piece(shape: tuple[int, ...], slices: Iterable[Slice]) -> tuple[int, ...]:
    """The longest blocks, counted from index 0 of each dim, such that every box begins and ends on their edges."""
    edges: list[set[int]] = [set() for _ in shape]
    for box in set(slices):
        if elements(box):
            for found, (start, length), size in zip(edges, box, shape, strict=True):
                found.update({start, start + length} - {size})
    return tuple(math.gcd(*found) or size for found, size in zip(edges, shape, strict=True))
