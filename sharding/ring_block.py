"""One step of ring attention on one rank: its queries against the keys and values of one member of the ring.

Which member that is depends on the rank, so a step is an opaque op that reads the rank's place when it runs; its shapes
do not depend on it. A member holds one run of the pack's tokens, or with zigzag two; two runs are the same, or one lies
before the other. The same run is ordinary attention; of two different runs at most one document has tokens in both, at
the end of the earlier and the start of the later, and these see each other whole
(`ftrain.kernels.attention_rectangle`).

T tokens of a rank, P = T * n tokens of the pack, n members of the ring, H query heads, G key/value heads, K head dim,
V value dim, C = K + V, L queries and M keys of two runs.
Source: Liu et al., "Ring Attention with Blockwise Transformers", arXiv 2310.01889; zigzag as in Llama 3, 2407.21783.
"""

from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from ftrain.kernels import attention_cpu, attention_cuda, attention_rectangle
from ftrain.kernels.attention_cpu import Rule
from ftrain.kernels.attention_rectangle import Band
from ftrain.kernels.documents import document_offsets
from ftrain.kernels.dtypes import accumulate_dtype
from ftrain.kernels.opaque import opaque_op


class Step(NamedTuple):
    """What is the same in all of a ring's steps, and which of them it is: keys come from `step` positions before."""

    step: int
    ring: int
    zigzag: bool
    causal: bool
    window: int | None
    scale: float
    softcap: float | None = None


class Run(NamedTuple):
    """`length` adjacent tokens of a pack from `start` on, which a rank holds from `at` on."""

    start: int
    at: int
    length: int

    @property
    def here(self) -> slice:
        """The run as a slice of the rank's tokens."""
        return slice(self.at, self.at + self.length)

    @property
    def in_pack(self) -> slice:
        """The run as a slice of the pack's tokens."""
        return slice(self.start, self.start + self.length)

    def part(self, first: int, last: int) -> "Run":
        """The tokens of the run with indices `[first, last)` in the pack."""
        first, last = max(first, self.start), min(last, self.start + self.length)
        return Run(first, self.at + first - self.start, max(0, last - first))


def runs(member: int, T: int, ring: int, zigzag: bool) -> list[Run]:
    """The tokens of a ring's member, as `ftrain.sharding.batch.TokenOrder` deals them: one run, or two in zigzag."""
    if not zigzag:
        return [Run(member * T, 0, T)]
    half = T // 2
    return [Run(member * half, 0, half), Run((2 * ring - 1 - member) * half, half, half)]


def pairs(me: int, T: int, index_P: Tensor | None, how: Step) -> Iterator[tuple[Run, Run]]:
    """The runs of queries and keys that a step brings together, cut to what may see each other; none is empty.

    `me`: the rank's position in the ring. `index_P`: the pack's document numbers (rising), int64 on the CPU; None is
    one document.
    """
    source = (me - how.step) % how.ring
    for q in runs(me, T, how.ring, how.zigzag):
        for k in runs(source, T, how.ring, how.zigzag):
            if k.start == q.start:
                yield q, k
            elif k.start < q.start or not how.causal:
                q_part, k_part = _meeting(q, k, index_P, how.window)
                if q_part.length and k_part.length:
                    yield q_part, k_part


def _meeting(q: Run, k: Run, index_P: Tensor | None, window: int | None) -> tuple[Run, Run]:
    """The parts of two different runs that belong to one document and are less than `window` apart."""
    first, last = _shared_document(q, k, index_P)
    reach = last - first if window is None else window - 1
    q, k = q.part(first, last), k.part(first, last)
    if k.start < q.start:
        q = q.part(first, k.start + k.length + reach)
        return q, k.part(q.start - reach, last)
    q = q.part(k.start - reach, last)
    return q, k.part(first, q.start + q.length + reach)


def _shared_document(a: Run, b: Run, index_P: Tensor | None) -> tuple[int, int]:
    """Where the document that has tokens in both runs starts and ends, as far as these runs go; (0, 0) if none."""
    a, b = (a, b) if a.start < b.start else (b, a)
    end = b.start + b.length
    if index_P is None:
        return a.start, end
    document = int(index_P[b.start])
    if document != int(index_P[a.start + a.length - 1]):
        return 0, 0
    first = a.start + int(torch.searchsorted(index_P[a.in_pack], document))
    last = b.start + int(torch.searchsorted(index_P[b.in_pack], document, right=True))
    return first, last


