"""Ring attention: queries stay, keys and values go around the ranks, results are merged by their log-sum-exp.

Each step starts sending its keys and values on before it computes with them, and nothing that is sent depends on the
step's computation, so a scheduling pass can hide the one behind the other. Only the G key/value heads travel, k and v
in one message. In backward the gradient of a member's keys and values travels behind them, gathers each rank's share in
the accumulation dtype, and takes one more step home.

T tokens of a rank, P tokens of the pack, H query heads, G key/value heads, K head dim, V value dim, C = K + V.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ftrain.kernels.attention_sinks import add_sinks, sinks_gradient
from ftrain.kernels.first_order import first_order
from ftrain.sharding.collectives import shift_ranks, wait
from ftrain.sharding.mesh import Group
from ftrain.sharding.ring_block import Step, ring_backward, ring_forward
from ftrain.sharding.spmd import purpose


class RingRule(NamedTuple):
    """The group that forms the ring, how its members hold the pack, and which keys a query sees.

    - `zigzag`: each member holds two halves of runs (see `ftrain.sharding.layout.Ring`), not one run.
    - `causal`, `window`, `scale`, `softcap`: as in `ftrain.kernels.attention.attention`.
    """

    group: Group
    zigzag: bool
    causal: bool
    window: int | None
    scale: float
    softcap: float | None = None

    def step(self, number: int) -> Step:
        """The rule of step `number`, from 0: keys come from the member so many positions before."""
        return Step(number, self.group.size, self.zigzag, self.causal, self.window, self.scale, self.softcap)


def ring_attention(
    q_THK: Tensor,
    k_TGK: Tensor,
    v_TGV: Tensor,
    *,
    me: Tensor,
    host_index_P: Tensor | None,
    rule: RingRule,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """This member's rows `[T, H, V]` of attention over the whole ring's tokens, in the dtype of the queries.

    - `me`: its position in the ring, 0-d int64 on the CPU.
    - `host_index_P`: the number of the document that each token of the pack belongs to, rising, in the order of the
      pack, int64 on the CPU; None for one document.
    - `sinks_H`: as in `ftrain.kernels.attention.attention`. They enter once, when all keys have been seen; the gradient
      is that of this member's rows.

    Differentiable once. ValueError if zigzag meets an odd number of tokens. Source: Liu et al., arXiv 2310.01889.
    """
    if rule.zigzag and q_THK.shape[0] % 2:
        raise ValueError(
            f"ring attention in zigzag order: the {q_THK.shape[0]} tokens of a member of the ring are not two halves; "
            f"pack to a multiple of {2 * rule.group.size} tokens, or use Ring(zigzag=False)"
        )
    return _Ring.apply(q_THK, k_TGK, v_TGV, sinks_H, host_index_P, me, rule)[0]


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        host_index: Tensor | None,
        me: Tensor,
        rule: RingRule,
    ) -> tuple[Tensor, Tensor]:
        n, kv = rule.group.size, torch.cat([k, v], -1)
        coming = send_on(kv, rule.group, "ring")
        out, lse = ring_forward(q, kv, None, None, host_index, me, *rule.step(0))
        for s in range(1, n):
            kv = coming
            coming = send_on(kv, rule.group, "ring") if s + 1 < n else kv
            out, lse = ring_forward(q, kv, out, lse, host_index, me, *rule.step(s))
        if sinks is not None:
            out, lse = add_sinks(out, lse, sinks)
        return out.to(q.dtype), lse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        q, k, v, sinks, host_index, me, ctx.rule = inputs
        out, lse = output
        ctx.mark_non_differentiable(lse)
        ctx.save_for_backward(q, k, v, out, lse, sinks, host_index, me)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, sinks, host_index, me = ctx.saved_tensors
        grads = _backward(grad, q, k, v, out, lse, host_index, me, ctx.rule)
        return *grads, None if sinks is None else _sinks_backward(grad, out, lse, sinks), None, None, None


def _gradients(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    host_index: Tensor | None,
    me: Tensor,
    rule: RingRule,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of queries, keys and values, once more around the ring."""
    n, kv = rule.group.size, torch.cat([k, v], -1)
    coming = send_on(kv, rule.group, "ring.T")
    dq, dkv = ring_backward(grad, q, kv, out, lse, host_index, me, *rule.step(0))
    for s in range(1, n):
        kv = coming
        coming = send_on(kv, rule.group, "ring.T") if s + 1 < n else kv
        arrived = send_on(dkv, rule.group, "ring.T")
        dq_s, dkv_s = ring_backward(grad, q, kv, out, lse, host_index, me, *rule.step(s))
        dq, dkv = dq + dq_s, arrived + dkv_s
    dk, dv = send_on(dkv, rule.group, "ring.T").to(k.dtype).split([k.shape[2], v.shape[2]], -1)
    return dq.to(q.dtype), dk.contiguous(), dv.contiguous()


_backward = first_order(_gradients, "ring attention")
_sinks_backward = first_order(sinks_gradient, "ring attention")


def send_on(x: Tensor, group: Group, why: str) -> Tensor:
    """The `x` of the ring's member before this one, while this one's goes to the next; any shape; without autograd."""
    if group.size == 1:
        return x
    with purpose(why):
        return wait(shift_ranks(x.contiguous(), 1, group.size, group.name))


def ring_bytes(T: int, G: int, K: int, V: int, n: int, *, item: int, gradient_item: int) -> tuple[int, int]:
    """Bytes that a member of a ring of n sends in forward and in backward. Sizes are those of the legend.

    `item`: bytes of a number of the keys; `gradient_item`: of the accumulation dtype (4 or 8).

    >>> from ftrain.sharding.ring import ring_bytes
    >>> ring_bytes(T=1024, G=8, K=128, V=128, n=4, item=2, gradient_item=4)
    (12582912, 46137344)
    """
    message = T * G * (K + V)
    return (n - 1) * message * item, (n - 1) * message * item + (n if n > 1 else 0) * message * gradient_item
