"""A running average of the parameters themselves, for evaluation (Polyak and Juditsky 1992)."""

from typing import NamedTuple

import torch
from torch import Tensor

from ftrain import tree
from ftrain.optim.transform import Transform, apply_updates, cast, new_count, require_range, state_dtype
from ftrain.tree import Tree


class EmaState(NamedTuple):
    """`steps`: 0-d int64, updates made so far; `average` of the parameters, in their shapes and at least float32."""

    steps: Tensor
    average: Tree


def ema(decay: float, *, warmup: bool = False) -> Transform:
    """Track `average <- decay * average + (1 - decay) * p` with p the parameters *after* the update.

    - `decay`: in [0, 1).
    - `warmup`: the decay of update t = 1, 2, ... is at most (1 + t) / (10 + t), so that initial values are soon
      forgotten.

    Put it last in a chain: it passes the updates on unchanged and averages what `apply_updates` will make of them. The
    average starts at the initial parameters. ValueError for a decay out of range. Source: Polyak and Juditsky, 1992,
    "Acceleration of stochastic approximation by averaging"; the warm-up is TensorFlow's `ExponentialMovingAverage`.

    >>> import torch
    >>> from ftrain import optim
    >>> tx = optim.chain(optim.sgd(1.0), optim.ema(0.75))
    >>> params = {"w": torch.tensor([4.0])}
    >>> updates, state = tx.update({"w": torch.tensor([4.0])}, tx.init(params), params)
    >>> state[-1].average
    {'w': tensor([3.])}
    """
    require_range("decay", decay, 0.0, 1.0)

    def init(params: Tree) -> EmaState:
        # a copy even where the dtype stays: a donated step must not find one tensor at two places
        average = tree.map(lambda p: p.detach().to(state_dtype(p.dtype), copy=True), params)
        return EmaState(new_count(params), average)

    def update(updates: Tree, state: EmaState, params: Tree) -> tuple[Tree, EmaState]:
        count = state.steps + 1
        steps = count.to(torch.float32)
        keep = ((1 + steps) / (10 + steps)).clamp(max=decay)

        def leaf(average: Tensor, p: Tensor) -> Tensor:
            weight = cast(1 - keep, average.dtype) if warmup else 1 - decay
            return torch.lerp(average, cast(p, average.dtype), weight)

        average = tree.map(leaf, state.average, apply_updates(params, updates))
        return updates, EmaState(count, average)

    return Transform(init, update)
