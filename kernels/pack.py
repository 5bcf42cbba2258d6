"""What a function of one rank's tokens must know of the pack that they are part of; on one device, of the pack itself.

A plan rebinds these primitives: the tokens of a pack may be shared by several ranks, in turn or otherwise.

Legend: T tokens here, D model, N rows, P tokens of the pack.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ftrain.kernels.primitive import primitive


@primitive("pack_tokens")
def pack_tokens(tokens: int) -> int:
    """How many tokens the pack has of which `tokens` are here."""
    return tokens


@primitive("pack_index")
def pack_index(tokens: int, device: torch.device) -> Tensor:
    """The place in the pack of each token here, `[T]` int64."""
    return torch.arange(tokens, device=device)


@primitive("following")
def following(x_T: Tensor) -> Tensor:
    """For each token the value of the one after it in the pack, `[T, ...]`; the last one's is the first's."""
    return torch.roll(x_T, -1, 0)


@primitive("take")
def take_rows(x_TD: Tensor, place_N: Tensor) -> Tensor:
    """The rows of the tokens at these places of the pack, `[N, D]`, differentiable.

    `place_N` int64 in [0, P]; the place P is nowhere and gives zeros, any other is an IndexError on a CPU. Gradients
    are summed in a fixed order.
    """
    tokens = x_TD.shape[0]
    rows_ND = torch.nn.functional.embedding(torch.where(place_N == tokens, 0, place_N), x_TD)
    return rows_ND.masked_fill((place_N == tokens)[:, None], 0)


@primitive("draw_over_batch")
def draw_over_batch(draw: Callable[..., Tensor], key: Tensor, shape: tuple[int, ...], *, dim: int = 0) -> Tensor:
    """Random numbers for an array with one entry per token along `dim`: `draw(key, shape)`, e.g. of `random.normal`.

    `shape` is that of the tokens here; on a mesh these are the numbers that one device draws for the same tokens.
    """
    del dim
    return draw(key, shape)
