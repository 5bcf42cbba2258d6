"""Attention over folded tokens of packed documents, with grouped key/value heads, causal or not, windowed or not.

T query tokens, S key/value tokens (S = T unless `kv_segments_S` is given), H query heads, G key/value heads, R = H / G,
K head dim of queries and keys, V head dim of values (mostly V = K).
"""

from typing import Any

import torch
from torch import Tensor

from kernels import attention_cpu, attention_cuda
from kernels.attention_cost import FLOPS, WORKSPACE
from kernels.attention_cpu import Rule
from kernels.attention_math import accumulate_dtype
from kernels.backend import choose_backend
from kernels.documents import document_index, document_offsets
from kernels.first_order import first_order
from kernels.opaque import opaque_op
from kernels.primitive import primitive

__all__ = ["FLOPS", "WORKSPACE", "attention", "attention_reference", "document_offsets"]

BACKENDS = {"cpu": "cpu", "cuda": "flash"}


@primitive("attention")
def attention(
    q_THK: Tensor,
    k_SGK: Tensor,
    v_SGV: Tensor,
    *,
    segments_T: Tensor | None = None,
    kv_segments_S: Tensor | None = None,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    max_documents: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """`softmax(q k^T * scale) v` within each document of a pack, `[T, H, V]` in the dtype of the queries.

    - `q_THK`, `k_SGK`, `v_SGV`: one floating dtype; H is a multiple of G, query head `h` reads key head `h // (H / G)`.
    - `segments_T` int64: a change of id starts a new document; None is one document. Documents never see each other.
    - `kv_segments_S` int64: the keys are another pack, and a query sees the keys that carry its document's id (cross
      attention, decoding); a document then has one run of queries and one of keys. With `causal` the last query stands
      at the last key. A query that sees no key gives zero. Without it S must be T.
    - `window`: a query sees at most the `window` latest keys, its own included (causal), or those less than `window`
      away (not causal).
    - `scale`: of the scores, `K ** -0.5` if None.
    - `max_documents`: a bound of the number of documents, so that CUDA need not wait for the count.
    - `backend`: "auto", "reference", "cpu" or "flash" (CUDA; half precision, other dtypes run plain math by document).

    Cost grows with the sum of squared document lengths, or with length times window. Differentiable once; `"auto"`
    takes the reference under `vmap`, `jvp` and nested `grad`. `ValueError` for shapes, dtypes, devices that do not fit.
    """
    _check(q_THK, k_SGK, v_SGV, segments_T, kv_segments_S, window)
    chosen = choose_backend(backend, q_THK.device, BACKENDS)
    scale = q_THK.shape[2] ** -0.5 if scale is None else float(scale)
    if chosen == "reference":
        return attention_reference(
            q_THK,
            k_SGK,
            v_SGV,
            segments_T=segments_T,
            kv_segments_S=kv_segments_S,
            causal=causal,
            window=window,
            scale=scale,
        )
    if BACKENDS.get(q_THK.device.type) != chosen:
        raise ValueError(f"attention: backend={chosen!r} does not run on {q_THK.device}; use backend='auto'")
    rule = Rule(causal, window, scale, max_documents)
    return _Attention.apply(q_THK, k_SGK, v_SGV, segments_T, kv_segments_S, rule)[0]


def attention_reference(
    q_THK: Tensor,
    k_SGK: Tensor,
    v_SGV: Tensor,
    *,
    segments_T: Tensor | None = None,
    kv_segments_S: Tensor | None = None,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """The definition of `attention`: a dense mask, any number of derivatives, any transform."""
    (T, H, K), (S, G, _) = q_THK.shape, k_SGK.shape
    scale = K**-0.5 if scale is None else scale
    dtype = accumulate_dtype(q_THK.dtype)
    q_TGRK = q_THK.to(dtype).unflatten(1, (G, H // G))
    scores_GRTS = torch.einsum("tgrk,sgk->grts", q_TGRK, k_SGK.to(dtype)) * scale
    seen_TS = _seen(segments_T, kv_segments_S, T, S, causal, window, q_THK.device)
    # a finite floor, not -inf: a row that sees nothing must have zero gradients, not NaN
    scores_GRTS = scores_GRTS.masked_fill(~seen_TS, torch.finfo(dtype).min)
    probabilities_GRTS = scores_GRTS.softmax(-1) * seen_TS
    out_TGRV = torch.einsum("grts,sgv->tgrv", probabilities_GRTS, v_SGV.to(dtype))
    return out_TGRV.flatten(1, 2).to(q_THK.dtype)


def _seen(
    segments_T: Tensor | None,
    kv_segments_S: Tensor | None,
    T: int,
    S: int,
    causal: bool,
    window: int | None,
    device: torch.device,
) -> Tensor:
    """`[T, S]`: which key each query sees."""
    i_T, j_S = torch.arange(T, device=device)[:, None], torch.arange(S, device=device)
    same_TS = torch.ones(T, S, dtype=torch.bool, device=device)
    if kv_segments_S is not None:
        assert segments_T is not None
        same_TS = segments_T[:, None] == kv_segments_S
        # distances to the end of one's own document, so that ends are aligned
        i_T, j_S = -_left_after(segments_T)[:, None], -_left_after(kv_segments_S)
    elif segments_T is not None:
        index_T = document_index(segments_T)
        same_TS = index_T[:, None] == index_T
    if causal:
        same_TS = same_TS & (j_S <= i_T)
    if window is not None:
        same_TS = same_TS & ((i_T - j_S).abs() < window)
    return same_TS


def _left_after(segments_T: Tensor) -> Tensor:
    """How many tokens of its document follow each token."""
    later_TT = torch.ones(segments_T.shape[0], segments_T.shape[0], dtype=torch.bool, device=segments_T.device).triu(1)
    return ((segments_T[:, None] == segments_T) & later_TT).sum(1)


@opaque_op(
    "attention_forward(Tensor q, Tensor k, Tensor v, Tensor? segments, Tensor? kv_segments, bool causal, int? window, "
    "float scale, int? max_documents) -> (Tensor, Tensor)",
    fake=lambda q, k, v, *_: (
        q.new_empty(q.shape[0], q.shape[1], v.shape[2]),
        q.new_empty(q.shape[1], q.shape[0], dtype=accumulate_dtype(q.dtype)),
    ),
)
def attention_forward(
    q_THK: Tensor,
    k_SGK: Tensor,
    v_SGV: Tensor,
    segments_T: Tensor | None,
    kv_segments_S: Tensor | None,
    causal: bool,
    window: int | None,
    scale: float,
    max_documents: int | None,
) -> tuple[Tensor, Tensor]:
    """Output `[T, H, V]` and the scores' log-sum-exp `[H, T]`."""
    rule = Rule(causal, window, scale, max_documents)
    if q_THK.is_cuda:
        return attention_cuda.forward(q_THK, k_SGK, v_SGV, segments_T, kv_segments_S, rule)
    return attention_cpu.forward(q_THK, k_SGK, v_SGV, segments_T, kv_segments_S, rule)


@opaque_op(
    "attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? segments, "
    "Tensor? kv_segments, bool causal, int? window, float scale, int? max_documents) -> (Tensor, Tensor, Tensor)",
    fake=lambda grad, q, k, v, *_: (q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)),
)
def attention_backward(
    grad_THV: Tensor,
    q_THK: Tensor,
    k_SGK: Tensor,
    v_SGV: Tensor,
    out_THV: Tensor,
    lse_HT: Tensor,
    segments_T: Tensor | None,
    kv_segments_S: Tensor | None,
    causal: bool,
    window: int | None,
    scale: float,
    max_documents: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `q`, `k`, `v`; the probabilities are made again from the log-sum-exp."""
    rule = Rule(causal, window, scale, max_documents)
    tensors = (grad_THV, q_THK, k_SGK, v_SGV, out_THV, lse_HT, segments_T, kv_segments_S)
    if q_THK.is_cuda:
        return attention_cuda.backward(*tensors, rule)
    return attention_cpu.backward(*tensors, rule)


_backward = first_order(attention_backward, "attention")


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, segments: Tensor | None, kv_segments: Tensor | None, rule: Rule
    ) -> tuple[Tensor, Tensor]:
        return attention_forward(q, k, v, segments, kv_segments, *rule)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        q, k, v, segments, kv_segments, ctx.rule = inputs
        out, lse = output
        ctx.mark_non_differentiable(lse)
        ctx.save_for_backward(q, k, v, out, lse, segments, kv_segments)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        return (*_backward(grad, *ctx.saved_tensors, *ctx.rule), None, None, None)


def _check(
    q_THK: Tensor,
    k_SGK: Tensor,
    v_SGV: Tensor,
    segments_T: Tensor | None,
    kv_segments_S: Tensor | None,
    window: int | None,
) -> None:
    shapes = f"q {tuple(q_THK.shape)}, k {tuple(k_SGK.shape)}, v {tuple(v_SGV.shape)}"
    if not q_THK.dim() == k_SGK.dim() == v_SGV.dim() == 3:
        raise ValueError(f"attention wants q [T, H, K], k [S, G, K], v [S, G, V]; got {shapes}")
    if q_THK.shape[2] != k_SGK.shape[2] or k_SGK.shape[:2] != v_SGV.shape[:2]:
        raise ValueError(f"attention: q and k must share the head dim, k and v tokens and heads; got {shapes}")
    if k_SGK.shape[1] == 0 or q_THK.shape[1] % k_SGK.shape[1]:
        raise ValueError(f"attention: query heads must be a multiple of key/value heads; got {shapes}")
    if not q_THK.dtype == k_SGK.dtype == v_SGV.dtype or not q_THK.is_floating_point():
        dtypes = f"q {q_THK.dtype}, k {k_SGK.dtype}, v {v_SGV.dtype}"
        raise ValueError(f"attention: q, k and v must have one floating dtype; got {dtypes}")
    if kv_segments_S is None and k_SGK.shape[0] != q_THK.shape[0]:
        raise ValueError(f"attention: keys of another length need kv_segments_S; got {shapes}")
    if kv_segments_S is not None and segments_T is None:
        raise ValueError("attention: kv_segments_S needs segments_T, whose ids it refers to")
    if window is not None and window < 1:
        raise ValueError(f"attention: window={window} must be at least 1 (a query sees itself), or None")
    for name, segments, tokens in (
        ("segments_T", segments_T, q_THK.shape[0]),
        ("kv_segments_S", kv_segments_S, k_SGK.shape[0]),
    ):
        if segments is not None and (segments.shape != (tokens,) or segments.dtype != torch.int64):
            raise ValueError(f"attention: {name} must be int64 [{tokens}], not {segments.dtype} {[*segments.shape]}")
