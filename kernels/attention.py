"""Attention over folded tokens of packed documents, with grouped key/value heads: causal, windowed, capped, with sinks.

T query tokens, S key/value tokens (S = T unless `kv_segments_S` is given), H query heads, G key/value heads, R = H / G,
K head dim of queries and keys, V head dim of values (mostly V = K), N documents.
"""

import math
from typing import Any

import torch
from torch import Tensor

from ftrain.kernels import attention_cpu, attention_cuda
from ftrain.kernels.attention_cost import FLOPS, WORKSPACE
from ftrain.kernels.attention_cpu import Rule
from ftrain.kernels.attention_sinks import add_sinks, check_sinks, sinks_gradient
from ftrain.kernels.backend import choose_backend, device_type
from ftrain.kernels.documents import Documents, Segments, document_index, index_of_offsets
from ftrain.kernels.dtypes import accumulate_dtype
from ftrain.kernels.first_order import first_order
from ftrain.kernels.opaque import opaque_op
from ftrain.kernels.primitive import primitive

__all__ = ["FLOPS", "WORKSPACE", "attention", "attention_reference"]

BACKENDS = {"cpu": "cpu", "cuda": "flash"}


@primitive("attention")
def attention(
    q_THK: Tensor,
    k_SGK: Tensor,
    v_SGV: Tensor,
    *,
    segments_T: Segments | None = None,
    kv_segments_S: Segments | None = None,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    sinks_H: Tensor | None = None,
    softcap: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """`softmax(q k^T * scale) v` within each document of a pack, `[T, H, V]` in the dtype of the queries.

    - `q_THK`, `k_SGK`, `v_SGV`: one floating dtype; H is a multiple of G, query head `h` reads key head `h // (H / G)`.
    - `segments_T`: ids, int64 `[T]`, a change of which starts a new document; or `Documents`, made with the pack, whose
      offsets spare a CUDA device the count and the host the wait; None is one document. Documents never see each other.
    - `kv_segments_S`: the keys are another pack (cross attention, decoding). As ids, a query sees the keys that carry
      its document's id; a document then has one run of queries and one of keys. As `Documents`, with as many offsets as
      those of the queries, document n reads document n. With `causal` the last query stands at the last key. A query
      that sees no key gives zero. Without it S must be T.
    - `window`: a query sees at most the `window` latest keys, its own included (causal), or those less than `window`
      away (not causal), in tokens.
    - `scale`: of the scores, `K ** -0.5` if None.
    - `sinks_H`: a learned, finite score for each query head, floating `[H]`, that takes its part of the softmax and has
      no value (gpt-oss); None for none. It is differentiated too, and neither scaled, capped nor hidden.
    - `softcap`: positive; scaled scores become `softcap * tanh(scores / softcap)` before the softmax (Gemma 2); None
      leaves them. On CUDA flash-attn does it where it is installed, everywhere else plain math in blocks of queries.
    - `backend`: "auto", "reference", "cpu" or "flash" (CUDA; half precision, other dtypes run plain math by document).

    Cost grows with the sum of squared document lengths, or with length times window. Differentiable once; `"auto"`
    takes the reference under `vmap`, `jvp` and nested `grad`. ValueError for shapes, dtypes, devices and backends that
    do not fit. Source: Vaswani et al., arXiv 1706.03762; grouped heads of Ainslie et al., arXiv 2305.13245.

    >>> import torch
    >>> from ftrain.kernels.attention import attention
    >>> q_THK, k_SGK, v_SGV = torch.ones(3, 2, 4), torch.ones(3, 1, 4), torch.arange(3.0).view(3, 1, 1)
    >>> attention(q_THK, k_SGK, v_SGV, segments_T=torch.tensor([5, 5, 8]))[:, 0, 0]  # means over what is seen
    tensor([0.0000, 0.5000, 2.0000])
    """
    _check(q_THK, k_SGK, v_SGV, segments_T, kv_segments_S, window)
    check_softcap(softcap, "attention")
    check_sinks(sinks_H, q_THK, "attention")
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
            sinks_H=sinks_H,
            softcap=softcap,
        )
    if BACKENDS.get(device_type(q_THK)) != chosen:
        raise ValueError(f"attention: backend={chosen!r} does not run on {q_THK.device}; use backend='auto'")
    documents, longest = _told(segments_T)
    kv_documents, kv_longest = _told(kv_segments_S)
    rule = Rule(causal, window, scale, longest, kv_longest, softcap)
    return _Attention.apply(q_THK, k_SGK, v_SGV, sinks_H, documents, kv_documents, rule)[0]


def _told(segments: Segments | None) -> tuple[Tensor | None, int | None]:
    """What the ops are given: ids and None, or offsets and a bound of the longest document."""
    return (segments.offsets_N, segments.longest) if isinstance(segments, Documents) else (segments, None)


