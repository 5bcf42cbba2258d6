"""Numbers of a table by codes of 4 bits: what a weight in NF4 is decoded by (Dettmers et al., arXiv 2305.14314)."""

import torch
from torch import Tensor

from ftrain.kernels.opaque import opaque_op

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""Quantiles of a normal distribution, in [-1, 1], as bitsandbytes has them."""


def nf4_numbers(codes: Tensor) -> Tensor:
    """The quantile of each code, float32 of the shape of `codes`: elementwise, and without a derivative.

    - `codes`: integers in [0, 16).

    >>> import torch
    >>> from ftrain.kernels.quantiles import nf4_numbers
    >>> nf4_numbers(torch.tensor([0, 7, 15], dtype=torch.uint8))
    tensor([-1.,  0.,  1.])
    """
    return _numbers(codes)


@opaque_op(
    "nf4_numbers(Tensor codes) -> Tensor",
    fake=lambda codes: codes.new_empty(codes.shape, dtype=torch.float32),
)
def _numbers(codes: Tensor) -> Tensor:
    """One op, which plans know as elementwise; an index of a table would be an op on the whole array to them."""
    table = torch.tensor(NF4, dtype=torch.float32, device=codes.device)
    return table[codes.int()]


WORKSPACE = {"ftrain::nf4_numbers": lambda codes: 4 * codes.numel()}
