"""Norms of trees of gradients, that hold when leaves are shards."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ftrain import tree
from ftrain.kernels.primitive import primitive
from ftrain.kernels.squares import extremes, sums_of_squares
from ftrain.optim.transform import Mask, decays, select
from ftrain.tree import Tree


def global_norm(gradients: Tree, *, mask: Mask = None) -> Tensor:
    """The 2-norm of all leaves together, 0-d: float32, or float64 if a leaf is. A tree without leaves has norm 0.

    `mask` says which leaves count (None: all), such as `optim.trainable(tx, params)`. On a mesh leaves may be shards:
    the norm is that of the whole arrays. The sums of leaves are added in float64: their squares exceed float32 long
    before the norm does. ValueError for a mask of another structure.

    >>> import torch
    >>> from ftrain import optim
    >>> optim.global_norm({"a": torch.tensor([3.0]), "b": torch.tensor([[4.0]])})
    tensor(5.)
    """
    if mask is not None:
        gradients = select(gradients, decays(mask, gradients))
    leaves = tree.leaves(gradients)
    dtype = norm_dtype(gradients)
    if not leaves:
        return torch.zeros((), dtype=dtype)
    return sum_over_shards(sums_of_squares(leaves, torch.float64), leaves).sum().sqrt().to(dtype)


def present(gradients: Tree) -> Tree:
    """For each leaf whether any number of it, on any shard, is not zero: 0-d bools in a tree shaped as `gradients`.

    A parameter that the loss did not use has a gradient of zeros. No leaf may be empty.
    """
    leaves, structure = tree.flatten(gradients)
    if not leaves:
        return gradients
    found_N = (extremes(leaves) != 0).any(dim=1).to(torch.float32)
    return tree.unflatten(structure, (sum_over_shards(found_N, leaves) > 0).unbind())


@primitive("sum_over_shards")
def sum_over_shards(values_N: Tensor, leaves: Sequence[Tensor]) -> Tensor:
    """One number per leaf, `[N]`, summed over the ranks that hold that leaf's shards: the identity on one device."""
    return values_N


def norm_dtype(gradients: Tree) -> torch.dtype:
    """The dtype of `global_norm`: float64 if any leaf is, else float32."""
    wide = any(x.dtype == torch.float64 for x in tree.leaves(gradients))
    return torch.float64 if wide else torch.float32
