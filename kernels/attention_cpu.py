"""Attention over packed documents, document by document: the implementation behind the opaque ops on CPU.

Documents of equal length are one batched call of ATen's flash attention for CPU; where that op does not serve (values
of another width, capped scores, devices other than CPU) the same loop runs plain math, some queries at a time. Time
grows with the sum of squared document lengths; with a window, with length times window. No mask over the pack exists.

T query tokens, S key tokens, H query heads, G key/value heads, R = H / G, K head dim, V value dim,
B documents computed together, L queries and M keys of one of them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ftrain.kernels import attention_math
from ftrain.kernels.documents import TOKENS_TOGETHER, Pair, batches, document_pairs, offset_pairs, rows
from ftrain.kernels.dtypes import accumulate_dtype

BLOCK = 128
"""Fewest queries that share one masked call, and most that share a call that stores its scores."""


class Rule(NamedTuple):
    """Which keys a query sees in a document (whose last query stands at its last key), and the scale of the scores.

    - `causal`, `window`, `scale`: as in `ftrain.kernels.attention.attention`.
    - `longest`, `kv_longest`: bounds of the longest document of queries and of keys, in tokens, where documents are
      given by offsets; None where by ids.
    - `softcap`: as in `attention`.
    """

    causal: bool
    window: int | None
    scale: float
    longest: int | None = None
    kv_longest: int | None = None
    softcap: float | None = None

    def trimmed(self, L: int, M: int) -> "Rule":
        """The rule without a window that hides nothing in a document of L queries and M keys."""
        return self._replace(window=None) if self.window is not None and self.window >= max(L, M) else self


@dataclass(frozen=True)
class Block:
    """Queries `[i, i + L)` of a document, and the keys `[j, j + M)` that any of them sees."""

    i: int
    L: int
    j: int
    M: int
    offset: int  # position of query i minus position of key j


def blocks(L: int, M: int, rule: Rule, *, fused: bool) -> Iterator[Block]:
    """Cut a document of L queries and M keys so that its calls cover what the rule lets through and little more.

    Blocks come in the order of their queries, and no query is in two; one whose queries see no key is left out. The
    last query and the last key stand at one position. `fused`: whether a kernel computes a block without storing its
    scores; else few queries share a block.
    """
    if fused and rule.window is None and (not rule.causal or L == M):
        yield Block(0, L, 0, M, M - L)
        return
    shift, size = M - L, max(BLOCK, rule.window or 0) if fused else BLOCK
    for i in range(0, L, size):
        last = min(L, i + size) - 1
        low = 0 if rule.window is None else max(0, i + shift - rule.window + 1)
        high = M if rule.window is None else min(M, last + shift + rule.window)
        high = min(high, last + shift + 1) if rule.causal else high
        if high > low:
            yield Block(i, last + 1 - i, low, high - low, i + shift - low)


def block_mask(block: Block, rule: Rule, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """What is added to the scores of a block under the rule, `[L, M]` in `dtype` on `device`.

    0 where a key is seen, -inf elsewhere; None if everything is seen.
    """
    if rule.window is None and not (rule.causal and block.offset < block.M - 1):
        return None
    i_L1 = torch.arange(block.L, device=device)[:, None] + block.offset
    j_M = torch.arange(block.M, device=device)
    ahead = 0 if rule.causal or rule.window is None else rule.window - 1
    hidden_LM = j_M > i_L1 + ahead
    if rule.window is not None:
        hidden_LM.logical_or_(j_M <= i_L1 - rule.window)
    return torch.zeros(block.L, block.M, dtype=dtype, device=device).masked_fill_(hidden_LM, -torch.inf)


def forward(
    q_THK: Tensor, k_SGK: Tensor, v_SGV: Tensor, documents: Tensor | None, kv_documents: Tensor | None, rule: Rule
) -> tuple[Tensor, Tensor]:
    """Output `[T, H, V]` in the dtype of the queries and the log of the sum of exponentials `[H, T]` in the
    accumulation dtype.

    `documents`, `kv_documents`: offsets int32 `[N + 1]` where the rule bounds the longest document, else ids int64;
    None is one document. They are read on the host. Half precision is computed in float32: most CPUs are slower in half
    (6 times with AVX2), and none is more exact. ValueError for offsets that do not end at the pack's tokens.
    """
    T, H, _ = q_THK.shape
    q_THK, k_SGK, v_SGV = (inner_dense(x) for x in (q_THK, k_SGK, v_SGV))
    pairs, dtype = _pairs(documents, kv_documents, T, k_SGK.shape[0], rule), accumulate_dtype(q_THK.dtype)
    if _fills(pairs, T, k_SGK.shape[0]) and served_by_aten(q_THK, v_SGV, rule.softcap) and q_THK.dtype == dtype:
        L, M = pairs[0].q_length, pairs[0].k_length
        out_BHLV, lse_BHL = _batch_forward(_fold(q_THK, L), _fold(k_SGK, M), _fold(v_SGV, M), rule)
        return _unfold(out_BHLV, dtype).contiguous(), lse_BHL.transpose(0, 1).flatten(1).contiguous()
    out_THV = q_THK.new_zeros(T, H, v_SGV.shape[2])
    lse_HT = torch.full((H, T), -torch.inf, dtype=dtype, device=q_THK.device)
    for part in _parts(pairs, H, k_SGK.shape[1], q_THK.device):
        q, k, v = part.queries(q_THK, dtype), part.keys(k_SGK, dtype), part.keys(v_SGV, dtype)
        out_BHLV, lse_BHL = _batch_forward(q, k, v, rule)
        out_THV[:, part.h][part.at_q] = _unfold(out_BHLV, out_THV.dtype)
        lse_HT[part.h, part.at_q] = lse_BHL.transpose(0, 1).flatten(1)
        del q, k, v, out_BHLV, lse_BHL  # or they live on while the next part makes its own
    return out_THV, lse_HT


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
    `[N + 1]` or ids; ValueError for offsets that do not end at the pack's tokens.
    """
    (T, H, _), S = q_THK.shape, k_SGK.shape[0]
    grad_THV, q_THK, k_SGK, v_SGV = (inner_dense(x) for x in (grad_THV, q_THK, k_SGK, v_SGV))
    pairs, dtype = _pairs(documents, kv_documents, T, S, rule), lse_HT.dtype
    if _fills(pairs, T, S) and served_by_aten(q_THK, v_SGV, rule.softcap) and q_THK.dtype == dtype:
        L, M = pairs[0].q_length, pairs[0].k_length
        grad, q, out = (_fold(x, L) for x in (grad_THV, q_THK, out_THV))
        grads = _batch_backward(grad, q, _fold(k_SGK, M), _fold(v_SGV, M), out, _fold_lse(lse_HT, L), rule)
        dq, dk, dv = (_unfold(g, dtype).contiguous() for g in grads)
        return dq, dk, dv
    dq_THK, dk_SGK, dv_SGV = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q_THK, k_SGK, v_SGV))
    for part in _parts(pairs, H, k_SGK.shape[1], q_THK.device):
        grad, q, out = (part.queries(x, dtype) for x in (grad_THV, q_THK, out_THV))
        k, v, lse = part.keys(k_SGK, dtype), part.keys(v_SGV, dtype), _fold_lse(lse_HT[part.h, part.at_q], part.L)
        dq, dk, dv = _batch_backward(grad, q, k, v, out, lse, rule)
        dq_THK[:, part.h][part.at_q] = _unfold(dq, q_THK.dtype)
        dk_SGK[:, part.g][part.at_k] = _unfold(dk, q_THK.dtype)
        dv_SGV[:, part.g][part.at_k] = _unfold(dv, q_THK.dtype)
        del grad, q, k, v, out, lse, dq, dk, dv  # or they live on while the next part makes its own
    return dq_THK, dk_SGK, dv_SGV


