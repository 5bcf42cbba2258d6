"""torch's own attention with dropout of weights, drawn by a function that is given: with scores in memory.

Legend: B rows, L tokens of a row, S keys of a row, H query heads, E width of a module.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Kept = Callable[[tuple[int, ...], float], Tensor]
"""From a shape and a probability to ones with that probability, else zeros, floating, of that shape."""
_OWN = {"bias_k": "add_bias_kv", "bias_v": "add_bias_kv", "add_zero_attn": "add_zero_attn"}


def scaled_dot_product(
    kept: Kept,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`, `[..., L, V]`, whose weights are dropped by `kept`."""
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        L, S = scores.shape[-2:]
        seen_LS = torch.ones(L, S, dtype=torch.bool, device=query.device).tril()
        scores = scores.masked_fill(~seen_LS, -torch.inf)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    return dropped(kept, scores.softmax(-1), dropout_p) @ value


def dropped(kept: Kept, weights: Tensor, p: float) -> Tensor:
    """`weights` of any shape with zeros in place of some, with probability `p`; the others are larger for it."""
    return weights * (kept(tuple(weights.shape), 1 - p).to(weights.dtype) / (1 - p))


def multi_head(kept: Kept, run: Callable[..., Any], given: dict[str, Any]) -> Any:
    """`torch.nn.functional.multi_head_attention_forward`, as `nn.MultiheadAttention` calls it, whose weights are
    dropped by `kept`.

    `run`: that function; `given`: its arguments, by name. The weights are its own; the values are weighed here.
    ValueError for a module that adds keys of its own.
    """
    p = given["dropout_p"]
    strange = next((name for name in _OWN if given.get(name) is not None and given[name] is not False), None)
    if strange is not None or given.get("static_v") is not None:
        option = _OWN.get(strange or "", "static_v")
        raise ValueError(
            f"nn.MultiheadAttention with {option} drops weights (p={p}), which a bridged module draws from a key only "
            f"without {option}: build it without, or with dropout=0"
        )
    wants, averaged = given.get("need_weights", True), given.get("average_attn_weights", True)
    own = {**given, "dropout_p": 0.0, "need_weights": True, "average_attn_weights": False}
    _, weights = run(**own)
    single = weights.dim() == 3
    value = given["value"].unsqueeze(1) if single else given["value"]
    weights = dropped(kept, weights.unsqueeze(0) if single else weights, p)
    B, H, _, S = weights.shape
    v_BHSK = _values(given, value).view(S, B, H, -1).permute(1, 2, 0, 3)
    out_LBE = (weights @ v_BHSK).permute(2, 0, 1, 3).flatten(2)
    out_LBE = torch.nn.functional.linear(out_LBE, given["out_proj_weight"], given["out_proj_bias"])
    shown = weights.mean(1) if averaged else weights
    if single:
        out_LBE, shown = out_LBE.squeeze(1), shown.squeeze(0)
    return out_LBE, shown if wants else None


def _values(given: dict[str, Any], value: Tensor) -> Tensor:
    """The values of all heads, `[S, B, E]`."""
    E = given["embed_dim_to_check"]
    bias = given["in_proj_bias"]
    weight = given["v_proj_weight"] if given.get("use_separate_proj_weight") else given["in_proj_weight"][2 * E :]
    return torch.nn.functional.linear(value, weight, None if bias is None else bias[2 * E :])
