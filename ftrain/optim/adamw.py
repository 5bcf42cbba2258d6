"""AdamW: Adam with weight decay apart from the gradient (Kingma and Ba 2014; Loshchilov and Hutter 2017)."""

from typing import NamedTuple

import torch
from torch import Tensor

from ftrain import tree
from ftrain.optim.transform import (
    LearningRate,
    Mask,
    Transform,
    cast,
    decay_terms,
    decays,
    new_count,
    rate_at,
    require_like,
    require_range,
    require_rate,
    zeros,
)
from ftrain.tree import Tree


class AdamWState(NamedTuple):
    """`steps`: updates made so far; running averages of the gradient (`mean`) and of its square (`square`)."""

    steps: Tensor
    mean: Tree
    square: Tree


def adamw(
    learning_rate: LearningRate,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    state_dtype: torch.dtype | None = None,
    mask: Mask = None,
) -> Transform:
    """`p <- p - rate * (m / (sqrt(v) + eps) + weight_decay * p)`, m and v without bias: equal to `torch.optim.AdamW`.

    `mask` (a tree of bools, or a function from parameters to one) says which leaves decay; None: all.
    Averages have the parameter's dtype, but never less than float32; `state_dtype` is another dtype for the average of
    gradients alone, e.g. bfloat16 (the average of squares would stop moving: there 0.999 v rounds to v). The arithmetic
    of a leaf has the dtype of its average of squares, and the update leaves in it.
    """
    require_rate(learning_rate)
    require_range("b1", b1, 0.0, 1.0)
    require_range("b2", b2, 0.0, 1.0)
    require_range("eps", eps, 0.0)
    require_range("weight_decay", weight_decay, 0.0)

    def init(params: Tree) -> AdamWState:
        return AdamWState(new_count(params), zeros(params, state_dtype), zeros(params))

    def update(grads: Tree, state: AdamWState, params: Tree) -> tuple[Tree, AdamWState]:
        require_like(grads, params)
        steps = state.steps + 1
        rate = rate_at(learning_rate, state.steps)
        bias = _bias(steps, b1, b2)
        scalars = {d: _scalars(*bias, rate, eps, weight_decay, d) for d in _dtypes(state.square)}

        def leaf(p: Tensor, g: Tensor, m: Tensor, v: Tensor, decay: bool) -> tuple[Tensor, Tensor, Tensor]:
            k, g = scalars[v.dtype], cast(g, v.dtype)
            m_new = torch.lerp(cast(m, v.dtype), g, 1 - b1)
            v_new = torch.addcmul(v * b2, g, g, value=1 - b2)
            denominator = torch.addcmul(k.offset, v_new.sqrt(), k.scale)
            if decay and weight_decay:
                step = torch.addcdiv(cast(p, v.dtype), m_new, denominator, value=k.ratio) * k.minus_share
            else:
                step = m_new / denominator * k.minus_rate
            return step, cast(m_new, m.dtype), v_new

        chosen = decays(mask, params)
        updates, mean, square = tree.map_many(leaf, 3, params, grads, state.mean, state.square, chosen)
        return updates, AdamWState(steps, mean, square)

    return Transform(init, update)


class _Scalars(NamedTuple):
    """What all leaves of one dtype share: `m / (offset + scale * sqrt(v))` is Adam's direction, free of bias."""

    scale: Tensor
    offset: Tensor
    minus_rate: float | Tensor
    minus_share: float | Tensor
    ratio: float


def _scalars(
    first: Tensor, root: Tensor, rate: float | Tensor, eps: float, weight_decay: float, dtype: torch.dtype
) -> _Scalars:
    share, ratio = decay_terms(rate, weight_decay, dtype) if weight_decay else (0.0, 0.0)
    return _Scalars(cast(first / root, dtype), cast(first * eps, dtype), -rate, -share, ratio)


def _bias(steps: Tensor, b1: float, b2: float) -> tuple[Tensor, Tensor]:
    """`1 - b1^steps` and `sqrt(1 - b2^steps)`: float64, since in float32 the second loses four digits at step 1."""
    exact = steps.to(torch.float64)
    return 1 - torch.pow(b1, exact), torch.sqrt(1 - torch.pow(b2, exact))


def _dtypes(averages: Tree) -> set[torch.dtype]:
    return {x.dtype for x in tree.leaves(averages)}
