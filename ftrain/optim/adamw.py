"""AdamW: Adam with weight decay apart from the gradient (Kingma and Ba, arXiv 1412.6980; Loshchilov and Hutter, arXiv
1711.05101).
"""

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
    """The state of `adamw`.

    - `steps`: 0-d int64, updates made so far.
    - `mean`, `square`: running averages of the gradient and of its square, in trees shaped as the parameters.
    """

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
    """AdamW: Adam with decoupled weight decay.

    With g the gradient, t the update's number from 1: `m <- b1 m + (1 - b1) g`, `v <- b2 v + (1 - b2) g^2`, `p <- p -
    rate * ((m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps) + weight_decay * p)`.

    - `learning_rate`: a number >= 0, a 0-d floating tensor, or a schedule (see `ftrain.optim.Schedule`).
    - `b1`, `b2`: decay of the averages, in [0, 1).
    - `eps`: added to the root of v, outside of it; >= 0.
    - `weight_decay`: >= 0.
    - `state_dtype`: another dtype for the average of gradients alone, e.g. bfloat16. The average of squares would stop
      moving in it: there 0.999 v rounds to v.
    - `mask`: which leaves decay, a tree of bools or a function from parameters to one; None: all.

    Averages have the parameter's dtype, but at least float32. The arithmetic of a leaf, and its update, have the dtype
    of its average of squares. Equal to `torch.optim.AdamW`. ValueError for values out of range, and at an update for
    gradients that do not have the parameters' structure and shapes. Source: Loshchilov and Hutter, arXiv 1711.05101.

    >>> import torch
    >>> from ftrain import optim
    >>> params = {"w": torch.tensor([1.0, -2.0])}
    >>> tx = optim.adamw(0.1, weight_decay=0.0)
    >>> state = tx.init(params)
    >>> updates, state = tx.update({"w": torch.tensor([0.5, 4.0])}, state, params)
    >>> optim.apply_updates(params, updates)
    {'w': tensor([ 0.9000, -2.1000])}
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
