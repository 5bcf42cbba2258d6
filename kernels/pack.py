"""A pack of which a rank holds some tokens: its size, indices, neighbours, rows and random numbers.

A plan rebinds these primitives: the tokens of a pack may be shared by several ranks, in consecutive runs or otherwise.
On one device the pack is the tokens themselves.

Legend: T tokens here, D model, N rows, P tokens of the pack, H heads, h = H / ranks of them, C numbers of a head.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ftrain.kernels.primitive import primitive


@primitive("pack_tokens")
def pack_tokens(tokens: int) -> int:
    """How many tokens the whole pack has, given how many of them this rank holds."""
    return tokens


@primitive("pack_index")
def pack_index(tokens: int, device: torch.device) -> Tensor:
    """The index in the pack of each token that this rank holds, `[T]` int64 on `device`."""
    return torch.arange(tokens, device=device)


@primitive("following")
def following(x_T: Tensor) -> Tensor:
    """For each token the value of the next token of the pack, shaped as `x_T` (`[T, ...]`, any dtype).

    The last token gets the value of the first one. Labels for next-token prediction are made with it.

    >>> import torch
    >>> from ftrain.kernels.pack import following
    >>> following(torch.tensor([5, 6, 7]))
    tensor([6, 7, 5])
    """
    return torch.roll(x_T, -1, 0)


@primitive("take")
def take_rows(x_TD: Tensor, place_N: Tensor) -> Tensor:
    """The rows of `x_TD` at these indices of the pack, `[N, D]`, in the dtype of `x_TD` and differentiable in it.

    `place_N`: int64 in [0, P]. Index P stands for no token and gives zeros; any other index outside of the pack is an
    IndexError on a CPU and a device-side assertion on CUDA. Gradients are summed in a fixed order.

    >>> import torch
    >>> from ftrain.kernels.pack import take_rows
    >>> take_rows(torch.tensor([[1.0], [2.0]]), torch.tensor([1, 2, 0]))
    tensor([[2.],
            [0.],
            [1.]])
    """
    tokens = x_TD.shape[0]
    rows_ND = torch.nn.functional.embedding(torch.where(place_N == tokens, 0, place_N), x_TD)
    return rows_ND.masked_fill((place_N == tokens)[:, None], 0)


@primitive("pack_rows")
def pack_rows(x_T: Tensor) -> Tensor:
    """The rows of all tokens of the pack, in its order, `[P, ...]` of `x_T` (`[T, ...]`, any dtype); differentiable."""
    return x_T


@primitive("divide_heads")
def divide_heads(x_THC: Tensor) -> Tensor:
    """All tokens of the pack, in its order, with this rank's share of the heads, `[P, h, C]`; differentiable.

    For what reads a document's earlier tokens head by head. The ranks that share the pack divide H.

    >>> import torch
    >>> from ftrain.kernels.pack import divide_heads
    >>> list(divide_heads(torch.ones(5, 4, 3)).shape)  # on one device
    [5, 4, 3]
    """
    return x_THC


@primitive("join_heads")
def join_heads(x_PhC: Tensor) -> Tensor:
    """All heads of this rank's tokens, `[T, H, C]`: the inverse of `divide_heads`."""
    return x_PhC


@primitive("own_heads")
def own_heads(x_H: Tensor) -> Tensor:
    """This rank's share of what each head has, `[h, ...]` of `x_H` (`[H, ...]`), as `divide_heads` deals heads out."""
    return x_H


@primitive("draw_over_batch")
def draw_over_batch(draw: Callable[..., Tensor], key: Tensor, shape: tuple[int, ...], *, dim: int = 0) -> Tensor:
    """Random numbers for an array with one entry per token along `dim`: `draw(key, shape)`, e.g. of `random.normal`.

    `key`: int64 `[2]`. `shape`: that of the result, with this rank's tokens along `dim`. On a mesh the numbers are
    those that one device draws for the same tokens, so a run does not depend on its mesh.

    >>> import torch
    >>> import ftrain
    >>> from ftrain.kernels.pack import draw_over_batch
    >>> noise_TD = draw_over_batch(ftrain.normal, ftrain.key(0), (4, 8))
    >>> torch.equal(noise_TD, ftrain.normal(ftrain.key(0), (4, 8)))  # on one device
    True
    """
    del dim
    return draw(key, shape)
