"""The workspace of a convolution on the CPU.

oneDNN works on blocks of channels: it keeps copies of operands and results that are reordered and padded to whole
blocks. ATen's plain implementation unfolds its input into columns. Which of the two runs follows ATen's rule
(`use_mkldnn` in ATen/native/Convolution.cpp).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def convolution_workspace(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> int:
    """Bytes that `aten::convolution` allocates beyond its output.

    `x`: `[N, C, *space]`. `w`: `[C_out, C / groups, *kernel]`, transposed `[C, C_out / groups, *kernel]`. `bias`:
    `[C_out]`. Other arguments as in ATen; tensors may be fake.
    """
    y = torch.ops.aten.convolution.default(
        x.new_empty(x.shape, device="meta"),
        w.new_empty(w.shape, device="meta"),
        None,
        stride,
        padding,
        dilation,
        transposed,
        output_padding,
        groups,
    )
    if not _uses_onednn(x, w, stride, dilation, groups):
        return 0 if transposed else _columns(x, w, y, stride, padding)
    if _channels_last(x) or _channels_last(w):
        return 2 * _bytes(w)
    if transposed:
        return max(_blocked(x) + _blocked_weight(w, groups), _scattered(y, stride)) - _bytes(y)
    operands = _bytes(w) if x.shape[1] < 4 else _blocked(x) + _blocked_weight(w, groups)
    return max(operands, _bytes(y)) + _blocked(y) - _bytes(y)


def convolution_backward_workspace(
    grad_y: Tensor,
    x: Tensor,
    w: Tensor,
    bias_sizes: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    output_mask: Sequence[bool],
) -> int:
    """Bytes that `aten::convolution_backward` allocates beyond the three gradients.

    It is the larger of its two phases: the gradient of `x` is computed first, then that of `w`. `x` and `w` have the
    shapes of `convolution_workspace`, `grad_y` that of the output. `output_mask`: which of the gradients of x, w and
    bias are computed.
    """
    if not _uses_onednn(x, w, stride, dilation, groups):
        return 0 if transposed else _columns(x, w, grad_y, stride, padding)
    if _channels_last(x) or _channels_last(w):
        return 3 * _bytes(w)
    grad_x = _bytes(x) if output_mask[0] else 0
    grad_w = _bytes(w) if output_mask[1] else 0
    image = grad_y if transposed else x
    plain = _blocked(grad_y) + _blocked(x) - _blocked(image) + _bytes(w)
    operands = plain if image.shape[1] == 3 else _blocked(grad_y) + _blocked(x) + _blocked_weight(w, groups)
    first = second = 0
    if output_mask[0] and transposed:
        first = max(operands, _blocked(x) + _bytes(x))
    elif output_mask[0]:
        reordered = _bytes(x) + _bytes(w) if _steps(stride) else _blocked(x) + _blocked_weight(w, groups)
        first = max(_blocked(grad_y) + reordered, _scattered(x, stride))
    if output_mask[1]:
        second = grad_x + operands
    return max(max(first, second) - grad_x - grad_w, 0)


def _uses_onednn(x: Tensor, w: Tensor, stride: Sequence[int], dilation: Sequence[int], groups: int) -> bool:
    if not torch.backends.mkldnn.is_available() or x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    kernel = (1, *w.shape[2:]) if w.dim() == 3 else tuple(w.shape[2:])
    one_by_one = kernel[-1] == 1 and kernel[-2] == 1
    worth_it = _steps(stride) or _steps(dilation) or x.shape[0] >= 16 or not one_by_one or torch.get_num_threads() > 1
    large = min(kernel[-2:]) > 3 or x.shape[0] > 1 or math.prod(x.shape[:4]) > 20480
    return worth_it and (groups > 1 or large)


def _channels_last(x: Tensor) -> bool:
    """True for channels-last tensors, which oneDNN reads without a copy; then only weights are reordered."""
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def _columns(x: Tensor, w: Tensor, y: Tensor, stride: Sequence[int], padding: Sequence[int]) -> int:
    """Bytes of the unfolded input, one window per output position; 0 for a 1x1 kernel."""
    if math.prod(w.shape[2:]) == 1 and not _steps(stride) and not any(padding):
        return 0
    return x.shape[0] * math.prod(w.shape[1:]) * math.prod(y.shape[2:]) * x.dtype.itemsize


def _scattered(result: Tensor, stride: Sequence[int]) -> int:
    """Bytes for the result of a transposed convolution: a blocked and a plain copy, or three plain with strides."""
    return 3 * _bytes(result) if _steps(stride) else _blocked(result) + _bytes(result)


def _blocked(x: Tensor) -> int:
    return x.shape[0] * _padded(x.shape[1]) * math.prod(x.shape[2:]) * x.dtype.itemsize


def _blocked_weight(w: Tensor, groups: int) -> int:
    if groups > 1:
        return _bytes(w)
    return _padded(w.shape[0]) * _padded(w.shape[1]) * math.prod(w.shape[2:]) * w.dtype.itemsize


def _padded(channels: int) -> int:
    block = 16 if "AVX512" in torch.backends.cpu.get_cpu_capability() else 8
    return -(-channels // block) * block if channels > 1 else block


def _steps(sizes: Sequence[int]) -> bool:
    return any(s != 1 for s in sizes)


def _bytes(x: Tensor) -> int:
    return x.numel() * x.dtype.itemsize
