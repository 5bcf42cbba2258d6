"""Lion: the sign of an interpolated momentum (Chen et al., "Symbolic discovery of optimization algorithms", arXiv
2302.06675).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ftrain import tree
from ftrain.optim.norms import present
from ftrain.optim.transform import (
    LearningRate,
    Mask,
    Transform,
    cast,
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


class LionState(NamedTuple):
    """`steps`: 0-d int64, updates made so far; `mean`: the running average of gradients, shaped as the parameters."""

    steps: Tensor
    mean: Tree


def lion(
    learning_rate: LearningRate,
    *,
    b1: float = 0.9,
    b2: float = 0.99,
    weight_decay: float = 0.0,
    state_dtype: torch.dtype | None = None,
    mask: Mask = None,
) -> Transform:
    """Lion: steps of one size in the direction of a momentum's sign.

    `p <- p - rate * (sign(b1 m + (1 - b1) g) + weight_decay * p)`, then `m <- b2 m + (1 - b2) g`.

    - `learning_rate`: a number >= 0, a 0-d floating tensor or a schedule; 3 to 10 times smaller than Adam's.
    - `b1`, `b2`: in [0, 1).
    - `weight_decay`: >= 0, larger than Adam's by as much as the rate is smaller.
    - `state_dtype`: of the average; None: the parameter's, at least float32.
    - `mask`: which leaves decay, a tree of bools or a function from parameters to one; None: all.

    One average per parameter: half of Adam's state. A step has one size whatever the gradient's is, so a leaf whose
    gradient is all zeros (the loss did not use it) stands still, average and decay included. ValueError for values out
    of range, and at an update for gradients that do not have the parameters' structure and shapes. Source: Chen et al.,
    arXiv 2302.06675.

    >>> import torch
    >>> from ftrain import optim
    >>> tx = optim.lion(0.1)
    >>> params = {"w": torch.tensor([1.0, 1.0])}
    >>> updates, state = tx.update({"w": torch.tensor([1e-3, -50.0])}, tx.init(params), params)
    >>> updates
    {'w': tensor([-0.1000,  0.1000])}
    """
    require_rate(learning_rate)
    require_range("b1", b1, 0.0, 1.0)
    require_range("b2", b2, 0.0, 1.0)
    require_range("weight_decay", weight_decay, 0.0)

    def init(params: Tree) -> LionState:
        warn_of_rounding(params, "lion")
        return LionState(new_count(params), zeros(params, state_dtype))

    def update(grads: Tree, state: LionState, params: Tree) -> tuple[Tree, LionState]:
        require_like(grads, params)
        minus_rate = -rate_at(learning_rate, state.steps)

        def leaf(p: Tensor, g: Tensor, m: Tensor, decay: bool, here: Tensor) -> tuple[Tensor, Tensor]:
            wide = torch.promote_types(torch.promote_types(g.dtype, m.dtype), torch.float32)
            g, m_wide = cast(g, wide), cast(m, wide)
            direction = torch.lerp(m_wide, g, 1 - b1).sign()
            if decay and weight_decay:
                direction = torch.add(direction, p, alpha=weight_decay)
            average = torch.where(here, cast(torch.lerp(m_wide, g, 1 - b2), m.dtype), m)
            return torch.where(here, direction * minus_rate, 0), average

        updates, mean = tree.map_many(leaf, 2, params, grads, state.mean, decays(mask, params), present(grads))
        return updates, LionState(state.steps + 1, mean)

    return Transform(init, update)
