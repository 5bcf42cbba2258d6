"""Attention over packed documents on CUDA: flash attention with cumulative lengths.

flash-attn's kernels where that package is installed, else those that torch carries (the same functions as
`torch.nn.attention.varlen` calls). Both want half precision and one head dim; everything else runs document by document
in plain math, and the host waits for the documents. Documents that are told by offsets cost no launch and no wait.

T query tokens, S key tokens, H query heads, G key/value heads, K head dim, N documents.
Source: Dao, "FlashAttention-2", arXiv 2307.08691.
"""

import importlib
import importlib.util
from functools import cache, lru_cache
from itertools import accumulate
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from ftrain.kernels import attention_cpu
from ftrain.kernels.attention_cpu import Rule, inner_dense
from ftrain.kernels.documents import aligned_lengths, document_offsets


class Layout(NamedTuple):
    """Offsets of the documents of queries and of keys, int32 `[N + 1]` each, and bounds of the longest in tokens."""

    cu_N: Tensor
    cu_kv_N: Tensor
    longest: int
    kv_longest: int


def served_by_flash(q_THK: Tensor, v_SGV: Tensor, softcap: float | None) -> bool:
    """True if flash attention takes these inputs: float16 or bfloat16, V = K, a multiple of 8 up to 256, no empty pack;
    capped scores where flash-attn is installed.
    """
    if softcap is not None and _flash_attn() is None:
        return False
    K = q_THK.shape[2]
    half = q_THK.dtype in (torch.float16, torch.bfloat16)
    return half and v_SGV.shape[2] == K <= 256 and K % 8 == 0 and q_THK.shape[0] > 0 and v_SGV.shape[0] > 0


def forward(
    q_THK: Tensor, k_SGK: Tensor, v_SGV: Tensor, documents: Tensor | None, kv_documents: Tensor | None, rule: Rule
) -> tuple[Tensor, Tensor]:
    """Output `[T, H, V]` in the dtype of the queries and log-sum-exp `[H, T]` in float32.

    `documents`, `kv_documents`: offsets int32 `[N + 1]` where the rule bounds the longest document, else ids int64, for
    which the host waits; None is one document. What flash attention does not take goes to `attention_cpu.forward`.
    """
    layout = _layout(q_THK, v_SGV, documents, kv_documents, rule)
    if layout is None:
        return attention_cpu.forward(q_THK, k_SGK, v_SGV, documents, kv_documents, rule)
    q_THK, k_SGK, v_SGV = (inner_dense(x) for x in (q_THK, k_SGK, v_SGV))
    left, right = _sides(rule)
    flash = _flash_attn()
    if flash is not None:
        out_THK, lse_HT, *_ = flash._flash_attn_varlen_forward(
            q_THK, k_SGK, v_SGV, *layout, 0.0, rule.scale, rule.causal, left, right, rule.softcap or 0.0
        )
    else:
        out_THK, lse_HT, *_ = torch.ops.aten._flash_attention_forward(
            q_THK,
            k_SGK,
            v_SGV,
            *layout,
            0.0,
            rule.causal,
            False,
            scale=rule.scale,
            window_size_left=left,
            window_size_right=right,
        )
    return out_THK.contiguous(), lse_HT.contiguous()


