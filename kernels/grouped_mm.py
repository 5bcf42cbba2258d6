"""Matrix products group by group: consecutive rows of one matrix, each group with a weight of its own.

Legend: N rows, E groups (experts), D and F the inner and outer features of the weights.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ftrain.kernels.backend import choose_backend
from ftrain.kernels.first_order import first_order
from ftrain.kernels.opaque import opaque_op
from ftrain.kernels.stand_in import asks_stand_ins

_BACKENDS = {"cpu": "loop", "cuda": "grouped"}


@asks_stand_ins
def grouped_mm(x_ND: Tensor, w_EDF: Tensor, offsets_E: Tensor, *, backend: str = "auto") -> Tensor:
    """`[N, F]`: rows `offsets[e - 1] .. offsets[e]` of x times `w[e]`, in the dtype of the inputs.

    - `x_ND`, `w_EDF`: one floating dtype.
    - `offsets_E`: int32, ascending, ends at N; groups may be empty, and their weight gradients are zeros.
    - `backend`: "auto", "reference", "loop" or "grouped". "loop" (any device; on CUDA the host waits for the offsets)
      is one product per group. "grouped" (CUDA) is `torch._grouped_mm`, one kernel for all groups; where the dtype is
      not bfloat16 or D or F is no multiple of 8, "loop" runs.

    Accumulated in float32 (float64). "loop" is differentiable once, the reference to any order. ValueError for shapes,
    dtypes and backends that do not fit, and for offsets that do not ascend to N ("loop").

    >>> import torch
    >>> from ftrain.kernels.grouped_mm import grouped_mm
    >>> w_EDF = torch.tensor([[[1.0]], [[10.0]]])
    >>> grouped_mm(torch.tensor([[1.0], [2.0], [3.0]]), w_EDF, torch.tensor([1, 3], dtype=torch.int32)).flatten()
    tensor([ 1., 20., 30.])
    """
    _check(x_ND, w_EDF, offsets_E)
    backend = choose_backend(backend, x_ND.device, _BACKENDS)
    if backend == "grouped" and (x_ND.dtype != torch.bfloat16 or w_EDF.shape[1] % 8 or w_EDF.shape[2] % 8):
        backend = "loop"
    if backend == "reference":
        return grouped_mm_reference(x_ND, w_EDF, offsets_E)
    return (_Grouped if backend == "grouped" else _Loop).apply(x_ND, w_EDF, offsets_E)


def grouped_mm_reference(x_ND: Tensor, w_EDF: Tensor, offsets_E: Tensor) -> Tensor:
    """`grouped_mm` in plain torch, `[N, F]` in the dtype of the inputs: every weight times every row, E times the work.

    Differentiable to any order. Nothing is checked.
    """
    row_N1 = torch.arange(x_ND.shape[0], device=x_ND.device)[:, None]
    group_N1 = (row_N1 >= offsets_E).sum(1, keepdim=True)
    y_NF = x_ND.new_zeros(x_ND.shape[0], w_EDF.shape[2])
    for e, w_DF in enumerate(w_EDF):
        y_NF = torch.where(group_N1 == e, x_ND @ w_DF, y_NF)
    return y_NF


class _Loop(torch.autograd.Function):
    @staticmethod
    def forward(x_ND: Tensor, w_EDF: Tensor, offsets_E: Tensor) -> Tensor:
        return _forward(x_ND, w_EDF, offsets_E)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, dy_NF: Tensor) -> Any:
        x_ND, w_EDF, offsets_E = ctx.saved_tensors
        dx_ND = _backward_x_once(dy_NF, w_EDF, offsets_E) if ctx.needs_input_grad[0] else None
        dw_EDF = _backward_w_once(dy_NF, x_ND, offsets_E) if ctx.needs_input_grad[1] else None
        return dx_ND, dw_EDF, None


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(x_ND: Tensor, w_EDF: Tensor, offsets_E: Tensor) -> Tensor:
        return torch._grouped_mm(x_ND, w_EDF, offs=offsets_E)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, dy_NF: Tensor) -> Any:
        x_ND, w_EDF, offsets_E = ctx.saved_tensors
        dy_NF = dy_NF.contiguous()  # an expanded gradient (stride 0) is refused
        dx_ND = dw_EDF = None
        if ctx.needs_input_grad[0]:
            dx_ND = _Grouped.apply(dy_NF, w_EDF.transpose(1, 2), offsets_E)
        if ctx.needs_input_grad[1]:
            dw_EDF = torch._grouped_mm(x_ND.t(), dy_NF, offs=offsets_E)
        return dx_ND, dw_EDF, None


def _check(x_ND: Tensor, w_EDF: Tensor, offsets_E: Tensor) -> None:
    if x_ND.dim() != 2 or w_EDF.dim() != 3 or x_ND.shape[1] != w_EDF.shape[1] or x_ND.dtype != w_EDF.dtype:
        raise ValueError(
            f"grouped_mm: x [N, D] and w [E, D, F] must share D and dtype, got {x_ND.dtype} {list(x_ND.shape)} and "
            f"{w_EDF.dtype} {list(w_EDF.shape)}"
        )
    if offsets_E.shape != w_EDF.shape[:1] or offsets_E.dtype != torch.int32:
        raise ValueError(
            f"grouped_mm: offsets must be int32 [{w_EDF.shape[0]}], got {offsets_E.dtype} {list(offsets_E.shape)}"
        )


def _groups(offsets_E: Tensor, rows: int) -> list[tuple[int, slice]]:
    """The groups that are not empty, each with its rows."""
    ends = offsets_E.tolist()
    starts = [0, *ends[:-1]]
    if (ends[-1] if ends else 0) != rows or any(a > b for a, b in zip(starts, ends, strict=False)):
        raise ValueError(f"grouped_mm: offsets {ends} must ascend to the number of rows, {rows}")
    return [(e, slice(a, b)) for e, (a, b) in enumerate(zip(starts, ends, strict=False)) if a < b]


def _mm(a: Tensor, b: Tensor, out: Tensor) -> None:
    """`out = a @ b`; 16-bit products on a CPU are done in float32, which few CPUs are not much faster at."""
    if a.device.type == "cpu" and a.dtype in (torch.bfloat16, torch.float16):
        out.copy_(a.float() @ b.float())
    else:
        torch.mm(a, b, out=out)


def _in_one_call(*factors: Tensor) -> bool:
    """Whether a CPU's product of all groups takes them: of many small groups it costs half as much as one call each."""
    return all(
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and x.numel() > 0
        and sorted(x.stride()[-2:])[0] == 1
        and all(stride % 4 == 0 for stride in x.stride() if stride != 1)
        for x in factors
    )


