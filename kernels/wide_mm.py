"""A product of bfloat16 matrices whose sums stay float32: scores that must not be rounded before they are compared.

Legend: N rows, D and F the inner and outer features of the weight.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ftrain.kernels.backend import choose_backend
from ftrain.kernels.first_order import first_order
from ftrain.kernels.opaque import opaque_op
from ftrain.kernels.stand_in import asks_stand_ins

_BACKENDS = {"cuda": "tensor_cores"}


@asks_stand_ins
def wide_mm(x_ND: Tensor, w_DF: Tensor, *, backend: str = "auto") -> Tensor:
    """`x @ w`, `[N, F]`, accumulated and returned in float32 (float64 for float64 x): scores that must not be rounded.

    - `x_ND`, `w_DF`: floating.
    - `backend`: "auto", "reference" or "tensor_cores".
    - "reference": both are cast to the dtype of the result. On a GPU a float32 product is many times slower than a
      bfloat16 one, and the backward keeps x in float32.
    - "tensor_cores" (CUDA's "auto" where x and w are bfloat16): x and w as they are. Their products are exact in
      float32, so the result differs from the reference by the rounding of float32 sums alone (about 1e-7 of |x| |w|).
      In the backward the gradient is rounded to bfloat16 (2e-3 of each entry), as behind every linear layer in
      bfloat16; sums are in float32, and both gradients have the dtypes of x and w. Differentiable once. Other dtypes,
      float16 among them (its range does not hold a gradient), take the reference.

    ValueError if x and w are not floating matrices that fit, and for another backend.

    >>> import torch
    >>> from ftrain.kernels.wide_mm import wide_mm
    >>> wide_mm(torch.ones(1, 3, dtype=torch.bfloat16), torch.full((3, 1), 0.3, dtype=torch.bfloat16))
    tensor([[0.9023]])
    """
    _check(x_ND, w_DF)
    chosen = choose_backend(backend, x_ND.device, _BACKENDS)
    if chosen == "reference" or not x_ND.dtype == w_DF.dtype == torch.bfloat16:
        return wide_mm_reference(x_ND, w_DF)
    return _WideMm.apply(x_ND, w_DF)


def wide_mm_reference(x_ND: Tensor, w_DF: Tensor) -> Tensor:
    """`wide_mm` in plain torch: `[N, F]`, differentiable to any order."""
    wide = torch.promote_types(x_ND.dtype, torch.float32)
    return x_ND.to(wide) @ w_DF.to(wide)


class _WideMm(torch.autograd.Function):
    @staticmethod
    def forward(x_ND: Tensor, w_DF: Tensor) -> Tensor:
        return _product(x_ND, w_DF)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, dy_NF: Tensor) -> Any:
        x_ND, w_DF = ctx.saved_tensors
        dy_NF = dy_NF.to(x_ND.dtype)
        dx_ND = dy_NF @ w_DF.t() if ctx.needs_input_grad[0] else None
        dw_DF = _product_once(x_ND.t(), dy_NF).to(w_DF.dtype) if ctx.needs_input_grad[1] else None
        return dx_ND, dw_DF


def _check(x_ND: Tensor, w_DF: Tensor) -> None:
    floating = x_ND.is_floating_point() and w_DF.is_floating_point()
    if x_ND.dim() != 2 or w_DF.dim() != 2 or x_ND.shape[1] != w_DF.shape[0] or not floating:
        raise ValueError(
            f"wide_mm: x [N, D] and w [D, F] must share D and be floating, got {x_ND.dtype} {list(x_ND.shape)} and "
            f"{w_DF.dtype} {list(w_DF.shape)}"
        )


@opaque_op(
    "wide_mm(Tensor a, Tensor b) -> Tensor",
    fake=lambda a, b: a.new_empty(a.shape[0], b.shape[1], dtype=torch.float32),
)
def _product(a: Tensor, b: Tensor) -> Tensor:
    """Only CUDA has products whose result is wider than their factors; elsewhere the factors are cast."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


_product_once = first_order(_product, "wide_mm")

WORKSPACE: dict[str, Callable[..., int]] = {
    "ftrain::wide_mm": lambda a, b: 0 if a.device.type == "cuda" else 4 * (a.numel() + b.numel()),
}

FLOPS: dict[str, Callable[..., int]] = {"ftrain::wide_mm": lambda a, b: 2 * a.numel() * b.shape[1]}
