"""SwiGLU's gate: `silu(gate) * up` (Shazeer, "GLU variants improve transformer", arXiv 2002.05202).

Legend: N rows (any leading dims), F hidden features.
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


def swiglu(gate_NF: Tensor, up_NF: Tensor, *, backend: str = "auto") -> Tensor:
    """`silu(gate) * up`, elementwise: the hidden layer of a gated MLP, `[N, F]` in the dtype of the inputs.

    - `gate_NF`, `up_NF`: equal shapes (any leading dims) and one floating dtype; else ValueError.
    - `backend`: "auto", "reference" or "cpu"; ValueError for another name.

    Computed in float32 (float64 for float64) and rounded once. "cpu" is differentiable once, the reference to any
    order. Source: Shazeer, arXiv 2002.05202.

    >>> import torch
    >>> from ftrain.kernels.swiglu import swiglu
    >>> swiglu(torch.tensor([[0.0, 2.0]]), torch.tensor([[5.0, 1.0]]))
    tensor([[0.0000, 1.7616]])
    """
    if gate_NF.shape != up_NF.shape or gate_NF.dtype != up_NF.dtype or not gate_NF.is_floating_point():
        raise ValueError(
            f"swiglu: gate {gate_NF.dtype} {list(gate_NF.shape)} and up {up_NF.dtype} {list(up_NF.shape)} "
            "must have one shape and one floating dtype"
        )
    if choose_backend(backend, gate_NF.device, _BACKENDS) == "reference":
        return swiglu_reference(gate_NF, up_NF)
    return _Swiglu.apply(gate_NF, up_NF)


def swiglu_reference(gate_NF: Tensor, up_NF: Tensor) -> Tensor:
    """`swiglu` in plain torch: `[N, F]`, differentiable to any order."""
    wide = accumulate_dtype(gate_NF.dtype)
    return (torch.nn.functional.silu(gate_NF.to(wide)) * up_NF.to(wide)).to(gate_NF.dtype)


class _Swiglu(torch.autograd.Function):
    """Keeps gate and up alone: the backward makes silu(gate) again."""

    @staticmethod
    def forward(gate_NF: Tensor, up_NF: Tensor) -> Tensor:
        return _forward(gate_NF, up_NF)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, dy_NF: Tensor) -> Any:
        return _backward_once(dy_NF, *ctx.saved_tensors)


def _forward_cpu(gate_NF: Tensor, up_NF: Tensor) -> Tensor:
    y_NF = torch.empty_like(gate_NF, memory_format=torch.contiguous_format)
    wide = accumulate_dtype(gate_NF.dtype)
    for gate, up, y in pieces(gate_NF, up_NF, y_NF):
        if y.dtype == wide:
            torch.ops.aten.silu.out(gate, out=y).mul_(up)
        else:
            y.copy_(torch.ops.aten.silu_(gate.to(wide)).mul_(up))
    return y_NF


def _backward_cpu(dy_NF: Tensor, gate_NF: Tensor, up_NF: Tensor) -> tuple[Tensor, Tensor]:
    dgate_NF = torch.empty_like(gate_NF, memory_format=torch.contiguous_format)
    dup_NF = torch.empty_like(dgate_NF)
    wide = accumulate_dtype(gate_NF.dtype)
    for dy, gate, up, dgate, dup in pieces(dy_NF, gate_NF, up_NF, dgate_NF, dup_NF):
        _backward_piece(dy.to(wide), gate.to(wide), up, dgate, dup)
    return dgate_NF, dup_NF


def _backward_piece(dy: Tensor, gate: Tensor, up: Tensor, dgate: Tensor, dup: Tensor) -> None:
    """Into dgate and dup; overwrites gate where it is a copy, wider than up.

    One exponential serves both gradients: silu = g s and silu' = s + silu (1 - s), with s = sigmoid(g).
    """
    s = torch.sigmoid(gate)
    if gate.dtype == up.dtype:
        silu = torch.mul(gate, s, out=dup)
        torch.mul(s.addcmul_(silu, s, value=-1).add_(silu).mul_(up), dy, out=dgate)
        dup.mul_(dy)
    else:
        silu = gate.mul_(s)
        dgate.copy_(s.addcmul_(silu, s, value=-1).add_(silu).mul_(up).mul_(dy))
        dup.copy_(silu.mul_(dy))


_forward = opaque_op("swiglu(Tensor gate, Tensor up) -> Tensor", fake=lambda gate, up: gate.new_empty(gate.shape))(
    _forward_cpu
)

_backward = opaque_op(
    "swiglu_backward(Tensor dy, Tensor gate, Tensor up) -> (Tensor, Tensor)",
    fake=lambda dy, gate, up: (gate.new_empty(gate.shape), gate.new_empty(gate.shape)),
)(_backward_cpu)

_backward_once = first_order(_backward, "swiglu")


def _forward_workspace(gate: Tensor, up: Tensor) -> int:
    """16-bit inputs: both in float32."""
    wide = accumulate_dtype(gate.dtype)
    return 0 if gate.dtype == wide else 2 * piece_numel(gate, up) * wide.itemsize


def _backward_workspace(dy: Tensor, gate: Tensor, up: Tensor) -> int:
    """The sigmoid; for 16-bit inputs, all three in float32."""
    wide = accumulate_dtype(gate.dtype)
    return (1 if gate.dtype == wide else 4) * piece_numel(dy, gate, up) * wide.itemsize


WORKSPACE: dict[str, Callable[..., int]] = {
    "ftrain::swiglu": _forward_workspace,
    "ftrain::swiglu_backward": _backward_workspace,
}
