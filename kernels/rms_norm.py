"""Root-mean-square normalisation over the last dim (Zhang and Sennrich, arXiv 1910.07467).

Legend: N rows (every leading dim, flattened), D normalised dim.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ftrain.kernels.backend import choose_backend
from ftrain.kernels.chunks import piece_numel, pieces
from ftrain.kernels.dtypes import accumulate_dtype
from ftrain.kernels.first_order import first_order
from ftrain.kernels.opaque import opaque_op

# On CUDA the reference: Inductor fuses it with its neighbours, which an opaque op would prevent.
_BACKENDS = {"cpu": "cpu"}


def rms_norm(x_ND: Tensor, weight_D: Tensor | None = None, *, eps: float = 1e-6, backend: str = "auto") -> Tensor:
    """`x / sqrt(mean(x**2) + eps) * weight` over the last dim, in the shape and dtype of x.

    - `x_ND`: floating, any leading dims, e.g. `[T, D]` or heads `[T, H, K]`.
    - `weight_D`: floating `[D]`, of any width; None only normalises.
    - `eps`: added to the mean square.
    - `backend`: "auto", "reference" or "cpu".

    Computed in float32 (float64 for float64) and rounded once. "cpu" is differentiable once, the reference to any
    order. ValueError for shapes, dtypes and backends that do not fit. Source: Zhang and Sennrich, arXiv 1910.07467.

    >>> import torch
    >>> from ftrain.kernels.rms_norm import rms_norm
    >>> rms_norm(torch.tensor([[3.0, 4.0]]), torch.tensor([1.0, 10.0]))
    tensor([[ 0.8485, 11.3137]])
    """
    _check(x_ND, weight_D)
    if choose_backend(backend, x_ND.device, _BACKENDS) == "reference":
        return rms_norm_reference(x_ND, weight_D, eps=eps)
    y_ND, _ = _RmsNorm.apply(x_ND, weight_D, eps)
    return y_ND


def rms_norm_reference(x_ND: Tensor, weight_D: Tensor | None = None, *, eps: float = 1e-6) -> Tensor:
    """`rms_norm` in plain torch: the shape and dtype of x, differentiable to any order."""
    wide_ND = x_ND.to(accumulate_dtype(x_ND.dtype))
    y_ND = wide_ND * torch.rsqrt(wide_ND.square().mean(-1, keepdim=True) + eps)
    if weight_D is not None:
        y_ND = y_ND * weight_D.to(y_ND.dtype)
    return y_ND.to(x_ND.dtype)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(x_ND: Tensor, weight_D: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
        return _forward(x_ND, weight_D, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x_ND, weight_D, _ = inputs
        _, rstd_N1 = output
        ctx.mark_non_differentiable(rstd_N1)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x_ND, weight_D, rstd_N1)

    @staticmethod
    def backward(ctx: Any, dy_ND: Tensor | None, _: Any) -> Any:
        if dy_ND is None:
            return None, None, None
        x_ND, weight_D, rstd_N1 = ctx.saved_tensors
        dx_ND, dweight_D = _backward_once(dy_ND, x_ND, weight_D, rstd_N1)
        return dx_ND, None if weight_D is None else dweight_D, None


def _check(x_ND: Tensor, weight_D: Tensor | None) -> None:
    if not x_ND.is_floating_point() or x_ND.dim() == 0:
        raise ValueError(f"rms_norm: x must be floating point with a last dim, got {x_ND.dtype} {list(x_ND.shape)}")
    if weight_D is not None and weight_D.shape != x_ND.shape[-1:]:
        raise ValueError(f"rms_norm: weight {list(weight_D.shape)} does not match the last dim of {list(x_ND.shape)}")


def _forward_cpu(x_ND: Tensor, weight_D: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    wide = accumulate_dtype(x_ND.dtype)
    y_ND = torch.empty_like(x_ND, memory_format=torch.contiguous_format)
    rstd_N1 = x_ND.new_empty((*x_ND.shape[:-1], 1), dtype=wide)
    weight_D = None if weight_D is None else weight_D.to(wide)
    for x, y, rstd in pieces(x_ND, y_ND, rstd_N1):
        _forward_piece(x.to(wide), weight_D, eps, y, rstd)
    return y_ND, rstd_N1


def _forward_piece(x: Tensor, weight_D: Tensor | None, eps: float, y: Tensor, rstd: Tensor) -> None:
    """Into y and rstd; overwrites x where it is a copy, wider than y."""
    torch.linalg.vector_norm(x, dim=-1, keepdim=True, out=rstd)
    rstd.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    scaled = torch.mul(x, rstd, out=y) if y.dtype == x.dtype else x.mul_(rstd)
    if weight_D is not None:
        scaled.mul_(weight_D)
    if scaled is not y:
        y.copy_(scaled)


def _backward_cpu(dy_ND: Tensor, x_ND: Tensor, weight_D: Tensor | None, rstd_N1: Tensor) -> tuple[Tensor, Tensor]:
    D, wide = x_ND.shape[-1], rstd_N1.dtype
    dx_ND = torch.empty_like(x_ND, memory_format=torch.contiguous_format)
    dweight_D = x_ND.new_zeros(D, dtype=wide)
    scale_D = dweight_D.new_ones(D) if weight_D is None else weight_D.to(wide)
    for dy, x, rstd, dx in pieces(dy_ND, x_ND, rstd_N1, dx_ND):
        dweight = _backward_piece(dy.to(wide), x.to(wide), scale_D, rstd, dx)
        if weight_D is not None:
            dweight_D.add_(dweight)
    return dx_ND, dweight_D if weight_D is None else dweight_D.to(weight_D.dtype)


def _backward_piece(dy: Tensor, x: Tensor, scale_D: Tensor, rstd: Tensor, dx: Tensor) -> Tensor:
    """Layer norm's backward with the mean set to zero, plus the term that layer norm subtracts for its mean.

    With g = dy * weight and h = x * rstd, layer norm has `dx = rstd * (g - mean(g) - h * mean(g * h))` and the same
    weight gradient; the compiled backward of layer norm reads each input once. Returns the weight's gradient.
    """
    D = x.shape[-1]
    part, dweight_D, _ = torch.ops.aten.native_layer_norm_backward(
        dy, x, [D], torch.zeros_like(rstd), rstd, scale_D, None, [True, True, False]
    )
    mean = (dy @ scale_D).div_(D).unsqueeze(-1).mul_(rstd)
    if dx.dtype == part.dtype:
        torch.add(part, mean, out=dx)
    else:
        dx.copy_(part.add_(mean))
    return dweight_D


_forward = opaque_op(
    "rms_norm(Tensor x, Tensor? weight, float eps) -> (Tensor, Tensor)",
    fake=lambda x, weight, eps: (
        x.new_empty(x.shape),
        x.new_empty((*x.shape[:-1], 1), dtype=accumulate_dtype(x.dtype)),
    ),
)(_forward_cpu)

_backward = opaque_op(
    "rms_norm_backward(Tensor dy, Tensor x, Tensor? weight, Tensor rstd) -> (Tensor, Tensor)",
    fake=lambda dy, x, weight, rstd: (
        x.new_empty(x.shape),
        x.new_empty(x.shape[-1:], dtype=rstd.dtype if weight is None else weight.dtype),
    ),
)(_backward_cpu)

_backward_once = first_order(_backward, "rms_norm")


def _forward_workspace(x: Tensor, weight: Tensor | None, eps: float) -> int:
    wide = accumulate_dtype(x.dtype)
    return 0 if x.dtype == wide else piece_numel(x) * wide.itemsize


def _backward_workspace(dy: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor) -> int:
    """The piece's gradient, with both inputs in float32 or contiguous where they are not."""
    copies = 1 + sum(t.dtype != rstd.dtype or not t.is_contiguous() for t in (dy, x))
    return copies * piece_numel(dy, x, rstd) * rstd.element_size()


WORKSPACE: dict[str, Callable[..., int]] = {
    "ftrain::rms_norm": _forward_workspace,
    "ftrain::rms_norm_backward": _backward_workspace,
}
