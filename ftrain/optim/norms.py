"""Norms of trees of gradients, that hold when leaves are shards."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ftrain import tree
from ftrain.optim.transform import state_dtype
from ftrain.tree import Tree
from kernels.primitive import primitive

LONGEST_RUN = 2**16  # a float32 running sum of more equal terms than this loses its third digit


def global_norm(gradients: Tree) -> Tensor:
    """The 2-norm of all leaves together, 0-d: float32, or float64 if a leaf is. A tree without leaves has norm 0.

    Under a plan, leaves may be shards: the sum of squares of each passes through `sum_over_shards`.
    """
    leaves = tree.leaves(gradients)
    dtype = norm_dtype(gradients)
    if not leaves:
        return torch.zeros((), dtype=dtype)
    squares_N = torch.stack([sum_of_squares(g).to(dtype) for g in leaves])
    return sum_over_shards(squares_N, leaves).sum().sqrt()


@primitive("sum_over_shards")
def sum_over_shards(values_N: Tensor, leaves: Sequence[Tensor]) -> Tensor:
    """One number per leaf, summed over the ranks that hold that leaf's shards: the identity on one device."""
    return values_N


def sum_of_squares(x: Tensor) -> Tensor:
    """The sum of all squares, 0-d, at least float32, in one pass where that is exact enough.

    `vector_norm` reads once but keeps one running sum per lane (2% low for 1e8 equal float32), so it only runs along a
    contiguous dim of moderate length; `sum` adds pairwise.
    """
    dtype = state_dtype(x.dtype)
    along = min(range(x.ndim), key=x.stride, default=None)
    if along is not None and 0 < x.shape[along] <= LONGEST_RUN and x.stride(along) == 1:
        return torch.linalg.vector_norm(x, dim=along, dtype=dtype).square().sum()
    x = x.to(dtype)
    return (x * x).sum()


def norm_dtype(gradients: Tree) -> torch.dtype:
    """The dtype of `global_norm`: float64 if any leaf is, else float32."""
    wide = any(x.dtype == torch.float64 for x in tree.leaves(gradients))
    return torch.float64 if wide else torch.float32
