"""Attention over packed documents on CUDA: flash attention with cumulative lengths.

flash-attn's kernels where that package is installed, else those that torch carries (the same functions as
`torch.nn.attention.varlen` calls). Both want half precision and one head dim; everything else runs document by document
in plain math.

T tokens, H query heads, G key/value heads, K head dim, N documents.
Source: Dao, "FlashAttention-2", arXiv 2307.08691.
"""

import importlib
import importlib.util
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from kernels import attention_cpu
from kernels.attention_cpu import Rule, inner_dense
from kernels.documents import document_offsets


def served_by_flash(q_THK: Tensor, v_TGV: Tensor, kv_segments_S: Tensor | None) -> bool:
    """True if flash attention takes these inputs."""
    K = q_THK.shape[2]
    half = q_THK.dtype in (torch.float16, torch.bfloat16)
    return half and kv_segments_S is None and v_TGV.shape[2] == K <= 256 and K % 8 == 0 and q_THK.shape[0] > 0


def forward(
    q_THK: Tensor,
    k_TGK: Tensor,
    v_TGV: Tensor,
    segments_T: Tensor | None,
    kv_segments_S: Tensor | None,
    rule: Rule,
) -> tuple[Tensor, Tensor]:
    """Output `[T, H, V]` and log-sum-exp `[H, T]`."""
    if not served_by_flash(q_THK, v_TGV, kv_segments_S):
        return attention_cpu.forward(q_THK, k_TGK, v_TGV, segments_T, kv_segments_S, rule)
    q_THK, k_TGK, v_TGV = (inner_dense(x) for x in (q_THK, k_TGK, v_TGV))
    cu_N, longest = _offsets(segments_T, q_THK, rule.max_documents)
    left, right = _sides(rule)
    flash = _flash_attn()
    if flash is not None:
        out_THK, lse_HT, *_ = flash._flash_attn_varlen_forward(
            q_THK, k_TGK, v_TGV, cu_N, cu_N, longest, longest, 0.0, rule.scale, rule.causal, left, right
        )
    else:
        out_THK, lse_HT, *_ = torch.ops.aten._flash_attention_forward(
            q_THK,
            k_TGK,
            v_TGV,
            cu_N,
            cu_N,
            longest,
            longest,
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
    k_TGK: Tensor,
    v_TGV: Tensor,
    out_THV: Tensor,
    lse_HT: Tensor,
    segments_T: Tensor | None,
    kv_segments_S: Tensor | None,
    rule: Rule,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values."""
    if not served_by_flash(q_THK, v_TGV, kv_segments_S):
        return attention_cpu.backward(grad_THV, q_THK, k_TGK, v_TGV, out_THV, lse_HT, segments_T, kv_segments_S, rule)
    grad_THV, q_THK, k_TGK, v_TGV = (inner_dense(x) for x in (grad_THV, q_THK, k_TGK, v_TGV))
    cu_N, longest = _offsets(segments_T, q_THK, rule.max_documents)
    if _flash_attn() is not None:
        return _flash_attn_backward(grad_THV, q_THK, k_TGK, v_TGV, out_THV, lse_HT, cu_N, longest, rule)
    left, right = _sides(rule)
    # without dropout the state of the random numbers is never read
    rng_state = torch.zeros(2, dtype=torch.uint64, device=q_THK.device)
    unused = torch.empty(0, device=q_THK.device)
    grads = torch.ops.aten._flash_attention_backward(
        grad_THV,
        q_THK,
        k_TGK,
        v_TGV,
        out_THV,
        lse_HT,
        cu_N,
        cu_N,
        longest,
        longest,
        0.0,
        rule.causal,
        rng_state,
        unused,
        scale=rule.scale,
        window_size_left=left,
        window_size_right=right,
    )
    dq_THK, dk_TGK, dv_TGV = (g.contiguous() for g in grads)
    return dq_THK, dk_TGK, dv_TGV


def _flash_attn_backward(
    grad_THK: Tensor,
    q_THK: Tensor,
    k_TGK: Tensor,
    v_TGK: Tensor,
    out_THK: Tensor,
    lse_HT: Tensor,
    cu_N: Tensor,
    longest: int,
    rule: Rule,
) -> tuple[Tensor, Tensor, Tensor]:
    flash = _flash_attn()
    assert flash is not None
    left, right = _sides(rule)
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q_THK, k_TGK, v_TGK))
    flash._flash_attn_varlen_backward(
        grad_THK,
        q_THK,
        k_TGK,
        v_TGK,
        out_THK,
        lse_HT,
        dq,
        dk,
        dv,
        cu_N,
        cu_N,
        longest,
        longest,
        0.0,
        rule.scale,
        rule.causal,
        left,
        right,
        0.0,
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


def _offsets(segments_T: Tensor | None, q_THK: Tensor, max_documents: int | None) -> tuple[Tensor, int]:
    """Cumulative lengths, and a bound of the longest: exact at the price of waiting, or the pack's size."""
    T = q_THK.shape[0]
    if segments_T is None:
        return torch.arange(2, dtype=torch.int32, device=q_THK.device) * T, T
    cu_N = document_offsets(segments_T, max_documents=max_documents)
    return cu_N, T if max_documents is not None else int(cu_N.diff().max())


def _sides(rule: Rule) -> tuple[int, int]:
    """How many keys before and after its own a query sees; -1 is all of them."""
    reach = -1 if rule.window is None else rule.window - 1
    return reach, 0 if rule.causal else reach
