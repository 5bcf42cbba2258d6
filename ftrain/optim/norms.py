"""Norms of trees of gradients, that hold when leaves are shards."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ftrain import tree
from ftrain.tree import Tree
from kernels.primitive import primitive
from kernels.squares import sums_of_squares


def global_norm(gradients: Tree) -> Tensor:
    """The 2-norm of all leaves together, 0-d: float32, or float64 if a leaf is. A tree without leaves has norm 0.

    Under a plan, leaves may be shards: the sum of squares of each passes through `sum_over_shards`. The sums of leaves
    are added in float64: their squares pass the range of float32 long before the norm does.
    """
    leaves = tree.leaves(gradients)
    dtype = norm_dtype(gradients)
    if not leaves:
        return torch.zeros((), dtype=dtype)
    return sum_over_shards(sums_of_squares(leaves, torch.float64), leaves).sum().sqrt().to(dtype)


@primitive("sum_over_shards")
def sum_over_shards(values_N: Tensor, leaves: Sequence[Tensor]) -> Tensor:
    """One number per leaf, summed over the ranks that hold that leaf's shards: the identity on one device."""
    return values_N


def norm_dtype(gradients: Tree) -> torch.dtype:
    """The dtype of `global_norm`: float64 if any leaf is, else float32."""
    wide = any(x.dtype == torch.float64 for x in tree.leaves(gradients))
    return torch.float64 if wide else torch.float32
