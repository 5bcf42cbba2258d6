"""Whole arrays of pieces that ranks hold, and pieces of whole arrays."""

from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def gathered(x: Tensor) -> Tensor:
    """The whole array: of pieces, sums of products would be rounded otherwise than on one device. Ranks call this
    together.
    """
    return x.full_tensor() if isinstance(x, DTensor) else x


def divided(x: Tensor, like: Tensor) -> Tensor:
    """The array divided as the leaf `like`, of the same shape, is. Each rank has the whole."""
    if not isinstance(like, DTensor):
        return x
    return distribute_tensor(x, like.device_mesh, like.placements, src_data_rank=None)


def write(into: Tensor, whole: Tensor) -> None:
    """Write the whole array into a leaf, each rank its own part."""
    if isinstance(into, DTensor):
        own = distribute_tensor(whole.to(into.device), into.device_mesh, into.placements, src_data_rank=None)
        into.to_local().copy_(own.to_local())
    else:
        into.copy_(whole)
