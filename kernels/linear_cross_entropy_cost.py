"""What the chunked linear cross entropy costs beyond its shapes: bytes while it runs, and operations of its matmuls.

T tokens, D model, V vocabulary, c tokens of a chunk.
"""

from collections.abc import Callable

from torch import Tensor

from ftrain.kernels.dtypes import accumulate_dtype
from ftrain.kernels.linear_cross_entropy import rows_together


def _chunk_bytes(x: Tensor, w: Tensor, transposed: bool, chunk: int, slope: bool) -> int:
    """Logits of one chunk, their half precision form, the softcap's slope, and on a CPU the tokens gathered for it."""
    c, V, item = min(chunk, x.shape[0]), w.shape[0 if transposed else 1], accumulate_dtype(x.dtype).itemsize
    half = x.element_size() if x.element_size() < item else 0
    rows = c if x.is_cuda else rows_together(c, V, item)
    gathered = 0 if x.is_cuda else c * x.shape[1] * x.element_size()
    return c * V * (item + half) + (rows * V * item if slope else 0) + gathered


def _product_bytes(x: Tensor, w: Tensor, transposed: bool, chunk: int, need_x: bool, need_w: bool) -> int:
    """A chunk's gradient by its logits, in the inputs' dtype, and the larger of its products with weight and tokens."""
    c, D, V = min(chunk, x.shape[0]), x.shape[1], w.shape[0 if transposed else 1]
    summed_apart = need_w and w.element_size() < accumulate_dtype(x.dtype).itemsize
    largest = max(c * D if need_x else 0, min(c, D) * V if summed_apart else 0)
    return (c * V + largest) * x.element_size()


def _loss_workspace(
    x: Tensor,
    w: Tensor,
    labels: Tensor,
    weights: Tensor | None,
    ignore_index: int,
    softcap: float | None,
    transposed: bool,
    chunk: int,
) -> int:
    return _chunk_bytes(x, w, transposed, chunk, slope=False) + _per_token_bytes(x)


def _grads_workspace(
    x: Tensor,
    w: Tensor,
    labels: Tensor,
    weights: Tensor | None,
    ignore_index: int,
    softcap: float | None,
    transposed: bool,
    chunk: int,
    need_x: bool,
    need_w: bool,
) -> int:
    c, item = min(chunk, x.shape[0]), accumulate_dtype(x.dtype).itemsize
    loop = _chunk_bytes(x, w, transposed, chunk, slope=softcap is not None)
    if x.is_cuda:
        loop = max(loop, _product_bytes(x, w, transposed, chunk, need_x, need_w))
    elif need_x:
        loop += c * x.shape[1] * x.element_size()
    accumulated = w.numel() * item if need_w and w.element_size() < item else 0
    output = w.numel() * w.element_size() if accumulated else 0
    # the sum in float32 stands beside the chunks in the loop, and after it beside the output it is cast to
    return max(accumulated - output + loop, accumulated) + _per_token_bytes(x)


def _per_token_bytes(x: Tensor) -> int:
    """Losses, factors, labels and masks of all tokens."""
    return x.shape[0] * (3 * accumulate_dtype(x.dtype).itemsize + 11)


def _flops(x: Tensor, w: Tensor, *_: object) -> int:
    return 2 * x.shape[0] * w.numel()


def _grads_flops(x: Tensor, w: Tensor, *rest: object) -> int:
    need_x, need_w = rest[-2:]
    return _flops(x, w) * (1 + bool(need_x) + bool(need_w))


WORKSPACE: dict[str, Callable[..., int]] = {
    "ftrain::linear_cross_entropy_loss": _loss_workspace,
    "ftrain::linear_cross_entropy_grads": _grads_workspace,
}
"""Op name to peak bytes beyond the op's outputs, from its arguments."""

FLOPS: dict[str, Callable[..., int]] = {
    "ftrain::linear_cross_entropy_loss": _flops,
    "ftrain::linear_cross_entropy_grads": _grads_flops,
}
"""Op name to floating-point operations of its matmuls; ignored tokens are counted."""
