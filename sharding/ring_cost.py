"""What the ops of ring attention cost, from their arguments alone: bounds over the ranks and over the documents.

T tokens of a rank, L of a run, H query heads, G key/value heads, K head dim, V value dim, C = K + V.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ftrain.kernels import attention_cost
from ftrain.kernels.attention_cpu import BLOCK
from ftrain.kernels.dtypes import accumulate_dtype
from ftrain.sharding.ring_block import Step


def _seen(T: int, how: Step) -> float:
    """A bound of the pairs of query and key that a step computes on the busiest rank; causal squares count half."""
    dense = attention_cost.seen_pairs(T, T, False, how.window)
    return dense / 2 if how.causal and (how.zigzag or how.step == 0) else dense


def forward_flops(q: Tensor, kv: Tensor, out: object, lse: object, host: object, me: object, *how: Any) -> int:
    """Floating-point operations of `ring_forward`'s two matmuls, scores and output; only shapes are read."""
    return int(2 * q.shape[1] * kv.shape[2] * _seen(q.shape[0], Step(*how)))


def backward_flops(
    grad: Tensor, q: Tensor, kv: Tensor, out: Tensor, lse: Tensor, host: object, me: object, *how: Any
) -> int:
    """Floating-point operations of `ring_backward`'s five matmuls; only shapes are read.

    They are the scores again, and the gradients of probabilities, values, queries and keys.
    """
    K, V = q.shape[2], grad.shape[2]
    return int(2 * q.shape[1] * (3 * K + 2 * V) * _seen(q.shape[0], Step(*how)))


def forward_workspace(
    q: Tensor, kv: Tensor, out: object, lse: object, host: Tensor | None, me: object, *how: Any
) -> int:
    """A bound of the bytes that `ring_forward` holds beyond its outputs on any rank; only shapes are read."""
    K = q.shape[2]
    how_, (k, v) = Step(*how), kv.split([K, kv.shape[2] - K], -1)
    T, H, item = q.shape[0], q.shape[1], accumulate_dtype(q.dtype).itemsize
    L = T // 2 if how_.zigzag else T
    rule = (how_.causal, how_.window, how_.scale, None, None, how_.softcap)
    q, kv, k, v = (x.narrow(0, 0, L) for x in (q, kv, k, v))
    local = attention_cost.forward_workspace(q, k, v, host, None, *rule) if how_.step == 0 else 0
    return max(local, _rectangle_bytes(q, kv, how_, 1)) + L * H * (v.shape[2] * q.element_size() + 3 * item)


def backward_workspace(
    grad: Tensor,
    q: Tensor,
    kv: Tensor,
    out: Tensor,
    lse: Tensor,
    host: Tensor | None,
    me: object,
    *how: Any,
) -> int:
    """A bound of the bytes that `ring_backward` holds beyond its outputs on any rank; only shapes are read."""
    K = q.shape[2]
    how_, (k, v) = Step(*how), kv.split([K, kv.shape[2] - K], -1)
    L = q.shape[0] // 2 if how_.zigzag else q.shape[0]
    rule = (how_.causal, how_.window, how_.scale, None, None, how_.softcap)
    q, kv, k, v, grad, out = (x.narrow(0, 0, L) for x in (q, kv, k, v, grad, out))
    lse = lse.narrow(1, 0, L)
    local = attention_cost.backward_workspace(grad, q, k, v, out, lse, host, None, *rule) if how_.step == 0 else 0
    results = (q.numel() + kv.numel()) * q.element_size() + lse.numel() * lse.element_size()
    return max(local, _rectangle_bytes(q, kv, how_, 2)) + results


def _rectangle_bytes(q: Tensor, kv: Tensor, how: Step, passes: int) -> int:
    """What a rectangle of these runs holds: casts, scores where no fused kernel serves, a mask where a window is."""
    (L, H, K), C = q.shape, kv.shape[2]
    item = accumulate_dtype(q.dtype).itemsize
    casts = passes * (q.numel() + kv.numel() + L * H * (C - K)) * item
    if q.device.type == "cpu" and C == 2 * K and how.softcap is None:
        rows = L if how.window is None else min(L, max(BLOCK, how.window))
        tile = (0 if how.window is None else rows * min(L, rows + how.window)) + torch.get_num_threads() * rows * 512
    else:
        # two of scores, probabilities and their gradient; rows of queries and outputs; a mask; two tiles' dk and dv
        rows, keys = min(L, BLOCK), L if how.window is None else min(L, BLOCK + how.window)
        tile = rows * (2 * H * keys + passes * H * C + keys) + 2 * (passes - 1) * kv.numel() * keys // max(L, 1)
    return casts + tile * item


WORKSPACE: dict[str, Callable[..., int]] = {
    "ftrain::ring_forward": forward_workspace,
    "ftrain::ring_backward": backward_workspace,
}
"""Op name to a bound of the bytes beyond the op's outputs, from its arguments."""

FLOPS: dict[str, Callable[..., int]] = {"ftrain::ring_forward": forward_flops, "ftrain::ring_backward": backward_flops}
"""Op name to floating-point operations of its matmuls on the busiest rank, recomputation included."""
