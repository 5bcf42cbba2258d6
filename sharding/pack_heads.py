"""What reads a pack head by head, on ranks that share its tokens: each gets some heads of all tokens, as in Ulysses.

`mesh` and `order` are the run's ranks and how those of the sequence axis share a pack's tokens (`Plan.order`).

Legend: n ranks of the sequence axis, T tokens of this rank, P = T * n tokens of the pack, H heads, h = H / n, C numbers
of a head.
"""

from torch import Tensor

from ftrain.sharding.batch import TokenOrder
from ftrain.sharding.collectives import all_to_all
from ftrain.sharding.mesh import Mesh
from ftrain.sharding.sequence_attention import from_pack_order, to_pack_order
from ftrain.sharding.spmd import axis_index
from ftrain.sharding.ulysses import PURPOSE, heads_to_tokens


def divide_heads_sharded(x_THC: Tensor, *, mesh: Mesh, order: TokenOrder) -> Tensor:
    """`ftrain.kernels.pack.divide_heads`: `[P, h, C]`, differentiable. ValueError where the ranks do not divide H."""
    send_nThC = _dealt(x_THC, 1, mesh).transpose(0, 1).contiguous()
    return to_pack_order(all_to_all(send_nThC, mesh.group("sequence"), purpose=PURPOSE).flatten(0, 1), order)


def join_heads_sharded(x_PhC: Tensor, *, mesh: Mesh, order: TokenOrder) -> Tensor:
    """`ftrain.kernels.pack.join_heads`: `[T, H, C]`, differentiable."""
    return heads_to_tokens(from_pack_order(x_PhC, order), group=mesh.group("sequence"))


def own_heads_sharded(x_H: Tensor, *, mesh: Mesh) -> Tensor:
    """`ftrain.kernels.pack.own_heads`: `[h, ...]`, differentiable. ValueError where the ranks do not divide H."""
    return _dealt(x_H, 0, mesh).index_select(0, axis_index("sequence").reshape(1).to(x_H.device))[0]


def _dealt(x: Tensor, dim: int, mesh: Mesh) -> Tensor:
    """The dim of H heads as two, of n ranks and h heads."""
    if x.shape[dim] % mesh.sequence:
        raise ValueError(f"{x.shape[dim]} heads do not divide over a sequence axis of {mesh.sequence}")
    return x.unflatten(dim, (mesh.sequence, -1))
