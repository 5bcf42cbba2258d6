"""Rows between ranks that share a pack: each row goes to the rank that holds its token, and to no other.

`mesh` and `order` are the run's ranks and how those of the sequence axis share a pack's tokens (`Plan.order`).

Legend: n ranks of the sequence axis, T tokens of this rank, P = T * n tokens of the pack, N rows here, R rows received,
D model.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ftrain.kernels.embedding import merge_rows
from ftrain.kernels.moe import permute_rows, restore_rows
from ftrain.kernels.pack import take_rows
from ftrain.kernels.random import Window
from ftrain.sharding.batch import TokenOrder
from ftrain.sharding.collectives import all_to_all, all_to_all_rows
from ftrain.sharding.mesh import Group, Mesh
from ftrain.sharding.sequence_attention import from_pack_order, gather_tokens
from ftrain.sharding.sizes import host_size
from ftrain.sharding.spmd import axis_index


class Route(NamedTuple):
    """Where N rows go.

    - `order_N`: int64, sorts the rows by destination.
    - `send_n`, `receive_n`: int64 on the CPU, how many rows go to and come from each rank.
    - `total`: the sum of `receive_n`, an int or a symbolic one.
    - `place_R`: int64, the token of this rank that each received row belongs to; T for none.
    """

    group: Group
    order_N: Tensor
    send_n: Tensor
    receive_n: Tensor
    total: Any
    place_R: Tensor


def route(place_N: Tensor, tokens: int, *, mesh: Mesh, order: TokenOrder) -> Route:
    """How rows travel whose tokens have the indices `place_N` (int64) in the pack; `tokens` is T.

    A row with index P stays on its own rank and belongs to no token. Two small exchanges; the host reads the counts.
    """
    group, pack = mesh.group("sequence"), tokens * mesh.sequence
    nowhere_N = place_N == pack
    rank_N, at_N = order.owner(place_N.clamp(max=pack - 1), pack)
    rank_N = torch.where(nowhere_N, axis_index("sequence").to(place_N.device), rank_N)
    at_N = torch.where(nowhere_N, tokens, at_N)
    order_N = torch.argsort(rank_N, stable=True)
    send_n = (rank_N[:, None] == torch.arange(group.size, device=place_N.device)).sum(0)
    receive_n = all_to_all(send_n, group, purpose="row_counts")
    send_n, receive_n = torch.stack([send_n, receive_n]).to("cpu").unbind()
    total = host_size(receive_n.sum(), place_N.shape[0])
    place_R = all_to_all_rows(at_N.index_select(0, order_N), send_n, receive_n, total, group, purpose="row_places")
    return Route(group, order_N, send_n, receive_n, total, place_R)


def merge_rows_sharded(x_TD: Tensor, rows_ND: Tensor, place_N: Tensor, *, mesh: Mesh, order: TokenOrder) -> Tensor:
    """`ftrain.kernels.embedding.merge_rows` into the pack: rows of any rank over the tokens of all, `[T, D]`.

    `place_N`: int64, the token of the pack that each row replaces; P for none. At most one row of the pack replaces a
    token. A plan binds the primitive "merge" to it. ValueError on a CPU for an index given twice.
    """
    way = route(place_N, x_TD.shape[0], mesh=mesh, order=order)
    sent_ND = permute_rows(rows_ND, way.order_N)
    got_RD = all_to_all_rows(sent_ND, way.send_n, way.receive_n, way.total, way.group, purpose="merge")
    return merge_rows.local(x_TD, got_RD, way.place_R)  # type: ignore[attr-defined]


def take_rows_sharded(x_TD: Tensor, place_N: Tensor, *, mesh: Mesh, order: TokenOrder) -> Tensor:
    """`ftrain.kernels.pack.take_rows` from the pack: rows of the tokens of all ranks, `[N, D]`, differentiable.

    `place_N`: int64, indices in the pack; P for none, which gives zeros.
    """
    way = route(place_N, x_TD.shape[0], mesh=mesh, order=order)
    asked_RD = take_rows.local(x_TD, way.place_R)  # type: ignore[attr-defined]
    back_ND = all_to_all_rows(asked_RD, way.receive_n, way.send_n, place_N.shape[0], way.group, purpose="take")
    return restore_rows(back_ND, way.order_N)


def following_sharded(x_T: Tensor, *, mesh: Mesh, order: TokenOrder) -> Tensor:
    """`ftrain.kernels.pack.following` of the pack, this rank's rows: shaped as `x_T`.

    The pack is gathered on each rank, so it is for small rows, such as token ids.
    """
    whole_P = gather_tokens(x_T, mesh, order, purpose="following")
    held_P = from_pack_order(torch.roll(whole_P, -1, 0), order)
    tokens = x_T.shape[0]
    mine_T = axis_index("sequence") * tokens + torch.arange(tokens)
    return held_P.index_select(0, mine_T.to(x_T.device))


def pack_index_sharded(tokens: int, device: torch.device, *, mesh: Mesh, order: TokenOrder) -> Tensor:
    """`ftrain.kernels.pack.pack_index` of this rank's tokens: int64 `[T]` on `device`."""
    held_P = order.order(tokens * mesh.sequence)
    return held_P.index_select(0, axis_index("sequence") * tokens + torch.arange(tokens)).to(device)


def draw_over_batch_sharded(
    draw: Callable[..., Tensor], key: Tensor, shape: tuple[int, ...], *, dim: int = 0, mesh: Mesh, order: TokenOrder
) -> Tensor:
    """`ftrain.kernels.pack.draw_over_batch`: this rank's part of the numbers of the whole mesh's batch, of `shape`.

    `key`: int64 `[2]`. `shape` has this rank's tokens along `dim`. One window is drawn for each run of adjacent tokens.
    """
    tokens = shape[dim]
    whole = tuple(tokens * mesh.size if d == dim else n for d, n in enumerate(shape))
    pack_start = axis_index("data") * (tokens * mesh.sequence)
    runs = 2 if order.zigzag and order.ring > 1 else 1
    ring = axis_index("sequence")
    parts = []
    for run in range(runs):
        first = _first_of_run(ring, run, tokens, mesh, order)
        start = tuple(pack_start + first if d == dim else 0 for d in range(len(shape)))
        size = tuple(tokens // runs if d == dim else n for d, n in enumerate(shape))
        parts.append(draw(key, whole, window=Window(start, size)))
    return parts[0] if runs == 1 else torch.cat(parts, dim)


def _first_of_run(rank: Tensor, run: int, tokens: int, mesh: Mesh, order: TokenOrder) -> Tensor:
    """The place in the pack of the first token of the rank's run."""
    held_P = order.order(tokens * mesh.sequence)
    runs = 2 if order.zigzag and order.ring > 1 else 1
    return held_P.index_select(0, (rank * tokens + run * (tokens // runs)).reshape(1))[0]