def _forward_loop(x_ND: Tensor, w_EDF: Tensor, offsets_E: Tensor) -> Tensor:
    groups = _groups(offsets_E, x_ND.shape[0])
    if w_EDF.shape[2] % 4 == 0 and _in_one_call(x_ND, w_EDF):
        return torch._grouped_mm(x_ND, w_EDF, offs=offsets_E)
    y_NF = x_ND.new_empty(x_ND.shape[0], w_EDF.shape[2])
    for e, rows in groups:
        _mm(x_ND[rows], w_EDF[e], y_NF[rows])
    return y_NF


def _backward_x_loop(dy_NF: Tensor, w_EDF: Tensor, offsets_E: Tensor) -> Tensor:
    groups = _groups(offsets_E, dy_NF.shape[0])
    if w_EDF.shape[1] % 4 == 0 and _in_one_call(dy_NF, w_EDF):
        return torch._grouped_mm(dy_NF, w_EDF.transpose(1, 2), offs=offsets_E)
    dx_ND = dy_NF.new_empty(dy_NF.shape[0], w_EDF.shape[1])
    for e, rows in groups:
        _mm(dy_NF[rows], w_EDF[e].t(), dx_ND[rows])
    return dx_ND


def _backward_w_loop(dy_NF: Tensor, x_ND: Tensor, offsets_E: Tensor) -> Tensor:
    groups = _groups(offsets_E, x_ND.shape[0])
    if _in_one_call(x_ND, dy_NF):
        return torch._grouped_mm(x_ND.t(), dy_NF, offs=offsets_E)
    shape = (len(offsets_E), x_ND.shape[1], dy_NF.shape[1])
    dw_EDF = x_ND.new_empty(shape) if len(groups) == len(offsets_E) else x_ND.new_zeros(shape)
    for e, rows in groups:
        _mm(x_ND[rows].t(), dy_NF[rows], dw_EDF[e])
    return dw_EDF