def _pairs(documents: Tensor | None, kv_documents: Tensor | None, T: int, S: int, rule: Rule) -> list[Pair]:
    """The documents that have queries and keys. ValueError if offsets are not those of the pack."""
    if documents is None or rule.longest is None:
        return document_pairs(documents, kv_documents, T, S)
    for offsets, tokens in ((documents, T), (documents if kv_documents is None else kv_documents, S)):
        if int(offsets[-1]) != tokens:
            raise ValueError(f"attention: the offsets end at {int(offsets[-1])}, the pack has {tokens} tokens")
    return offset_pairs(documents, kv_documents)


def _fills(pairs: list[Pair], T: int, S: int) -> bool:
    """True if the documents are equally long and fill the pack in order: then views go in and views come out."""
    if not pairs:
        return False
    L, M = pairs[0].q_length, pairs[0].k_length
    equal = all((p.q_start, p.q_length, p.k_start, p.k_length) == (n * L, L, n * M, M) for n, p in enumerate(pairs))
    return equal and len(pairs) * L == T and len(pairs) * M == S


@dataclass(frozen=True)
class Part:
    """Equal documents and some of their heads, computed in one go."""

    at_q: slice | Tensor
    at_k: slice | Tensor
    L: int
    M: int
    h: slice
    g: slice

    def queries(self, x_THK: Tensor, dtype: torch.dtype) -> Tensor:
        """These documents' rows and heads of `x_THK` (queries, outputs, gradients): `[B, heads, L, K]` in `dtype`.

        A view where the documents are adjacent and in that dtype.
        """
        return _fold(x_THK[:, self.h][self.at_q], self.L).to(dtype)

    def keys(self, x_SGK: Tensor, dtype: torch.dtype) -> Tensor:
        """These documents' rows and heads of `x_SGK` (keys or values): `[B, heads, M, K]` in `dtype`, a view in the
        same cases.
        """
        return _fold(x_SGK[:, self.g][self.at_k], self.M).to(dtype)


