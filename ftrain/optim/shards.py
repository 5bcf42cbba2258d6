"""What an optimizer needs beyond single numbers, where leaves may be pieces of arrays: identities on one device.

`leaf` is always a parameter, a gradient or a state leaf, or something computed from one: a plan finds by it how the
array is divided.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ftrain.kernels import random
from ftrain.kernels.primitive import primitive


@primitive("whole_leaf")
def whole_leaf(piece: Tensor, leaf: Tensor) -> Tensor:
    """The array of which `piece` is a part as `leaf` is of its own; a dim of experts stays each rank's own.

    `piece`, `leaf`: equal shapes. On one device it is `piece`.
    """
    del leaf
    return piece


@primitive("piece_of_leaf")
def piece_of_leaf(whole: Tensor, leaf: Tensor) -> Tensor:
    """This rank's piece, of the shape of `leaf`, of the array that `whole_leaf` gives. On one device it is `whole`."""
    del leaf
    return whole


@primitive("mean_over_leaf")
def mean_over_leaf(x: Tensor, dims: Sequence[int], leaf: Tensor) -> Tensor:
    """The mean over these dims of the whole array, kept as dims of size 1; `x` is divided as `leaf` is, shape by
    shape.
    """
    del leaf
    return x.mean(tuple(dims), keepdim=True)


@primitive("each_matrix")
def each_matrix(
    work: Callable[[Sequence[Tensor]], list[Tensor]],
    pieces: Sequence[Tensor],
    leaves: Sequence[Tensor],
    *,
    dtype: torch.dtype,
    together: int,
) -> list[Tensor]:
    """`work` on the whole matrices of leaves `[..., I, O]`, of which `pieces` are parts as `leaves` are of theirs.

    - `work`: takes a list of batches of matrices and gives as many results of the same shapes, in `dtype`, each matrix
      treated by itself, and zeros as zeros.
    - `together`: about how many elements of small matrices are sent at once.

    Returned are pieces, in a dtype that may be narrower. On a mesh the matrices are divided among the ranks that hold
    them.
    """
    del leaves, dtype, together
    return work(pieces)


@primitive("whole_shape")
def whole_shape(leaf: Tensor) -> tuple[int, ...]:
    """The shape of the array of which `leaf`, of any shape, is a piece; its own where nothing is divided.

    >>> import torch
    >>> from ftrain.optim.shards import whole_shape
    >>> whole_shape(torch.zeros(4, 8))  # on one device
    (4, 8)
    """
    return tuple(leaf.shape)


@primitive("bits_of_leaf")
def bits_of_leaf(key: Tensor, leaf: Tensor) -> Tensor:
    """A random 32-bit word for each number of a leaf, int64 of its shape: for an array they are the same however it is
    divided.

    `key`: int64 `[2]`.
    """
    return random.bits(key, tuple(leaf.shape))