_forward = opaque_op(
    "grouped_mm(Tensor x, Tensor w, Tensor offsets) -> Tensor",
    fake=lambda x, w, offsets: x.new_empty(x.shape[0], w.shape[2]),
)(_forward_loop)

_backward_x = opaque_op(
    "grouped_mm_backward_x(Tensor dy, Tensor w, Tensor offsets) -> Tensor",
    fake=lambda dy, w, offsets: dy.new_empty(dy.shape[0], w.shape[1]),
)(_backward_x_loop)

_backward_w = opaque_op(
    "grouped_mm_backward_w(Tensor dy, Tensor x, Tensor offsets) -> Tensor",
    fake=lambda dy, x, offsets: x.new_empty(offsets.shape[0], x.shape[1], dy.shape[1]),
)(_backward_w_loop)

_backward_x_once = first_order(_backward_x, "grouped_mm")
_backward_w_once = first_order(_backward_w, "grouped_mm")


def _largest_group_bytes(a: Tensor, b: Tensor, out_numel: int) -> int:
    """Float32 copies of both factors and the product, if one group holds every row."""
    narrow = a.device.type == "cpu" and a.dtype in (torch.bfloat16, torch.float16)
    return 4 * (a.numel() + b.numel() + out_numel) if narrow else 0


WORKSPACE: dict[str, Callable[..., int]] = {
    "ftrain::grouped_mm": lambda x, w, offsets: _largest_group_bytes(x, w.select(0, 0), x.shape[0] * w.shape[2]),
    "ftrain::grouped_mm_backward_x": lambda dy, w, offsets: _largest_group_bytes(
        dy, w.select(0, 0), dy.shape[0] * w.shape[1]
    ),
    "ftrain::grouped_mm_backward_w": lambda dy, x, offsets: _largest_group_bytes(dy, x, x.shape[1] * dy.shape[1]),
}


def _grouped_flops(a: Tensor, b: Tensor, *rest: object, **options: object) -> int:
    """Of torch's own op: `offs` cut the rows of a, the columns of b, or the dim that two matrices share.

    `[N, D] x [E, D, F]`, `[E, D, F] x [F, N]`, `[D, N] x [N, F]`, and without `offs` `[E, N, D] x [E, D, F]`.
    """
    rows = a.select(0, 0) if a.dim() == 3 and b.dim() == 2 else a
    return 2 * rows.numel() * b.shape[-1]


FLOPS: dict[str, Callable[..., int]] = {
    "ftrain::grouped_mm": lambda x, w, offsets: 2 * x.numel() * w.shape[2],
    "ftrain::grouped_mm_backward_x": lambda dy, w, offsets: 2 * dy.numel() * w.shape[1],
    "ftrain::grouped_mm_backward_w": lambda dy, x, offsets: 2 * dy.numel() * x.shape[1],
    "aten::_grouped_mm": _grouped_flops,
    "aten::_scaled_grouped_mm": _grouped_flops,
    "aten::_scaled_grouped_mm_v2": _grouped_flops,
}