def _parts(pairs: list[Pair], H: int, G: int, device: torch.device) -> Iterator[Part]:
    """Cut the work so that copies stay small: short documents together, the heads of long ones a few at a time."""
    R = H // G
    for batch in batches(pairs):
        L, M = batch[0].q_length, batch[0].k_length
        at_q, at_k = rows([p.q_start for p in batch], L, device), rows([p.k_start for p in batch], M, device)
        some = max(1, G * TOKENS_TOGETHER // (len(batch) * max(L, M)))
        for g in range(0, G, some):
            yield Part(at_q, at_k, L, M, slice(g * R, (g + some) * R), slice(g, g + some))


def _fold(x_TNK: Tensor, L: int) -> Tensor:
    """`[B * L, heads, K]` seen as `[B, heads, L, K]`."""
    return x_TNK.unflatten(0, (-1, L)).transpose(1, 2)


def _unfold(x_BNLK: Tensor, dtype: torch.dtype) -> Tensor:
    return x_BNLK.transpose(1, 2).flatten(0, 1).to(dtype)


def _fold_lse(lse_HT: Tensor, L: int) -> Tensor:
    return lse_HT.unflatten(1, (-1, L)).transpose(0, 1)


def inner_dense(x: Tensor) -> Tensor:
    """A tensor of any shape whose last dim has stride 1 and no dim stride 0, as the kernels need; a copy only if it
    must be.
    """
    return x if x.stride(-1) == 1 and 0 not in x.stride() else x.contiguous()


def _batch_forward(q_BHLK: Tensor, k_BGMK: Tensor, v_BGMV: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
    B, H, L, _ = q_BHLK.shape
    M = k_BGMK.shape[2]
    rule = rule.trimmed(L, M)
    cut = list(blocks(L, M, rule, fused=served_by_aten(q_BHLK, v_BGMV, rule.softcap)))
    if [block.L for block in cut] == [L]:
        return _block_forward(q_BHLK, *_keys(cut[0], k_BGMK, v_BGMV), rule, cut[0])
    out_BLHV = q_BHLK.new_zeros(B, L, H, v_BGMV.shape[3])
    lse_BHL = torch.full((B, H, L), -torch.inf, dtype=accumulate_dtype(q_BHLK.dtype), device=q_BHLK.device)
    for block in cut:
        i = slice(block.i, block.i + block.L)
        out, lse_BHL[:, :, i] = _block_forward(q_BHLK[:, :, i], *_keys(block, k_BGMK, v_BGMV), rule, block)
        out_BLHV[:, i] = out.transpose(1, 2)
    return out_BLHV.transpose(1, 2), lse_BHL


def _batch_backward(
    grad_BHLV: Tensor, q_BHLK: Tensor, k_BGMK: Tensor, v_BGMV: Tensor, out_BHLV: Tensor, lse_BHL: Tensor, rule: Rule
) -> tuple[Tensor, Tensor, Tensor]:
    L, M = q_BHLK.shape[2], k_BGMK.shape[2]
    rule = rule.trimmed(L, M)
    cut = list(blocks(L, M, rule, fused=served_by_aten(q_BHLK, v_BGMV, rule.softcap)))
    if [(block.L, block.M) for block in cut] == [(L, M)]:
        return _block_backward(grad_BHLV, q_BHLK, k_BGMK, v_BGMV, out_BHLV, lse_BHL, rule, cut[0])
    dq, dk, dv = (torch.zeros_like(x.transpose(1, 2)).transpose(1, 2) for x in (q_BHLK, k_BGMK, v_BGMV))
    for block in cut:
        i, j = slice(block.i, block.i + block.L), slice(block.j, block.j + block.M)
        grad, q, out, lse = grad_BHLV[:, :, i], q_BHLK[:, :, i], out_BHLV[:, :, i], lse_BHL[:, :, i]
        dq[:, :, i], dk_j, dv_j = _block_backward(grad, q, *_keys(block, k_BGMK, v_BGMV), out, lse, rule, block)
        dk[:, :, j] += dk_j
        dv[:, :, j] += dv_j
    return dq, dk, dv


def _keys(block: Block, k_BGMK: Tensor, v_BGMV: Tensor) -> tuple[Tensor, Tensor]:
    j = slice(block.j, block.j + block.M)
    return k_BGMK[:, :, j], v_BGMV[:, :, j]


def _mask(q: Tensor, rule: Rule, block: Block) -> tuple[bool, Tensor | None]:
    """The kernel's own causal flag where it says it all, else a mask where anything is hidden."""
    if rule.causal and rule.window is None and block.L == block.M and block.offset == 0:
        return True, None
    return False, block_mask(block, rule, q.dtype, q.device)


def served_by_aten(q: Tensor, v: Tensor, softcap: float | None) -> bool:
    """True if ATen's flash attention for CPU takes these inputs (shapes `[..., K]` and `[..., V]`): it wants V = K, and
    scores as they are.
    """
    return q.device.type == "cpu" and q.shape[-1] == v.shape[-1] and softcap is None


def _block_forward(q: Tensor, k: Tensor, v: Tensor, rule: Rule, block: Block) -> tuple[Tensor, Tensor]:
    causal, mask = _mask(q, rule, block)
    if not served_by_aten(q, v, rule.softcap):
        return attention_math.forward(q, k, v, causal, mask, rule.scale, rule.softcap)
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, causal, attn_mask=mask, scale=rule.scale
    )


def _block_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rule: Rule, block: Block
) -> tuple[Tensor, Tensor, Tensor]:
    causal, mask = _mask(q, rule, block)
    if not served_by_aten(q, v, rule.softcap):
        return attention_math.backward(grad, q, k, v, out, lse, causal, mask, rule.scale, rule.softcap)
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, q, k, v, out, lse, 0.0, causal, attn_mask=mask, scale=rule.scale
    )
