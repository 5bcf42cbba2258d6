"""The workspace of ATen's CPU ops: the memory that they allocate beyond their outputs while they run.

Each rule was measured from the allocator's events, op by op (torch 2.11 to 2.13; test_workspace.py measures again).
Scalars, per-row buffers and index conversions of a few KiB are left out. The rules for CUDA are in `workspace_cuda.py`.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ftrain.analysis.workspace_convolution import convolution_backward_workspace, convolution_workspace
from ftrain.analysis.workspace_cuda import cuda_workspace


def aten_workspace(op: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """At most how many bytes of workspace `op(*args, **kwargs)` allocates, on CUDA or CPU. Tensors may be fake."""
    devices = {t.device.type for t in _tensors(args)}
    return cuda_workspace(op, args, kwargs) if devices == {"cuda"} else cpu_workspace(op, args, kwargs)


def cpu_workspace(op: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """At most how many bytes of workspace `op(*args, **kwargs)` allocates on a CPU; 0 if a tensor is elsewhere.

    Tensors may be fake.
    """
    tensors = _tensors((*args, *kwargs.values()))
    if not tensors or any(t.device.type != "cpu" for t in tensors):
        return 0
    rule = RULES.get(op._schema.name)
    if rule is not None:
        return int(rule(*args, **kwargs))
    return _promotion(op, args, kwargs) if torch.Tag.pointwise in op.tags else 0


def _tensors(values: tuple[Any, ...]) -> list[Tensor]:
    flat = [b for a in values for b in (a if isinstance(a, list | tuple) else [a])]
    return [a for a in flat if isinstance(a, Tensor)]


def nbytes(x: Tensor, dtype: torch.dtype | None = None) -> int:
    """Bytes of a contiguous tensor with the shape of `x`, in `dtype` or in its own."""
    return x.numel() * (dtype or x.dtype).itemsize


def _promotion(op: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """An elementwise op converts each operand of another dtype than the common one, whole."""
    if op._schema.name == "aten::masked_fill":
        return 0
    values = args[1:] if op._schema.name == "aten::where" else args
    operands = [a for a in values if isinstance(a, Tensor) and a.dim() > 0]
    out = kwargs.get("out")
    if not operands:
        return 0
    common = functools.reduce(torch.promote_types, [a.dtype for a in operands])
    scalars = [a for a in args if isinstance(a, float) or (isinstance(a, Tensor) and a.dim() == 0)]
    divides = op._schema.name in ("aten::div", "aten::true_divide") and "rounding_mode" not in kwargs
    if not common.is_floating_point and not common.is_complex and (divides or _any_floating(scalars)):
        common = torch.get_default_dtype()
    converted = sum(nbytes(a, common) for a in operands if a.dtype != common)
    if isinstance(out, Tensor) and out.dtype != common:
        converted += nbytes(out, common)
    return converted


def _any_floating(scalars: list[Any]) -> bool:
    return any(isinstance(s, float) or s.is_floating_point() for s in scalars)


def _cast(x: Tensor, dtype: torch.dtype | None) -> int:
    """A reduction first converts its operand to the dtype it sums in, whole."""
    target = dtype or (x.dtype if x.is_floating_point() or x.is_complex() else torch.int64)
    return nbytes(x, target) if target != x.dtype else 0


def _sum(x: Tensor, *rest: Any, dtype: torch.dtype | None = None, **_: Any) -> int:
    return _cast(x, dtype)


def _mean(x: Tensor, *rest: Any, dtype: torch.dtype | None = None, **_: Any) -> int:
    if x.dtype in (torch.bfloat16, torch.float16):
        return nbytes(x, torch.float32)
    return _cast(x, dtype)


def _norm(x: Tensor, *rest: Any, dtype: torch.dtype | None = None, **_: Any) -> int:
    return nbytes(x, dtype) if dtype is not None and dtype != x.dtype else 0


def _copy_if_strided(*tensors: Tensor) -> int:
    return sum(nbytes(t) for t in tensors if not t.is_contiguous())


def _softmax(x: Tensor, *rest: Any) -> int:
    return _copy_if_strided(x)


def _softmax_backward(grad: Tensor, y: Tensor, *rest: Any) -> int:
    return _copy_if_strided(grad, y)


def _gelu_backward(grad: Tensor, x: Tensor, *, approximate: str = "none") -> int:
    """oneDNN's erf version needs contiguous rows: operands are copied, and so is a result laid out as a transposed
    gradient.
    """
    if approximate != "none" or grad.dtype != torch.float32 or grad.stride() == x.stride():
        return 0
    steps = [s for s in grad.stride() if s]
    return _copy_if_strided(grad, x) + (nbytes(x) if steps != sorted(steps, reverse=True) else 0)


def _layer_norm(x: Tensor, shape: list[int], *rest: Any) -> int:
    return _copy_if_strided(x)


def _layer_norm_backward(grad: Tensor, x: Tensor, shape: list[int], mean: Tensor, rstd: Tensor, *rest: Any) -> int:
    per_thread = 2 * torch.get_num_threads() * math.prod(shape)
    return (
        _copy_if_strided(grad, x) + per_thread * (rest[0].dtype if rest and rest[0] is not None else x.dtype).itemsize
    )


def _group_norm_backward(grad: Tensor, x: Tensor, *rest: Any) -> int:
    n, c = x.shape[:2]
    return 2 * n * c * x.dtype.itemsize + _copy_if_strided(grad)


def _matmul_copies(*matrices: Tensor) -> int:
    """BLAS takes rows or columns that are adjacent; anything else (steps, broadcast rows) is copied."""
    return sum(nbytes(m) for m in matrices if not _fits_blas(m))


def _fits_blas(m: Tensor) -> bool:
    rows, columns = m.shape[-2:]
    r, c = m.stride()[-2:]
    return (c == 1 and r >= max(1, columns)) or (r == 1 and c >= max(1, rows))


def _mm(a: Tensor, b: Tensor, **_: Any) -> int:
    return _matmul_copies(a, b)


def _addmm(bias: Tensor, a: Tensor, b: Tensor, **_: Any) -> int:
    return _matmul_copies(a, b)


def _bmm(a: Tensor, b: Tensor, **_: Any) -> int:
    """Batches that do not fit are multiplied one after the other, with a copy of one matrix each."""
    return sum(nbytes(m[0]) for m in (a, b) if m.shape[0] and not _fits_blas(m))


def _baddbmm(bias: Tensor, a: Tensor, b: Tensor, **_: Any) -> int:
    return _bmm(a, b)


def _mv(a: Tensor, x: Tensor) -> int:
    return _matmul_copies(a)


def _logsumexp(x: Tensor, dim: list[int], keepdim: bool = False) -> int:
    """`exp(x - max)` and the maxima."""
    return nbytes(x) + nbytes(x.amax(dim))


def _dropout(x: Tensor, p: float, train: bool | None = True) -> int:
    return nbytes(x) if train else 0


def _embedding(weight: Tensor, indices: Tensor, *rest: Any) -> int:
    return _copy_if_strided(indices)


def _embedding_backward(grad: Tensor, indices: Tensor, *rest: Any) -> int:
    return _copy_if_strided(grad, indices)


def _upsample(x: Tensor, *rest: Any, **_: Any) -> int:
    """With several channels, input and output are copied to the channels-last format."""
    size = rest[0] if rest else None
    if x.shape[1] == 1 or not size:
        return 0
    return 0 if x.is_contiguous(memory_format=torch.channels_last) else nbytes(x) + _resized(x, size)


def _resized(x: Tensor, size: list[int]) -> int:
    return math.prod(x.shape[:2]) * math.prod(size) * x.dtype.itemsize


def _unfold(x: Tensor, *rest: Any, **_: Any) -> int:
    return nbytes(x)


def _loss_with_temporary(x: Tensor, *rest: Any, **_: Any) -> int:
    return nbytes(x)


def _cat(tensors: list[Tensor], dim: int = 0) -> int:
    common = functools.reduce(torch.promote_types, [t.dtype for t in tensors])
    return max((nbytes(t) for t in tensors if t.dtype != common), default=0)


def _attention_tiles(q_BHTK: Tensor, k_BHSK: Tensor) -> tuple[int, int]:
    """How many queries and keys the CPU's flash attention takes at a time."""
    queries = q_BHTK.shape[2]
    step = 256 if queries >= 768 else 64 if queries >= 192 else 32
    return min(step, queries), min(512, k_BHSK.shape[2])


