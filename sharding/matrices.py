"""Work on whole matrices that ranks hold pieces of, divided among those ranks. Without autograd.

A leaf is `[..., I, O]`: the dims before the last two count matrices. Where a piece has whole matrices (experts, divided
along the dim that counts them) a rank works on its own and sends nothing. Where the matrices themselves are divided,
each rank joins some of them, works on those, and sends back the pieces of what came out: two all-to-alls, where a
gather would give every rank every matrix. Ranks that hold copies share the work too where that leaves less to each, and
gather the results, which are then equal to the bit.

Legend: M matrices, m of them one rank's, n ranks, I rows and O columns (whole, or a rank's part of them).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ftrain.sharding.collectives import all_to_all, gather_pieces
from ftrain.sharding.mesh import Mesh
from ftrain.sharding.placement import Placement
from ftrain.sharding.spmd import axis_index, filled

Work = Callable[[Sequence[Tensor]], list[Tensor]]
_Batch = Callable[[Tensor], Tensor]


class _Split(NamedTuple):
    """Rows (dim 1 of `[M, I, O]`) or columns (2) divided over `axes`; there are `whole` of them in all."""

    dim: int
    axes: tuple[str, ...]
    whole: int


class _Kind(NamedTuple):
    """What leaves have in common whose matrices are exchanged together; `matrices` in a piece of each."""

    matrices: int
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    splits: tuple[_Split, ...]
    copies: tuple[str, ...]


def each_matrix(
    work: Work,
    pieces: Sequence[Tensor],
    placements: Sequence[Placement],
    mesh: Mesh,
    *,
    dtype: torch.dtype,
    together: int,
) -> list[Tensor]:
    """This rank's pieces of what `work` makes of the whole matrices of some leaves `[..., I, O]`.

    - `work`: takes a list of `[..., I, O]` and gives as many of the same shapes, in `dtype`; it treats each matrix by
      itself, and zeros, with which a batch is padded, stay zeros.
    - `pieces`, `placements`: of the leaves, in one order.
    - `together`: about how many elements of small matrices are sent at once.

    What is sent, and returned where anything is sent, has the narrower of `dtype` and the piece's own. Leaves of one
    shape go together, so many that every rank has a matrix.
    """
    kinds: dict[_Kind, list[int]] = {}
    for i, (piece, placement) in enumerate(zip(pieces, placements, strict=True)):
        kinds.setdefault(_kind(piece, placement, mesh), []).append(i)
    own = [i for kind, members in kinds.items() if not (kind.splits or kind.copies) for i in members]
    found = dict(zip(own, work([pieces[i] for i in own]), strict=True))
    for kind, members in kinds.items():
        if kind.splits or kind.copies:
            narrow = min(dtype, kind.dtype, key=lambda d: d.itemsize)
            batch = partial(_as_one_batch, work, narrow)
            for some in _groups(members, kind, mesh, together):
                x_MIO = torch.cat([pieces[i].to(narrow).reshape(-1, *kind.shape[-2:]) for i in some])
                with filled(_full(len(x_MIO), kind, mesh)):
                    parts = _among_ranks(batch, x_MIO, kind, mesh).chunk(len(some))
                found.update((i, part.reshape(kind.shape)) for i, part in zip(some, parts, strict=True))
    return [found[i] for i in range(len(pieces))]


def _kind(piece: Tensor, placement: Placement, mesh: Mesh) -> _Kind:
    first = piece.dim() - 2
    matrices = piece.shape[:first].numel()
    splits = tuple(
        _Split(s.dim - first + 1, s.axes, placement.shape[s.dim]) for s in placement.splits if s.dim >= first
    )
    copies = tuple(a for a in placement.copies if mesh.axis_size(a) > 1)
    return _Kind(matrices, piece.shape, piece.dtype, piece.device, splits, copies)


def _groups(members: list[int], kind: _Kind, mesh: Mesh, together: int) -> Iterator[list[int]]:
    """So few leaves at once that gradients need not wait for one another long, and so many that no rank is idle."""
    holders = _ranks(kind.splits, mesh)
    ranks = holders * mesh.group(*kind.copies).size
    wanted = ranks * max(1, together // (holders * kind.shape[-2:].numel()))
    least = -(-wanted // kind.matrices)

    def idle(leaves: int) -> float:
        matrices = leaves * kind.matrices
        return -(-matrices // ranks) * ranks / matrices

    count = min(range(least, 4 * least + 1), key=lambda leaves: (idle(leaves), leaves))
    yield from (members[i : i + count] for i in range(0, len(members), count))


def _full(M: int, kind: _Kind, mesh: Mesh) -> float:
    """The share of matrices among all that the ranks work on, copies of one counted once; the others are padding."""
    copies, n = mesh.group(*kind.copies).size, _ranks(kind.splits, mesh)
    m = _share(_share(M, copies), n)
    return M / (m * n * copies) if m < _share(M, n) else M / (m * n)


def _among_ranks(batch: _Batch, x_MIO: Tensor, kind: _Kind, mesh: Mesh) -> Tensor:
    """Among those that hold copies, if that leaves fewer matrices to each, and among those that hold the pieces."""
    M, copies = x_MIO.shape[0], mesh.group(*kind.copies)
    n = _ranks(kind.splits, mesh)
    for split in kind.splits:
        batch = partial(_among_pieces, batch, split=split, mesh=mesh)
    if _share(_share(M, copies.size), n) == _share(M, n):
        return batch(x_MIO)
    m = _share(M, copies.size)
    mine_m = _place(kind.copies, mesh) * m + torch.arange(m)
    x_mIO = _filled(x_MIO, 0, copies.size * m).index_select(0, mine_m.to(x_MIO.device))
    return gather_pieces(batch(x_mIO), copies, 0, "optimizer_gather").narrow(0, 0, M)


def _among_pieces(batch: _Batch, x_MIO: Tensor, *, split: _Split, mesh: Mesh) -> Tensor:
    """Each rank of the split gets its share of the matrices whole along the split's dim."""
    group, dim = mesh.group(*split.axes), split.dim
    M, m = x_MIO.shape[0], _share(x_MIO.shape[0], group.size)
    part = x_MIO.shape[dim]
    x_nmIO = _filled(x_MIO, 0, group.size * m).unflatten(0, (group.size, m))
    x_nmIO = all_to_all(x_nmIO, group, purpose="optimizer_exchange")
    whole_mIO = x_nmIO.movedim(0, dim).flatten(dim, dim + 1).narrow(dim, 0, split.whole)
    y_mIO = _filled(batch(whole_mIO), dim, group.size * part)
    y_nmIO = y_mIO.unflatten(dim, (group.size, part)).movedim(dim, 0)
    return all_to_all(y_nmIO, group, purpose="optimizer_exchange").flatten(0, 1).narrow(0, 0, M)


def _as_one_batch(work: Work, dtype: torch.dtype, x_mIO: Tensor) -> Tensor:
    """A matrix alone goes as `[I, O]`."""
    found = work([x_mIO])[0] if x_mIO.shape[0] > 1 else work([x_mIO[0]])[0][None]
    return found.to(dtype)


def _share(matrices: int, ranks: int) -> int:
    return -(-matrices // ranks)


def _filled(x: Tensor, dim: int, size: int) -> Tensor:
    """With zeros behind, along `dim`."""
    short = size - x.shape[dim]
    return torch.cat([x, x.new_zeros(*x.shape[:dim], short, *x.shape[dim + 1 :])], dim) if short else x


def _ranks(splits: Sequence[_Split], mesh: Mesh) -> int:
    return math.prod(mesh.group(*s.axes).size for s in splits)


def _place(axes: tuple[str, ...], mesh: Mesh) -> int | Tensor:
    """This rank's place among those that differ in `axes`."""
    place: int | Tensor = 0
    for axis in axes:
        place = place * mesh.axis_size(axis) + axis_index(axis)
    return place
