"""Frozen weights in blocks of 8 or 4 bits, decoded for a product and never kept whole.

A block is so many numbers of a row, one after the other, and has one scale, the largest absolute value in it. "int8"
is that scale times a whole number of 127 parts; "nf4" the scale times one of 16 quantiles of a normal distribution
(Dettmers et al., arXiv 2305.14314), two to a byte, with the numbers and the order of bits of bitsandbytes.

Legend: "..." leading dims, M rows, N columns.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from ftrain.kernels.quantiles import NF4, nf4_numbers

Format = Literal["int8", "nf4"]

BLOCK = 64
"""Numbers of a block, where the columns divide by it."""


@dataclass(frozen=True)
class Blocks:
    """A quantized weight.

    - `codes`: int8 `[..., M, N]`, or for "nf4" uint8 `[..., M, N / 2]`, the first number in the high bits.
    - `scales`: float32 `[..., M, N / block]`.
    - `dtype`: of the weight that it stands for. `shape`: of that weight, after `views`.
    - `views`: what is done to the decoded weight: "T" swaps the last two dims, a slice takes some of the last dim.
    """

    codes: Tensor
    scales: Tensor
    format: Format
    dtype: torch.dtype
    shape: tuple[int, ...]
    views: tuple[Any, ...] = ()

    @classmethod
    def of(cls, codes: Tensor, scales: Tensor, format: Format, dtype: torch.dtype) -> "Blocks":
        """The weight of these codes, as it was."""
        *above, last = codes.shape
        return cls(codes, scales, format, dtype, (*above, 2 * last if format == "nf4" else last))

    @property
    def device(self) -> torch.device:
        """That of the codes."""
        return self.codes.device

    @property
    def mT(self) -> "Blocks":
        """The last two dims swapped; nothing is decoded."""
        *above, m, n = self.shape
        return replace(self, shape=(*above, n, m), views=(*self.views, "T"))

    @property
    def ndim(self) -> int:
        """How many dims."""
        return len(self.shape)

    def dim(self) -> int:
        """How many dims."""
        return len(self.shape)

    def size(self, dim: int | None = None) -> Any:
        """The shape, or one of its sizes."""
        return torch.Size(self.shape) if dim is None else self.shape[dim]

    def numel(self) -> int:
        """How many numbers."""
        return torch.Size(self.shape).numel()

    def is_floating_point(self) -> bool:
        """What it stands for is."""
        return True

    def columns(self, part: slice) -> "Blocks":
        """Some of the last dim; nothing is decoded."""
        left = len(range(*part.indices(self.shape[-1])))
        return replace(self, shape=(*self.shape[:-1], left), views=(*self.views, part))

    def tensors(self) -> list[Tensor]:
        """Codes and scales."""
        return [self.codes, self.scales]

    def rebuilt(self, tensors: Sequence[Tensor]) -> "Blocks":
        """The same of other codes and scales, whose first dim may be another."""
        codes, scales = tensors
        if len(self.shape) < 3:
            return replace(self, codes=codes, scales=scales)
        return replace(self, codes=codes, scales=scales, shape=(codes.shape[0], *self.shape[1:]))

    def decoded(self) -> Tensor:
        """The weight in its dtype."""
        whole = decode(self.codes, self.scales, self.format, self.dtype)
        for view in self.views:
            whole = whole.mT if view == "T" else whole[..., view]
        return whole

    def rows(self, index: Tensor) -> Tensor:
        """Rows of a table of two dims without views, `[*index, N]`: only these are decoded."""
        codes, scales = (torch.nn.functional.embedding(index, x) for x in (self.codes, self.scales))
        return decode(codes, scales, self.format, self.dtype)

    def times(self, product: Callable[..., Tensor], x: Tensor, *others: Tensor) -> Tensor:
        """`product(x, weight, *others)`, linear in x, whose derivative is `product(dy, weight.mT, *others)`; the weight
        is decoded in both passes and kept for neither.
        """
        found: Tensor = _Times.apply(x, self.codes, self.scales, self, product, *others)
        return found


class _Times(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, codes: Tensor, scales: Tensor, of: Blocks, product: Any, *others: Tensor) -> Tensor:
        found: Tensor = product(x, replace(of, codes=codes, scales=scales).decoded().to(x.dtype), *others)
        return found

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, codes, scales, of, product, *others = inputs
        ctx.save_for_backward(codes, scales, *others)
        ctx.of, ctx.product = replace(of, codes=None, scales=None), product

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        codes, scales, *others = ctx.saved_tensors
        weight = replace(ctx.of, codes=codes, scales=scales).mT.decoded().to(dy.dtype)
        return ctx.product(dy, weight, *others), None, None, None, None, *(None for _ in others)


def encode(weight: Tensor, format: Format) -> tuple[Tensor, Tensor]:
    """Codes and scales of a weight `[..., N]` (see `Blocks`). ValueError for columns that do not go into blocks, and
    for numbers that are not finite.
    """
    n, size = weight.shape[-1], block_of(weight.shape[-1], format)
    blocks = weight.detach().float().reshape(*weight.shape[:-1], n // size, size)
    scales = blocks.abs().amax(-1)
    if not bool(scales.isfinite().all()):
        raise ValueError("a weight to be quantized has numbers that are not finite")
    units = blocks / scales.clamp(min=torch.finfo(torch.float32).tiny)[..., None]
    if format == "int8":
        return (units * 127).round().to(torch.int8).reshape(weight.shape), scales
    table = torch.tensor(NF4, dtype=torch.float32, device=weight.device)
    codes = torch.bucketize(units, (table[1:] + table[:-1]) / 2).to(torch.uint8).reshape(*weight.shape[:-1], n // 2, 2)
    return codes[..., 0] << 4 | codes[..., 1], scales


def decode(codes: Tensor, scales: Tensor, format: Format, dtype: torch.dtype) -> Tensor:
    """The weight of `codes` and `scales` (see `Blocks`), in `dtype`; computed in float32."""
    if format == "nf4":
        units = nf4_numbers(torch.stack([codes >> 4, codes & 15], -1).flatten(-2))
    else:
        units = codes.float() / 127
    blocks = units.unflatten(-1, (scales.shape[-1], -1))
    return (blocks * scales[..., None]).flatten(-2).to(dtype)


def block_of(columns: int, format: Format) -> int:
    """How many numbers a block has where rows have so many: 64, or the largest number below that divides them.

    ValueError for "nf4" and an odd number of columns, which make no bytes.
    """
    if format == "nf4" and columns % 2:
        raise ValueError(f"nf4 puts two numbers into a byte, and {columns} columns are odd: take int8, or leave it out")
    return next(size for size in range(min(BLOCK, columns), 0, -1) if columns % size == 0)