def _attention(q_BHTK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, *rest: Any, **_: Any) -> int:
    t, s = _attention_tiles(q_BHTK, k_BHSK)
    floats = t * s + 2 * t + t * q_BHTK.shape[-1]
    reduced = t * s * q_BHTK.dtype.itemsize if q_BHTK.dtype.itemsize < 4 else 0
    return torch.get_num_threads() * (floats * max(4, q_BHTK.dtype.itemsize) + reduced)


def _attention_backward(
    grad_BHTK: Tensor, q_BHTK: Tensor, k_BHSK: Tensor, v: Tensor, out_BHTK: Tensor, *rest: Any, **_: Any
) -> int:
    t, s = _attention_tiles(q_BHTK, k_BHSK)
    reduced = 2 * t * s * q_BHTK.dtype.itemsize if q_BHTK.dtype.itemsize < 4 else 0
    per_thread = (t + 2 * t * s) * max(4, q_BHTK.dtype.itemsize) + reduced
    return torch.get_num_threads() * per_thread + _copy_if_strided(grad_BHTK.transpose(1, 2))


# By the name of an op, the function from its arguments to the bytes of its workspace.
RULES: Mapping[str, Callable[..., int]] = {
    "aten::sum": _sum,
    "aten::prod": _sum,
    "aten::cumsum": _sum,
    "aten::cumprod": _sum,
    "aten::mean": _mean,
    "aten::linalg_vector_norm": _norm,
    "aten::_softmax": _softmax,
    "aten::_log_softmax": _softmax,
    "aten::_softmax_backward_data": _softmax_backward,
    "aten::_log_softmax_backward_data": _softmax_backward,
    "aten::log_sigmoid_forward": _softmax,
    "aten::gelu_backward": _gelu_backward,
    "aten::native_layer_norm": _layer_norm,
    "aten::native_layer_norm_backward": _layer_norm_backward,
    "aten::native_group_norm_backward": _group_norm_backward,
    "aten::mm": _mm,
    "aten::addmm": _addmm,
    "aten::bmm": _bmm,
    "aten::baddbmm": _baddbmm,
    "aten::mv": _mv,
    "aten::logsumexp": _logsumexp,
    "aten::native_dropout": _dropout,
    "aten::embedding": _embedding,
    "aten::embedding_dense_backward": _embedding_backward,
    "aten::upsample_nearest2d": _upsample,
    "aten::upsample_bilinear2d": _upsample,
    "aten::avg_pool2d": _softmax,
    "aten::im2col": _unfold,
    "aten::mse_loss": _loss_with_temporary,
    "aten::smooth_l1_loss": _loss_with_temporary,
    "aten::cat": _cat,
    "aten::convolution": convolution_workspace,
    "aten::convolution_backward": convolution_backward_workspace,
    "aten::_scaled_dot_product_flash_attention_for_cpu": _attention,
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward,
}
