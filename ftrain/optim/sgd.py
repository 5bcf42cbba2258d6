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
    """`steps`: updates made so far; `momentum` is None without momentum."""

    steps: Tensor
    momentum: Tree


class TraceState(NamedTuple):
    """The decaying sum of all gradients seen."""

    momentum: Tree


def sgd(
    learning_rate: LearningRate, *, momentum: float = 0.0, nesterov: bool = False, weight_decay: float = 0.0
) -> Transform:
    """`b <- momentum * b + g`, `p <- p - rate * b` (Nesterov: `g + momentum * b`); the decay is part of `g`.

    Equal to `torch.optim.SGD` without dampening. Momentum has the parameter's dtype, but never less than float32.
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
    """Momentum alone: gradients become `b <- decay * b + g` (Nesterov: `g + decay * b`), to be scaled further on."""
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
