"""Root-mean-square normalisation over the last dim (Zhang and Sennrich, "Root mean square layer normalization", 2019).

Legend: N rows (every leading dim, flattened), D normalised dim.
"""

import torch
from torch import Tensor

from kernels.backend import choose_backend
from kernels.first_order import first_order
from kernels.opaque import opaque_op

# On CUDA the reference: Inductor fuses it with its neighbours, which an opaque op would prevent.
_BACKENDS = {"cpu": "cpu"}

# Elements per pass over the rows, so that the float temporaries of one pass stay in cache.
_CHUNK = 1 << 18


def rms_norm(x_ND: Tensor, weight_D: Tensor | None = None, *, eps: float = 1e-6, backend: str = "auto") -> Tensor:
    """`x / sqrt(mean(x**2) + eps) * weight` over the last dim; any leading dims, e.g. `[T, D]` or heads `[T, H, K]`.

    Computed in float32 (float64 for float64) and rounded once, to the dtype of x. Without a weight only normalises.
    """
    _check(x_ND, weight_D)
    if choose_backend(backend, x_ND.device, _BACKENDS) == "reference":
        return rms_norm_reference(x_ND, weight_D, eps=eps)
    y_ND, _ = _RmsNorm.apply(x_ND, weight_D, eps)
    return y_ND


def rms_norm_reference(x_ND: Tensor, weight_D: Tensor | None = None, *, eps: float = 1e-6) -> Tensor:
    """`rms_norm` in plain torch, differentiable to any order."""
    wide_ND = x_ND.to(_wide(x_ND.dtype))
    y_ND = wide_ND * torch.rsqrt(wide_ND.square().mean(-1, keepdim=True) + eps)
    if weight_D is not None:
        y_ND = y_ND * weight_D.to(y_ND.dtype)
    return y_ND.to(x_ND.dtype)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(x_ND: Tensor, weight_D: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
        return _forward(x_ND, weight_D, eps)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x_ND, weight_D, _ = inputs
        _, rstd_N1 = output
        ctx.mark_non_differentiable(rstd_N1)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x_ND, weight_D, rstd_N1)

    @staticmethod
    def backward(ctx, dy_ND: Tensor | None, _):
        if dy_ND is None:
            return None, None, None
        x_ND, weight_D, rstd_N1 = ctx.saved_tensors
        dx_ND, dweight_D = _backward_once(dy_ND, x_ND, weight_D, rstd_N1)
        return dx_ND, None if weight_D is None else dweight_D, None


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _check(x_ND: Tensor, weight_D: Tensor | None) -> None:
    if not x_ND.is_floating_point() or x_ND.dim() == 0:
        raise ValueError(f"rms_norm: x must be floating point with a last dim, got {x_ND.dtype} {list(x_ND.shape)}")
    if weight_D is not None and weight_D.shape != x_ND.shape[-1:]:
        raise ValueError(f"rms_norm: weight {list(weight_D.shape)} does not match the last dim of {list(x_ND.shape)}")


def _forward_cpu(x: Tensor, weight_D: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    D = x.shape[-1]
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    rstd = x.new_empty((*x.shape[:-1], 1), dtype=_wide(x.dtype))
    x_ND, y_ND, rstd_N1 = x.reshape(-1, D), y.view(-1, D), rstd.view(-1, 1)
    weight_D = None if weight_D is None else weight_D.to(rstd.dtype)
    rows = max(1, _CHUNK // max(D, 1))
    for n in range(0, x_ND.shape[0], rows):
        wide, r = x_ND[n : n + rows].to(rstd.dtype), rstd_N1[n : n + rows]
        torch.linalg.vector_norm(wide, dim=-1, keepdim=True, out=r)
        r.square_().div_(D).add_(eps).rsqrt_()
        into = y_ND[n : n + rows]
        scaled = torch.mul(wide, r, out=into) if into.dtype == wide.dtype else wide.mul_(r)
        if weight_D is not None:
            scaled.mul_(weight_D)
        if scaled is not into:
            into.copy_(scaled)
    return y, rstd


def _backward_cpu(dy: Tensor, x: Tensor, weight_D: Tensor | None, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """Layer norm's backward with the mean set to zero, plus the term that layer norm subtracts for its mean.

    With g = dy * weight and h = x * rstd, layer norm has `dx = rstd * (g - mean(g) - h * mean(g * h))` and the same
    weight gradient; the compiled backward of layer norm reads each input once.
    """
    D, wide = x.shape[-1], rstd.dtype
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dweight_D = x.new_zeros(D, dtype=wide)
    dy_ND, x_ND, dx_ND, rstd_N1 = dy.reshape(-1, D), x.reshape(-1, D), dx.view(-1, D), rstd.view(-1, 1)
    scale_D = dweight_D.new_ones(D) if weight_D is None else weight_D.to(wide)
    wants = [True, weight_D is not None, False]
    rows = max(1, _CHUNK // max(D, 1))
    for n in range(0, x_ND.shape[0], rows):
        g, r = dy_ND[n : n + rows].to(wide), rstd_N1[n : n + rows]
        part, dweight, _ = torch.ops.aten.native_layer_norm_backward(
            g, x_ND[n : n + rows].to(wide), [D], torch.zeros_like(r), r, scale_D, None, wants
        )
        mean_N1 = torch.mv(g, scale_D).div_(D).unsqueeze(-1).mul_(r)
        into = dx_ND[n : n + rows]
        if into.dtype == wide:
            torch.add(part, mean_N1, out=into)
        else:
            into.copy_(part.add_(mean_N1))
        if weight_D is not None:
            dweight_D.add_(dweight)
    return dx, dweight_D if weight_D is None else dweight_D.to(weight_D.dtype)


_forward = opaque_op(
    "rms_norm(Tensor x, Tensor? weight, float eps) -> (Tensor, Tensor)",
    fake=lambda x, weight, eps: (x.new_empty(x.shape), x.new_empty((*x.shape[:-1], 1), dtype=_wide(x.dtype))),
)(_forward_cpu)

_backward = opaque_op(
    "rms_norm_backward(Tensor dy, Tensor x, Tensor? weight, Tensor rstd) -> (Tensor, Tensor)",
    fake=lambda dy, x, weight, rstd: (
        x.new_empty(x.shape),
        x.new_empty(x.shape[-1:], dtype=rstd.dtype if weight is None else weight.dtype),
    ),
)(_backward_cpu)

_backward_once = first_order(_backward, "rms_norm")
