"""Stochastic gradient descent, plain, with momentum, or with Nesterov's: as `torch.optim.SGD`; and `trace` alone."""

from typing import NamedTuple

import torch
from torch import Tensor

from ftrain import tree
from ftrain.optim.transform import (
    LearningRate,
    Transform,
    new_count,
    rate_at,
    require_like,
    require_range,
    require_rate,
    warn_of_rounding,
    zeros,
)
from ftrain.tree import Tree


class SGDState(NamedTuple):
    """`steps`: 0-d int64, updates made so far; `momentum`: the decaying sum of gradients, None without momentum."""

    steps: Tensor
    momentum: Tree


class TraceState(NamedTuple):
    """`momentum`: the decaying sum of all gradients seen, shaped as the parameters."""

    momentum: Tree


def sgd(
    learning_rate: LearningRate, *, momentum: float = 0.0, nesterov: bool = False, weight_decay: float = 0.0
) -> Transform:
    """Stochastic gradient descent, plain, with momentum or with Nesterov's.

    `b <- momentum * b + g + weight_decay * p`, `p <- p - rate * b` (Nesterov: `g + momentum * b` in the place of b).

    - `learning_rate`: a number >= 0, a 0-d floating tensor or a schedule.
    - `momentum`: in [0, 1). `nesterov`: needs a momentum above 0.
    - `weight_decay`: >= 0; it is part of the gradient, not decoupled.

    Equal to `torch.optim.SGD` without dampening. Momentum has the parameter's dtype, but at least float32. ValueError
    for values out of range, and at an update for gradients that do not have the parameters' structure and shapes.
    Source: Sutskever et al., 2013, "On the importance of initialization and momentum in deep learning".

    >>> import torch
    >>> from ftrain import optim
    >>> tx = optim.sgd(0.1, momentum=0.5)
    >>> params, grads = {"w": torch.ones(1)}, {"w": torch.ones(1)}
    >>> updates, state = tx.update(grads, tx.init(params), params)
    >>> tx.update(grads, state, params)[0]
    {'w': tensor([-0.1500])}
    """
    require_rate(learning_rate)
    require_range("momentum", momentum, 0.0, 1.0)
    require_range("weight_decay", weight_decay, 0.0)
    if nesterov and momentum == 0.0:
        raise ValueError("nesterov=True needs a momentum above 0")

    def init(params: Tree) -> SGDState:
        warn_of_rounding(params, "sgd")
        return SGDState(new_count(params), zeros(params) if momentum else None)

    def update(grads: Tree, state: SGDState, params: Tree) -> tuple[Tree, SGDState]:
        require_like(grads, params)
        minus_rate = -rate_at(learning_rate, state.steps)
        if weight_decay:
            grads = tree.map(lambda g, p: torch.add(g, p, alpha=weight_decay), grads, params)
        direction, buffer = _with_momentum(grads, state.momentum, momentum, nesterov) if momentum else (grads, None)
        return tree.map(lambda d: d * minus_rate, direction), SGDState(state.steps + 1, buffer)

    return Transform(init, update)


def trace(decay: float, *, nesterov: bool = False) -> Transform:
    """Momentum alone: gradients become `b <- decay * b + g` (Nesterov: `g + decay * b`), to be scaled further on.

    `decay`: in [0, 1), else ValueError.

    >>> import torch
    >>> from ftrain import optim
    >>> tx = optim.chain(optim.trace(0.9), optim.scale(-0.1))
    >>> params = grads = {"w": torch.ones(1)}
    >>> tx.update(grads, tx.init(params), params)[0]
    {'w': tensor([-0.1000])}
    """
    require_range("decay", decay, 0.0, 1.0)

    def init(params: Tree) -> TraceState:
        return TraceState(zeros(params))

    def update(grads: Tree, state: TraceState, params: Tree) -> tuple[Tree, TraceState]:
        require_like(grads, params)
        direction, buffer = _with_momentum(grads, state.momentum, decay, nesterov)
        return direction, TraceState(buffer)

    return Transform(init, update)


def _with_momentum(grads: Tree, buffer: Tree, decay: float, nesterov: bool) -> tuple[Tree, Tree]:
    def leaf(g: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        b = torch.add(g, b, alpha=decay)
        return (torch.add(g, b, alpha=decay) if nesterov else b), b

    direction, buffer = tree.map_many(leaf, 2, grads, buffer)
    return direction, buffer
