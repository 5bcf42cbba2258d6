"""What the attention ops cost: bytes of workspace and floating-point operations, from their arguments alone.

The rules see shapes, never which token is whose. Where documents matter they give the bound: flops and buffers of
documents as long as is told (one that fills the pack where nothing is), and copies as if no two lay side by side.

T query tokens, S key tokens, H query heads, G key/value heads, K head dim, V value dim, item: bytes of an element.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ftrain.kernels.attention_cpu import Rule, blocks, served_by_aten
from ftrain.kernels.attention_cuda import served_by_flash
from ftrain.kernels.documents import TOKENS_TOGETHER
from ftrain.kernels.dtypes import accumulate_dtype


@dataclass(frozen=True)
class Sizes:
    """The numbers that all rules need: those of the file's legend."""

    T: int
    S: int
    H: int
    G: int
    K: int
    V: int
    item: int

    @staticmethod
    def of(q: Tensor, k: Tensor, v: Tensor) -> "Sizes":
        """From queries `[T, H, K]`, keys `[S, G, K]` and values `[S, G, V]`; `item` is that of the accumulation
        dtype.
        """
        (T, H, K), (S, G, V) = q.shape, v.shape
        return Sizes(T, S, H, G, K, V, accumulate_dtype(q.dtype).itemsize)

    @property
    def queries(self) -> int:
        """Bytes per token of the queries."""
        return self.H * self.K * self.item

    @property
    def keys(self) -> int:
        """Bytes per token of keys and values."""
        return self.G * (self.K + self.V) * self.item

    @property
    def output(self) -> int:
        """Bytes per token of the output."""
        return self.H * self.V * self.item

    def copied(self, documents: Tensor | None) -> int:
        """How many tokens, counted with all their heads, are copied at once: short documents together, or some heads of
        a long one. `documents`: offsets or ids `[...]`; None is one document.
        """
        longest = max(self.T, self.S)
        if documents is None:
            return longest * min(self.G, max(1, self.G * TOKENS_TOGETHER // max(longest, 1))) // self.G
        return min(longest, max(TOKENS_TOGETHER, -(-longest // self.G)))


def forward_workspace(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Tensor | None,
    kv_documents: Tensor | None,
    causal: bool,
    window: int | None,
    scale: float,
    longest: int | None,
    kv_longest: int | None,
    softcap: float | None = None,
) -> int:
    """Peak bytes of `attention_forward` beyond its outputs, from that op's own arguments, of which only shapes are
    read.
    """
    if q.is_cuda and served_by_flash(q, v, softcap):
        return 0
    n, rule, fused = Sizes.of(q, k, v), Rule(causal, window, scale), served_by_aten(q, v, softcap)
    call = _call_bytes(n, rule, fused, backward=False)
    if fused and _in_place(q, documents):
        return max(call, n.T * n.H * n.item)
    results = n.output + n.H * n.item
    cast = n.copied(documents) * n.H * n.V * q.element_size() if q.element_size() < n.item else 0
    return _copies(n, q, documents, n.queries + n.keys, results) + max(call, cast) + _index_bytes(n, documents)


def backward_workspace(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    documents: Tensor | None,
    kv_documents: Tensor | None,
    causal: bool,
    window: int | None,
    scale: float,
    longest: int | None,
    kv_longest: int | None,
    softcap: float | None = None,
) -> int:
    """Peak bytes of `attention_backward` beyond its outputs, from that op's own arguments, of which only shapes are
    read.
    """
    n, rule, fused = Sizes.of(q, k, v), Rule(causal, window, scale), served_by_aten(q, v, softcap)
    if q.is_cuda and served_by_flash(q, v, softcap):
        places = 1 if longest is None or documents is None else documents.shape[0] - 1
        return flash_backward_bytes(n, q.element_size(), places)
    call = _call_bytes(n, rule, fused, backward=True)
    if fused and _in_place(q, documents):
        return call
    inputs, results = n.queries + n.keys + 2 * n.output + n.H * n.item, n.queries + n.keys
    # ATen copies a gradient that is not dense, as a view of some heads of a long document is not
    not_dense = n.output if fused else 0
    return _copies(n, q, documents, inputs, results, not_dense=not_dense) + call + _index_bytes(n, documents)


def _copies(n: Sizes, q: Tensor, documents: Tensor | None, inputs: int, results: int, not_dense: int = 0) -> int:
    """Short documents are gathered; the inputs of long ones are views unless their dtype changes. Bytes per token."""
    if q.element_size() < n.item:
        return n.copied(documents) * (inputs + results)
    gathered = 0 if documents is None else min(n.T, TOKENS_TOGETHER)
    return max(gathered * (inputs + results), n.copied(documents) * (results + not_dense))


def flash_backward_bytes(n: Sizes, half: int, documents: int) -> int:
    """Peak bytes of flash attention's backward beyond its outputs, for so many documents (or entries for them).

    Float32 sums of dq, a number per query, and gradients of keys per query head before these are added up. `half`:
    bytes of an element of the inputs.
    """
    padded = n.T + 128 * documents
    step = 32 if n.K <= 128 else 64
    width = -(-n.K // step) * step
    expanded = 0 if n.G == n.H else 2 * n.S * n.H * n.K * half
    return padded * n.H * (width + 1) * 4 + expanded


def _in_place(q: Tensor, documents: Tensor | None) -> bool:
    """One document as the fused kernel takes it: the kernel's results are the op's."""
    return documents is None and q.dtype == accumulate_dtype(q.dtype)


def _index_bytes(n: Sizes, documents: Tensor | None) -> int:
    """Positions of gathered tokens, int64, of queries and of keys."""
    return 0 if documents is None else 2 * 8 * min(max(n.T, n.S), TOKENS_TOGETHER)


def _call_bytes(n: Sizes, rule: Rule, fused: bool, backward: bool) -> int:
    """One call for the largest block of a document that fills the pack: mask, buffers, results."""
    rule = rule.trimmed(n.T, n.S)
    cut = list(blocks(n.T, n.S, rule, fused=fused))
    L, M = max(((b.L, b.M) for b in cut), key=math.prod, default=(0, 0))
    masked = rule.window is not None or (rule.causal and (n.T != n.S or len(cut) > 1))
    mask = L * M * n.item if masked else 0
    if not fused:
        return mask + _math_bytes(n, L, M, len(cut) > 1, backward)
    buffers = _aten_bytes(n, L, M, backward)
    if len(cut) < 2:
        return mask + buffers
    # the results of the block before are let go only when the next ones are there
    results = L * n.queries + 2 * M * n.keys if backward else 2 * L * (n.output + n.H * n.item)
    return mask + buffers + results


def _aten_bytes(n: Sizes, L: int, M: int, backward: bool) -> int:
    """What each thread of ATen's kernel holds: scores of a tile (and their gradient), maxima, sums, a tile's output."""
    tile = min(L, 256 if L >= 768 else 64 if L >= 192 else 32)
    scores = tile * min(512, M)
    each = 2 * scores if backward else scores + 2 * tile + tile * n.K
    return torch.get_num_threads() * each * n.item


def _math_bytes(n: Sizes, L: int, M: int, several: bool, backward: bool) -> int:
    """Of the heads that are computed together: scores and what their log-sum-exp makes of them; backward, two of
    scores, probabilities and their gradient, or one and the gradients of queries and keys. `several`: blocks, of which
    the results of the one before are let go only when the next ones are there.
    """
    heads = max(n.H // n.G, n.H * n.copied(None) // max(n.T, n.S, 1))
    keys, rows, scores = M * heads * n.G // n.H, L * heads, heads * L * M
    if not backward:
        return (2 * scores + rows * (2 + (n.V if several else 0))) * n.item
    before = keys * (n.K + n.V) if several else 0
    return (before + keys * n.V + rows * (n.V + 2) + max(2 * scores, scores + keys * n.K + 2 * rows * n.K)) * n.item


def seen_pairs(T: int, S: int, causal: bool, window: int | None) -> float:
    """How many pairs of a query and a key meet where documents have at most S keys; causal counts half.

    `T`, `S`: tokens. `window`: as in `attention`, None for none.

    >>> from ftrain.kernels.attention_cost import seen_pairs
    >>> seen_pairs(100, 100, True, None), seen_pairs(100, 100, True, 10)
    (5000.0, 1000)
    """
    dense = T * S / 2 if causal else T * S
    return dense if window is None else min(dense, T * min(S, window if causal else 2 * window - 1))


def forward_flops(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Tensor | None,
    kv_documents: Tensor | None,
    causal: bool,
    window: int | None,
    scale: float,
    longest: int | None,
    kv_longest: int | None,
    softcap: float | None = None,
) -> int:
    """Floating-point operations of `attention_forward`'s two matmuls, scores and output; only shapes are read."""
    n = Sizes.of(q, k, v)
    keys = _most_keys(n, kv_documents, longest, kv_longest)
    return int(2 * n.H * (n.K + n.V) * seen_pairs(n.T, keys, causal, window))


def backward_flops(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    documents: Tensor | None,
    kv_documents: Tensor | None,
    causal: bool,
    window: int | None,
    scale: float,
    longest: int | None,
    kv_longest: int | None,
    softcap: float | None = None,
) -> int:
    """Floating-point operations of `attention_backward`'s five matmuls; only shapes are read.

    They are the scores again, and the gradients of probabilities, values, queries and keys.
    """
    n = Sizes.of(q, k, v)
    keys = _most_keys(n, kv_documents, longest, kv_longest)
    return int(2 * n.H * (3 * n.K + 2 * n.V) * seen_pairs(n.T, keys, causal, window))


def _most_keys(n: Sizes, kv_documents: Tensor | None, longest: int | None, kv_longest: int | None) -> int:
    """Of one document."""
    told = longest if kv_documents is None else kv_longest
    return n.S if told is None else min(n.S, told)


WORKSPACE: dict[str, Callable[..., int]] = {
    "ftrain::attention_forward": forward_workspace,
    "ftrain::attention_backward": backward_workspace,
}
"""Op name to peak bytes beyond the op's outputs, from its arguments."""

FLOPS: dict[str, Callable[..., int]] = {
    "ftrain::attention_forward": forward_flops,
    "ftrain::attention_backward": backward_flops,
}
"""Op name to floating-point operations of its matmuls, recomputation included."""