def attention_reference(
    q_THK: Tensor,
    k_SGK: Tensor,
    v_SGV: Tensor,
    *,
    segments_T: Segments | None = None,
    kv_segments_S: Segments | None = None,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    sinks_H: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """The definition of `attention`, with its arguments: `[T, H, V]` in the dtype of the queries.

    A dense mask `[T, S]`; any number of derivatives, any transform. Nothing is checked.
    """
    (T, H, K), (S, G, _) = q_THK.shape, k_SGK.shape
    scale = K**-0.5 if scale is None else scale
    dtype = accumulate_dtype(q_THK.dtype)
    q_TGRK = q_THK.to(dtype).unflatten(1, (G, H // G))
    scores_GRTS = torch.einsum("tgrk,sgk->grts", q_TGRK, k_SGK.to(dtype)) * scale
    if softcap is not None:
        scores_GRTS = softcap * (scores_GRTS / softcap).tanh()
    seen_TS = _seen(segments_T, kv_segments_S, T, S, causal, window, q_THK.device)
    # a finite floor, not -inf: a row that sees nothing must have zero gradients, not NaN
    scores_GRTS = scores_GRTS.masked_fill(~seen_TS, torch.finfo(dtype).min)
    probabilities_GRTS = _softmax(scores_GRTS, sinks_H) * seen_TS
    out_TGRV = torch.einsum("grts,sgv->tgrv", probabilities_GRTS, v_SGV.to(dtype))
    return out_TGRV.flatten(1, 2).to(q_THK.dtype)


def _softmax(scores_GRTS: Tensor, sinks_H: Tensor | None) -> Tensor:
    """Over the keys, and the sink of each head where there is one."""
    if sinks_H is None:
        return scores_GRTS.softmax(-1)
    sinks_GR11 = sinks_H.to(scores_GRTS.dtype).view(*scores_GRTS.shape[:2], 1, 1)
    return torch.cat([scores_GRTS, sinks_GR11.expand(*scores_GRTS.shape[:3], 1)], -1).softmax(-1)[..., :-1]


def _seen(
    segments_T: Segments | None,
    kv_segments_S: Segments | None,
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
        id_T, kv_id_S = _names(segments_T, T), _names(kv_segments_S, S)
        same_TS = id_T[:, None] == kv_id_S
        # distances to the end of one's own document, so that ends are aligned
        i_T, j_S = -_left_after(id_T)[:, None], -_left_after(kv_id_S)
    elif segments_T is not None:
        index_T = _names(segments_T, T) if isinstance(segments_T, Documents) else document_index(segments_T)
        same_TS = index_T[:, None] == index_T
    if causal:
        same_TS = same_TS & (j_S <= i_T)
    if window is not None:
        same_TS = same_TS & ((i_T - j_S).abs() < window)
    return same_TS


def _names(segments: Segments, tokens: int) -> Tensor:
    """What queries and keys of one document have in common: its id, or its number in the offsets."""
    return index_of_offsets(segments.offsets_N, tokens) if isinstance(segments, Documents) else segments


def _left_after(segments_T: Tensor) -> Tensor:
    """How many tokens of its document follow each token."""
    later_TT = torch.ones(segments_T.shape[0], segments_T.shape[0], dtype=torch.bool, device=segments_T.device).triu(1)
    return ((segments_T[:, None] == segments_T) & later_TT).sum(1)


@opaque_op(
    "attention_forward(Tensor q, Tensor k, Tensor v, Tensor? documents, Tensor? kv_documents, bool causal, "
    "int? window, float scale, int? longest, int? kv_longest, float? softcap=None) -> (Tensor, Tensor)",
    fake=lambda q, k, v, *_: (
        q.new_empty(q.shape[0], q.shape[1], v.shape[2]),
        q.new_empty(q.shape[1], q.shape[0], dtype=accumulate_dtype(q.dtype)),
    ),
)
def attention_forward(
    q_THK: Tensor,
    k_SGK: Tensor,
    v_SGV: Tensor,
    documents: Tensor | None,
    kv_documents: Tensor | None,
    causal: bool,
    window: int | None,
    scale: float,
    longest: int | None,
    kv_longest: int | None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Output `[T, H, V]` and the scores' log-sum-exp `[H, T]` (float32, or float64 for float64), as one opaque op.

    `documents`, `kv_documents`: offsets int32 `[N + 1]` where `longest`, `kv_longest` give a bound of the longest;
    where that is None, ids int64 `[T]` and `[S]`. The other arguments are those of `attention`. ValueError for offsets
    that do not end at the pack's tokens (CPU).
    """
    rule = Rule(causal, window, scale, longest, kv_longest, softcap)
    if q_THK.is_cuda:
        return attention_cuda.forward(q_THK, k_SGK, v_SGV, documents, kv_documents, rule)
    return attention_cpu.forward(q_THK, k_SGK, v_SGV, documents, kv_documents, rule)


@opaque_op(
    "attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? documents, "
    "Tensor? kv_documents, bool causal, int? window, float scale, int? longest, int? kv_longest, "
    "float? softcap=None) -> (Tensor, Tensor, Tensor)",
    fake=lambda grad, q, k, v, *_: (q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)),
)
def attention_backward(
    grad_THV: Tensor,
    q_THK: Tensor,
    k_SGK: Tensor,
    v_SGV: Tensor,
    out_THV: Tensor,
    lse_HT: Tensor,
    documents: Tensor | None,
    kv_documents: Tensor | None,
    causal: bool,
    window: int | None,
    scale: float,
    longest: int | None,
    kv_longest: int | None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `q`, `k`, `v`, of their shapes and dtypes; the probabilities are recomputed from the log-sum-exp.

    `out_THV`, `lse_HT`: what `attention_forward` returned. `grad_THV`: the gradient of the output. The other arguments,
    among them `documents` and `kv_documents` (offsets int32 `[N + 1]` or ids), are those of `attention_forward`.
    """
    rule = Rule(causal, window, scale, longest, kv_longest, softcap)
    tensors = (grad_THV, q_THK, k_SGK, v_SGV, out_THV, lse_HT, documents, kv_documents)
    if q_THK.is_cuda:
        return attention_cuda.backward(*tensors, rule)
    return attention_cpu.backward(*tensors, rule)


_backward = first_order(attention_backward, "attention")
_sinks_backward = first_order(sinks_gradient, "attention")


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        documents: Tensor | None,
        kv_documents: Tensor | None,
        rule: Rule,
    ) -> tuple[Tensor, Tensor]:
        out, lse = attention_forward(q, k, v, documents, kv_documents, *rule)
        return (out, lse) if sinks is None else add_sinks(out, lse, sinks)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        q, k, v, sinks, documents, kv_documents, ctx.rule = inputs
        out, lse = output
        ctx.mark_non_differentiable(lse)
        ctx.save_for_backward(q, k, v, out, lse, sinks, documents, kv_documents)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, sinks, documents, kv_documents = ctx.saved_tensors
        grads = _backward(grad, q, k, v, out, lse, documents, kv_documents, *ctx.rule)
        return *grads, None if sinks is None else _sinks_backward(grad, out, lse, sinks), None, None, None


def _check(
    q_THK: Tensor,
    k_SGK: Tensor,
    v_SGV: Tensor,
    segments_T: Segments | None,
    kv_segments_S: Segments | None,
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
        _check_segments(name, segments, tokens)
    if kv_segments_S is not None:
        _check_pairs(segments_T, kv_segments_S)


def check_softcap(softcap: float | None, name: str) -> None:
    """ValueError, which begins with `name`, for a `softcap` that is not positive and finite."""
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"{name}: softcap={softcap} must be positive and finite, or None to leave scores as they are")


def _check_segments(name: str, segments: Segments | None, tokens: int) -> None:
    if isinstance(segments, Documents):
        offsets_N = segments.offsets_N
        if offsets_N.dim() != 1 or offsets_N.shape[0] < 1 or offsets_N.dtype != torch.int32:
            given = f"{offsets_N.dtype} {[*offsets_N.shape]}"
            raise ValueError(f"attention: the offsets of {name} must be int32 [N + 1], not {given}")
    elif segments is not None and (segments.shape != (tokens,) or segments.dtype != torch.int64):
        raise ValueError(f"attention: {name} must be int64 [{tokens}], not {segments.dtype} {[*segments.shape]}")


def _check_pairs(segments_T: Segments | None, kv_segments_S: Segments) -> None:
    """Documents of queries and of keys meet by id or by number, not one by this and the other by that."""
    if isinstance(segments_T, Documents) != isinstance(kv_segments_S, Documents):
        raise ValueError(
            "attention: segments_T and kv_segments_S must both be ids or both be Documents; "
            "ftrain.kernels.documents.aligned_documents makes Documents of two packs' ids"
        )
    if isinstance(segments_T, Documents) and isinstance(kv_segments_S, Documents):
        places, kv_places = segments_T.offsets_N.shape[0] - 1, kv_segments_S.offsets_N.shape[0] - 1
        if places != kv_places:
            raise ValueError(
                f"attention: {places} places for documents of queries and {kv_places} for those of keys: document n "
                "reads document n, so make both with ftrain.kernels.documents.aligned_documents"
            )