@opaque_op(
    "ring_forward(Tensor q, Tensor kv, Tensor? out, Tensor? lse, Tensor? host_index, Tensor me, "
    "int step, int ring, bool zigzag, bool causal, int? window, float scale, float? softcap=None) -> "
    "(Tensor, Tensor)",
    fake=lambda q, kv, *_: (
        q.new_empty(q.shape[0], q.shape[1], kv.shape[2] - q.shape[2], dtype=accumulate_dtype(q.dtype)),
        q.new_empty(q.shape[1], q.shape[0], dtype=accumulate_dtype(q.dtype)),
    ),
)
def ring_forward(
    q_THK: Tensor,
    kv_TGC: Tensor,
    out_THV: Tensor | None,
    lse_HT: Tensor | None,
    host_index_P: Tensor | None,
    me: Tensor,
    step: int,
    ring: int,
    zigzag: bool,
    causal: bool,
    window: int | None,
    scale: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Output `[T, H, V]` and log-sum-exp `[H, T]` over the keys seen so far and these, in the accumulation dtype.

    - `kv_TGC`: keys and values, joined, of the member `step` positions before.
    - `out_THV`, `lse_HT`: over the keys seen so far; None in the first step.
    - `host_index_P`: the pack's document numbers (rising), int64 on the CPU; None is one document.
    - `me`: this rank's position in the ring, 0-d int64 on the CPU. The rest are the fields of `Step`.
    """
    how, (T, H, K) = Step(step, ring, zigzag, causal, window, scale, softcap), q_THK.shape
    k_TGK, v_TGV = kv_TGC[..., :K], kv_TGC[..., K:]
    if out_THV is None or lse_HT is None:
        dtype = accumulate_dtype(q_THK.dtype)
        out_THV = torch.zeros(T, H, v_TGV.shape[2], dtype=dtype, device=q_THK.device)
        lse_HT = torch.full((H, T), -torch.inf, dtype=dtype, device=q_THK.device)
    else:
        out_THV, lse_HT = out_THV.clone(), lse_HT.clone()
    for q, k in pairs(int(me), T, host_index_P, how):
        given = (q_THK[q.here], k_TGK[k.here], v_TGV[k.here])
        if q.start == k.start:
            documents, rule = _documents(q, host_index_P, how, q_THK.device)
            out_LHV, lse_HL = _local(q_THK).forward(*given, documents, None, rule)
        else:
            out_LHV, lse_HL = attention_rectangle.forward(*given, Band(q.start - k.start, window, scale, softcap))
        merge_(out_THV[q.here], lse_HT[:, q.here], out_LHV, lse_HL)
        del out_LHV, lse_HL  # or they live on while the next pair makes its own
    return out_THV, lse_HT


@opaque_op(
    "ring_backward(Tensor grad, Tensor q, Tensor kv, Tensor out, Tensor lse, Tensor? host_index, "
    "Tensor me, int step, int ring, bool zigzag, bool causal, int? window, float scale, float? softcap=None) -> "
    "(Tensor, Tensor)",
    fake=lambda grad, q, kv, out, lse, *_: (
        q.new_empty(q.shape, dtype=lse.dtype),
        kv.new_empty(kv.shape, dtype=lse.dtype),
    ),
)
def ring_backward(
    grad_THV: Tensor,
    q_THK: Tensor,
    kv_TGC: Tensor,
    out_THV: Tensor,
    lse_HT: Tensor,
    host_index_P: Tensor | None,
    me: Tensor,
    step: int,
    ring: int,
    zigzag: bool,
    causal: bool,
    window: int | None,
    scale: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """What this step adds to the gradients of the queries and of the member's keys and values, in the dtype of `lse`.

    `out_THV` and `lse_HT` are those of the whole ring: the probabilities of any block follow from them. The other
    arguments, `me` (0-d) among them, are those of `ring_forward`.
    """
    how, (T, _, K) = Step(step, ring, zigzag, causal, window, scale, softcap), q_THK.shape
    k_TGK, v_TGV = kv_TGC[..., :K], kv_TGC[..., K:]
    dq_THK = torch.zeros(q_THK.shape, dtype=lse_HT.dtype, device=q_THK.device)
    dkv_TGC = torch.zeros(kv_TGC.shape, dtype=lse_HT.dtype, device=q_THK.device)
    for q, k in pairs(int(me), T, host_index_P, how):
        # flash attention takes the log-sum-exp for dense, whatever its strides
        lse_HL = lse_HT[:, q.here].contiguous()
        given = (grad_THV[q.here], q_THK[q.here], k_TGK[k.here], v_TGV[k.here], out_THV[q.here], lse_HL)
        if q.start == k.start:
            documents, rule = _documents(q, host_index_P, how, q_THK.device)
            dq, dk, dv = _local(q_THK).backward(*given, documents, None, rule)
        else:
            dq, dk, dv = attention_rectangle.backward(*given, Band(q.start - k.start, window, scale, softcap))
        dq_THK[q.here] += dq
        dkv_TGC[k.here, :, :K] += dk
        dkv_TGC[k.here, :, K:] += dv
        del dq, dk, dv  # or they live on while the next pair makes its own
    return dq_THK, dkv_TGC


def merge_(out_LHV: Tensor, lse_HL: Tensor, more_LHV: Tensor, more_lse_HL: Tensor) -> None:
    """Join attention over some keys, in place, with attention over others; `more` must have seen a key per query.

    `out_LHV`, `lse_HL`: overwritten, in the accumulation dtype.
    """
    joined_HL = torch.logaddexp(lse_HL, more_lse_HL)
    out_LHV.mul_((lse_HL - joined_HL).exp_().mT[..., None])
    out_LHV.addcmul_(more_LHV, (more_lse_HL - joined_HL).exp_().mT[..., None].to(out_LHV.dtype))
    lse_HL.copy_(joined_HL)


def _local(q_THK: Tensor) -> ModuleType:
    """The implementation of ordinary attention where the queries are."""
    return attention_cuda if q_THK.is_cuda else attention_cpu


def _documents(run: Run, host_index_P: Tensor | None, how: Step, device: torch.device) -> tuple[Tensor | None, Rule]:
    """Where the documents of a run are, counted on the host so that no device is waited for, and the rule in them."""
    rule = Rule(how.causal, how.window, how.scale, softcap=how.softcap)
    if host_index_P is None:
        return None, rule
    offsets_N = document_offsets(host_index_P[run.in_pack])
    if offsets_N.shape[0] == 2:
        return None, rule
    longest = int(offsets_N.diff().max())
    return offsets_N.to(device, non_blocking=True), rule._replace(longest=longest)
