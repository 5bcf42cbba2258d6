"""torch's own attention in a module that someone else wrote: where nothing is hidden, our primitive on rows.

Legend: B rows, L tokens of a row, S keys of a row, H query heads, G key heads, K head dim.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ftrain.bridge.batches import row_documents
from ftrain.kernels.attention import attention


class RowAttention(TorchFunctionMode):
    """Within the block `scaled_dot_product_attention` of rows `[B, H, L, K]` is our primitive, each row a document.

    What has a mask, drops weights, or is causal with other keys stays torch's own.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:
            return _attend(*args, **kwargs)
        return func(*args, **kwargs)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    whole = query.dim() == key.dim() == value.dim() == 4 and query.shape[0] == key.shape[0]
    grouped = whole and (enable_gqa or query.shape[1] == key.shape[1]) and key.shape[1] == value.shape[1]
    same = grouped and query.shape[2] == key.shape[2]
    if attn_mask is not None or dropout_p or not grouped or (is_causal and not same):
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    rows, length, keys = query.shape[0], query.shape[2], key.shape[2]
    several = rows > 1 or not same
    out_THV = attention(
        _fold(query),
        _fold(key),
        _fold(value),
        segments_T=row_documents(rows, length, query.device) if several else None,
        kv_segments_S=None if same else row_documents(rows, keys, query.device),
        causal=is_causal,
        scale=scale,
    )
    return out_THV.unflatten(0, (rows, length)).transpose(1, 2)


def _fold(x: Tensor) -> Tensor:
    """`[B, H, L, K]` as `[B * L, H, K]`."""
    return x.transpose(1, 2).flatten(0, 1)
