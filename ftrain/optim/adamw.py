"""AdamW: Adam with weight decay apart from the gradient (Kingma and Ba 2014; Loshchilov and Hutter 2017)."""

from typing import NamedTuple

import torch
from torch import Tensor

from ftrain import tree
from ftrain.kernels.adamw import adamw_update, scalars
from ftrain.optim.transform import (
    LearningRate,
    Mask,
    Transform,
    decays,
    new_count,
    rate_at,
    require_like,
    require_range,
    require_rate,
    warn_of_rounding,
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
        warn_of_rounding(params, "adamw")
        return AdamWState(new_count(params), zeros(params, state_dtype), zeros(params))

    def update(grads: Tree, state: AdamWState, params: Tree) -> tuple[Tree, AdamWState]:
        require_like(grads, params)
        steps, rate = state.steps + 1, rate_at(learning_rate, state.steps)
        at = {dtype: scalars(steps, rate, b1=b1, b2=b2, eps=eps, dtype=dtype) for dtype in _dtypes(state.square)}

        def leaf(p: Tensor, g: Tensor, m: Tensor, v: Tensor, decay: bool) -> tuple[Tensor, Tensor, Tensor]:
            kept = weight_decay if decay else 0.0
            return adamw_update(p, g, m, v, at[v.dtype], b1=b1, b2=b2, eps=eps, weight_decay=kept)

        chosen = decays(mask, params)
        updates, mean, square = tree.map_many(leaf, 3, params, grads, state.mean, state.square, chosen)
        return updates, AdamWState(steps, mean, square)

    return Transform(init, update)


def _dtypes(averages: Tree) -> set[torch.dtype]:
    return {x.dtype for x in tree.leaves(averages)}
