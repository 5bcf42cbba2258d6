"""Row-wise work in pieces, so that what a piece needs besides its inputs and outputs stays in cache."""

from collections.abc import Iterator

from torch import Tensor

# Elements per piece: 1 MiB of float32. Smaller pieces fit a nearer cache but pay more for launching operations.
PIECE = 1 << 18


def pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Matching slices of tensors whose dims but the last agree, of at most `PIECE` elements of the first tensor (or one
    row).

    Contiguous tensors are cut between rows of the last dim, others between rows of the first dim, so nothing is copied.
    An empty first tensor gives no slices.

    >>> import torch
    >>> from ftrain.kernels.chunks import PIECE, pieces
    >>> [x.shape for (x,) in pieces(torch.zeros(3, PIECE // 2))]
    [torch.Size([2, 131072]), torch.Size([1, 131072])]
    """
    first = tensors[0]
    if first.numel() == 0:
        return
    if first.dim() == 1 or all(t.is_contiguous() for t in tensors):
        tensors = tuple(t.reshape(-1, t.shape[-1]) for t in tensors)
    rows = max(1, PIECE // tensors[0][0].numel())
    for n in range(0, tensors[0].shape[0], rows):
        yield tuple(t[n : n + rows] for t in tensors)


def piece_numel(*tensors: Tensor) -> int:
    """How many elements of the first tensor the largest slice of `pieces` holds. Only shapes and strides are read."""
    first = tensors[0]
    flat = first.dim() == 1 or all(t.is_contiguous() for t in tensors)
    row = first.shape[-1] if flat else first.numel() // max(1, first.shape[0])
    return min(first.numel(), max(1, PIECE // max(1, row)) * row)
