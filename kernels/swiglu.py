"""SwiGLU's gate: `silu(gate) * up` (Shazeer, "GLU variants improve transformer", 2020).

Legend: N rows (any leading dims), F hidden features.
"""

import torch
from torch import Tensor

from kernels.backend import choose_backend
from kernels.first_order import first_order
from kernels.opaque import opaque_op

# On CUDA the reference: Inductor fuses it with its neighbours, which an opaque op would prevent.
_BACKENDS = {"cpu": "cpu"}

# Elements per pass, so that the temporaries of one pass stay in cache.
_CHUNK = 1 << 18


def swiglu(gate_NF: Tensor, up_NF: Tensor, *, backend: str = "auto") -> Tensor:
    """`silu(gate) * up`, elementwise over equal shapes and dtypes; computed in float32 (float64) and rounded once."""
    if gate_NF.shape != up_NF.shape or gate_NF.dtype != up_NF.dtype or not gate_NF.is_floating_point():
        raise ValueError(
            f"swiglu: gate {gate_NF.dtype} {list(gate_NF.shape)} and up {up_NF.dtype} {list(up_NF.shape)} "
            "must have one shape and one floating dtype"
        )
    if choose_backend(backend, gate_NF.device, _BACKENDS) == "reference":
        return swiglu_reference(gate_NF, up_NF)
    return _Swiglu.apply(gate_NF, up_NF)


def swiglu_reference(gate_NF: Tensor, up_NF: Tensor) -> Tensor:
    """`swiglu` in plain torch, differentiable to any order."""
    wide = _wide(gate_NF.dtype)
    return (torch.nn.functional.silu(gate_NF.to(wide)) * up_NF.to(wide)).to(gate_NF.dtype)


class _Swiglu(torch.autograd.Function):
    """Keeps gate and up alone: the backward makes silu(gate) again."""

    @staticmethod
    def forward(gate_NF: Tensor, up_NF: Tensor) -> Tensor:
        return _forward(gate_NF, up_NF)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, dy_NF: Tensor):
        return _backward_once(dy_NF, *ctx.saved_tensors)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _rows(*tensors: Tensor) -> tuple[int, list[Tensor]]:
    """The tensors as `[N, F]` (or one row, where all are contiguous), and how many rows make one pass."""
    if all(t.is_contiguous() for t in tensors):
        flat = [t.reshape(-1, 1) for t in tensors]
    else:
        flat = [t.reshape(-1, t.shape[-1]) for t in tensors]
    return max(1, _CHUNK // max(1, flat[0].shape[1])), flat


def _forward_cpu(gate: Tensor, up: Tensor) -> Tensor:
    y = torch.empty_like(gate, memory_format=torch.contiguous_format)
    if y.numel() == 0:
        return y
    rows, (gate_NF, up_NF, y_NF) = _rows(gate, up, y)
    for n in range(0, y_NF.shape[0], rows):
        g, u, into = gate_NF[n : n + rows], up_NF[n : n + rows], y_NF[n : n + rows]
        if _wide(g.dtype) == g.dtype:
            torch.ops.aten.silu.out(g, out=into).mul_(u)
        else:
            into.copy_(torch.ops.aten.silu_(g.to(_wide(g.dtype))).mul_(u))
    return y


def _backward_cpu(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    dgate = torch.empty_like(gate, memory_format=torch.contiguous_format)
    dup = torch.empty_like(dgate)
    if dup.numel() == 0:
        return dgate, dup
    wide = _wide(gate.dtype)
    rows, (dy_NF, gate_NF, up_NF, dgate_NF, dup_NF) = _rows(dy, gate, up, dgate, dup)
    for n in range(0, dy_NF.shape[0], rows):
        here = slice(n, n + rows)
        into_gate, into_up = dgate_NF[here], dup_NF[here]
        d, g = dy_NF[here].to(wide), gate_NF[here].to(wide)
        # One exponential serves both gradients: silu = g s and silu' = s + silu (1 - s), with s = sigmoid(g).
        s = torch.sigmoid(g)
        silu = torch.mul(g, s, out=into_up) if into_up.dtype == wide else g.mul_(s)
        s.addcmul_(silu, s, value=-1).add_(silu).mul_(up_NF[here])
        torch.mul(s, d, out=into_gate) if into_gate.dtype == wide else into_gate.copy_(s.mul_(d))
        silu.mul_(d)
        if silu is not into_up:
            into_up.copy_(silu)
    return dgate, dup


_forward = opaque_op("swiglu(Tensor gate, Tensor up) -> Tensor", fake=lambda gate, up: gate.new_empty(gate.shape))(
    _forward_cpu
)

_backward = opaque_op(
    "swiglu_backward(Tensor dy, Tensor gate, Tensor up) -> (Tensor, Tensor)",
    fake=lambda dy, gate, up: (gate.new_empty(gate.shape), gate.new_empty(gate.shape)),
)(_backward_cpu)

_backward_once = first_order(_backward, "swiglu")
