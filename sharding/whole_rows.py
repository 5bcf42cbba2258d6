"""Rows of the batch of all ranks, in the batch's order, and a rank's share of such rows.

Legend: "rows" what `ftrain.sharding.batch.BatchRows` divides, "tokens" what `Tokens` does, which may lie in zigzag.
"""

import torch
from torch import Tensor

from ftrain.sharding.batch import TokenOrder
from ftrain.sharding.collectives import all_gather, copy_to_ranks, sum_of_parts
from ftrain.sharding.exchange import pack_index_sharded
from ftrain.sharding.mesh import BASE_AXES, Mesh
from ftrain.sharding.spmd import axis_index

PURPOSE = "batch_rows"
"""What the messages made here are for, in tables of bytes by purpose."""


def whole_rows_sharded(x: Tensor, *, dim: int = 0, mesh: Mesh, order: TokenOrder, tokens: bool = True) -> Tensor:
    """The shares `x` (any shape and dtype, equal on all ranks) of all ranks, joined along `dim` as in the batch.

    Its transpose sums over the ranks. `tokens`: whether the rows are tokens.
    """
    dim %= max(1, x.dim())
    whole = all_gather(x, mesh.group(*BASE_AXES), purpose=PURPOSE, dim=dim)
    if not (tokens and order.zigzag and order.ring > 1):
        return whole
    pack = x.shape[dim] * mesh.sequence
    place_P = order.order(pack).argsort()
    place = torch.cat([place_P + pack * i for i in range(mesh.size // mesh.sequence)])
    return whole.index_select(dim, place.to(x.device))


def share_of_rows(whole: Tensor, size: int, *, dim: int, mesh: Mesh, order: TokenOrder, tokens: bool = True) -> Tensor:
    """This rank's `size` rows, along `dim`, of what `whole_rows_sharded` gives (`whole`, of any shape)."""
    if tokens and order.zigzag and order.ring > 1:
        in_pack_T = pack_index_sharded(size, whole.device, mesh=mesh, order=order)
        return whole.index_select(dim, (axis_index("data") * size * mesh.sequence).to(whole.device) + in_pack_T)
    return whole.index_select(dim, (axis_index("world") * size + torch.arange(size)).to(whole.device))


def mean_of_ranks(x: Tensor, mesh: Mesh) -> Tensor:
    """The average over the ranks of `x` (any shape), which each goes on to use; its transpose is the same."""
    group = mesh.group(*BASE_AXES)
    total = sum_of_parts(x, group, purpose=PURPOSE)
    return (copy_to_ranks(total, group, purpose=PURPOSE) if total.requires_grad else total) / group.size