def backward(
    grad_THV: Tensor,
    q_THK: Tensor,
    k_SGK: Tensor,
    v_SGV: Tensor,
    out_THV: Tensor,
    lse_HT: Tensor,
    documents: Tensor | None,
    kv_documents: Tensor | None,
    rule: Rule,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values, of their shapes and dtypes.

    `out_THV`, `lse_HT`: what `forward` returned. `documents`, `kv_documents`, `rule`: as in `forward`, offsets int32
    `[N + 1]` or ids.
    """
    layout = _layout(q_THK, v_SGV, documents, kv_documents, rule)
    if layout is None:
        given = (grad_THV, q_THK, k_SGK, v_SGV, out_THV, lse_HT, documents, kv_documents)
        return attention_cpu.backward(*given, rule)
    grad_THV, q_THK, k_SGK, v_SGV = (inner_dense(x) for x in (grad_THV, q_THK, k_SGK, v_SGV))
    if _flash_attn() is not None:
        return _flash_attn_backward(grad_THV, q_THK, k_SGK, v_SGV, out_THV, lse_HT, layout, rule)
    left, right = _sides(rule)
    # without dropout the state of the random numbers is never read
    rng_state = torch.empty(2, dtype=torch.uint64, device=q_THK.device)
    unused = torch.empty(0, device=q_THK.device)
    grads = torch.ops.aten._flash_attention_backward(
        grad_THV,
        q_THK,
        k_SGK,
        v_SGV,
        out_THV,
        lse_HT,
        *layout,
        0.0,
        rule.causal,
        rng_state,
        unused,
        scale=rule.scale,
        window_size_left=left,
        window_size_right=right,
    )
    dq_THK, dk_SGK, dv_SGV = (g.contiguous() for g in grads)
    return dq_THK, dk_SGK, dv_SGV


def _flash_attn_backward(
    grad_THK: Tensor,
    q_THK: Tensor,
    k_SGK: Tensor,
    v_SGK: Tensor,
    out_THK: Tensor,
    lse_HT: Tensor,
    layout: Layout,
    rule: Rule,
) -> tuple[Tensor, Tensor, Tensor]:
    flash = _flash_attn()
    assert flash is not None
    left, right = _sides(rule)
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q_THK, k_SGK, v_SGK))
    flash._flash_attn_varlen_backward(
        grad_THK,
        q_THK,
        k_SGK,
        v_SGK,
        out_THK,
        lse_HT,
        dq,
        dk,
        dv,
        *layout,
        0.0,
        rule.scale,
        rule.causal,
        left,
        right,
        rule.softcap or 0.0,
        None,
        torch.are_deterministic_algorithms_enabled(),
    )
    return dq, dk, dv


@cache
def _flash_attn() -> ModuleType | None:
    """flash-attn's low-level functions (2.7 and later), or None where the package is not installed."""
    if importlib.util.find_spec("flash_attn") is None:
        return None
    return importlib.import_module("flash_attn.flash_attn_interface")


def _layout(
    q_THK: Tensor, v_SGV: Tensor, documents: Tensor | None, kv_documents: Tensor | None, rule: Rule
) -> Layout | None:
    """What flash attention is told of the documents; None where it does not serve. The host waits for ids alone."""
    if not served_by_flash(q_THK, v_SGV, rule.softcap):
        return None
    T, S = q_THK.shape[0], v_SGV.shape[0]
    if documents is None:
        return Layout(whole_pack_offsets(T, q_THK.device), whole_pack_offsets(S, q_THK.device), T, S)
    if rule.longest is not None:
        if kv_documents is None or rule.kv_longest is None:
            return Layout(documents, documents, rule.longest, rule.longest)
        return Layout(documents, kv_documents, rule.longest, rule.kv_longest)
    if kv_documents is None:
        cu_N = document_offsets(documents)
        longest = int(cu_N.diff().max())
        return Layout(cu_N, cu_N, longest, longest)
    return _aligned(documents, kv_documents)


def _aligned(segments_T: Tensor, kv_segments_S: Tensor) -> Layout | None:
    """Of the ids of two packs; None if their documents come in different orders."""
    lengths, kv_lengths = zip(*aligned_lengths(segments_T, kv_segments_S), strict=True)
    cu = torch.tensor([[0, *accumulate(lengths)], [0, *accumulate(kv_lengths)]], dtype=torch.int32)
    cu_N, cu_kv_N = cu.to(segments_T.device).unbind()
    return Layout(cu_N, cu_kv_N, max(lengths), max(kv_lengths))


@lru_cache(maxsize=64)
def whole_pack_offsets(tokens: int, device: torch.device) -> Tensor:
    """The offsets int32 `[2]` of one document that fills the pack, made on the device once."""
    return torch.arange(2, dtype=torch.int32, device=device) * tokens


def _sides(rule: Rule) -> tuple[int, int]:
    """How many keys before and after its own a query sees; -1 is all of them."""
    reach = -1 if rule.window is None else rule.window - 1
    return reach, 0 if rule.causal else reach
