"""Dropout of attention's weights that is the same on every mesh: a number for each pair of tokens and head.

Each token of the batch gets a random word, the same on all meshes. The number of a pair is a hash of the two words and
the head, so it depends neither on the pack that a rank holds nor on where in it the tokens stand.

Legend: B rows, L tokens of a row, S keys of a row, H heads.
"""

import torch
from torch import Tensor

from ftrain.kernels import random
from ftrain.kernels.pack import draw_over_batch

_APART = 0x9E3779B97F4A7C15 - (1 << 64)
"""An odd number of 64 bits (2**64 over the golden ratio), whose multiples lie far apart: one for each head."""
_WORD = 1 << 32


def drop_weights(key: Tensor, weights_BHLS: Tensor, p: float) -> Tensor:
    """The weights with zeros in the place of some, with probability `p`; the others are divided by `1 - p`.

    `key`: int64 `[2]`. `weights_BHLS`: floating; B * L and B * S are a rank's tokens of the batch.
    """
    B, H, L, S = weights_BHLS.shape
    words = [draw_over_batch(random.bits, random.fold_in(key, i), (B * n,)) for i, n in enumerate((L, S))]
    own_BL, other_BS = words[0].view(B, L), words[0 if L == S else 1].view(B, S)
    pair_BLS = own_BL[:, :, None] * _WORD + other_BS[:, None, :]
    head_H = torch.arange(H, device=key.device) * _APART
    number_BHLS = random.fold_in(random.fold_in(key, 2), pair_BLS[:, None] ^ head_H[:, None, None])[..., 0]
    kept_BHLS = number_BHLS >= int(p * _WORD)
    return weights_BHLS * kept_BHLS.to(weights_BHLS.dtype) / (1 - p)
