"""Names that users of optax look for, with optax's arguments and meaning, made of the transforms of this package."""

from ftrain import tree
from ftrain.optim.adamw import AdamWState, adamw
from ftrain.optim.clip import clip_by_value
from ftrain.optim.combine import ScheduleState
from ftrain.optim.schedules import constant, cosine, join, linear
from ftrain.optim.transform import (
    LearningRate,
    Schedule,
    Transform,
    new_count,
    rate_at,
    require_like,
    require_range,
    require_rate,
)
from ftrain.tree import Tree


def adam(learning_rate: LearningRate, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> Transform:
    """Adam without weight decay: `p <- p - rate * m / (sqrt(v) + eps)`, m and v without bias (Kingma and Ba, arXiv
    1412.6980).

    `learning_rate`, `b1`, `b2`, `eps`: as in `adamw`. ValueError for values out of range.

    >>> import torch
    >>> from ftrain import optim
    >>> tx = optim.adam(0.1)
    >>> params = {"w": torch.ones(1)}
    >>> tx.update({"w": torch.tensor([5.0])}, tx.init(params), params)[0]
    {'w': tensor([-0.1000])}
    """
    return adamw(learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=0.0)


def scale_by_adam(b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> Transform:
    """Gradients become `m / (sqrt(v) + eps)`: Adam's direction, uphill, to be scaled by `scale_by_learning_rate`.

    `b1`, `b2`, `eps`: as in `adamw`. ValueError for values out of range.
    """
    inner = adamw(1.0, b1=b1, b2=b2, eps=eps, weight_decay=0.0)

    def update(grads: Tree, state: AdamWState, params: Tree) -> tuple[Tree, AdamWState]:
        updates, state = inner.update(grads, state, params)
        return tree.map(lambda u: -u, updates), state

    return Transform(inner.init, update)


def scale_by_learning_rate(learning_rate: LearningRate, *, flip_sign: bool = True) -> Transform:
    """Multiply every update by minus the rate (plus, where `flip_sign` is False): the last of a chain, it descends.

    `learning_rate`: a number >= 0, a 0-d floating tensor or a schedule; else ValueError.

    >>> import torch
    >>> from ftrain import optim
    >>> tx = optim.chain(optim.scale_by_adam(), optim.scale_by_learning_rate(0.1))
    >>> params = {"w": torch.ones(1)}
    >>> tx.update({"w": torch.tensor([5.0])}, tx.init(params), params)[0]
    {'w': tensor([-0.1000])}
    """
    require_rate(learning_rate)
    sign = -1.0 if flip_sign else 1.0

    def update(updates: Tree, state: ScheduleState, params: Tree) -> tuple[Tree, ScheduleState]:
        require_like(updates, params, name="the updates")
        factor = sign * rate_at(learning_rate, state.steps)
        return tree.map(lambda u: u * factor, updates), ScheduleState(state.steps + 1)

    return Transform(lambda params: ScheduleState(new_count(params)), update)


def constant_schedule(value: float) -> Schedule:
    """`value` at every count; ValueError for one below 0."""
    return constant(value)


def linear_schedule(init_value: float, end_value: float, transition_steps: int, transition_begin: int = 0) -> Schedule:
    """`init_value` up to count `transition_begin`, then a line to `end_value`, `transition_steps` later, then that.

    ValueError for values below 0 and less than one step.

    >>> import torch
    >>> from ftrain import optim
    >>> rate = optim.linear_schedule(1.0, 0.0, transition_steps=4, transition_begin=2)
    >>> [float(rate(torch.tensor(count))) for count in (0, 2, 4, 6)]
    [1.0, 1.0, 0.5, 0.0]
    """
    line = linear(init_value, end_value, steps=transition_steps)
    require_range("transition_begin", transition_begin, 0)
    return join([constant(init_value), line], boundaries=[transition_begin]) if transition_begin else line


def cosine_decay_schedule(init_value: float, decay_steps: int, alpha: float = 0.0) -> Schedule:
    """Half a cosine from `init_value` to `alpha * init_value` at count `decay_steps`, and that from there on.

    ValueError for values below 0 and less than one step.
    """
    require_range("alpha", alpha, 0.0)
    return cosine(init_value, alpha * init_value, steps=decay_steps)


def warmup_cosine_decay_schedule(
    init_value: float, peak_value: float, warmup_steps: int, decay_steps: int, end_value: float = 0.0
) -> Schedule:
    """A line from `init_value` to `peak_value` in `warmup_steps`, half a cosine to `end_value` at count `decay_steps`.

    As in optax `decay_steps` counts from 0, so it holds the warm-up. ValueError where it is not longer, and for values
    below 0.

    >>> import torch
    >>> from ftrain import optim
    >>> rate = optim.warmup_cosine_decay_schedule(0.0, 1.0, warmup_steps=2, decay_steps=6)
    >>> [round(float(rate(torch.tensor(count))), 3) for count in (0, 1, 2, 4, 6)]
    [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    require_range("warmup_steps", warmup_steps, 1)
    if decay_steps <= warmup_steps:
        raise ValueError(f"decay_steps={decay_steps} holds the warm-up and must be above warmup_steps={warmup_steps}")
    rise = linear(init_value, peak_value, steps=warmup_steps)
    return join([rise, cosine(peak_value, end_value, steps=decay_steps - warmup_steps)], boundaries=[warmup_steps])


def join_schedules(schedules: list[Schedule], boundaries: list[int]) -> Schedule:
    """Schedules one after the other: piece i+1 begins, at its own count 0, at `boundaries[i]`.

    ValueError unless boundaries ascend and are one fewer than the schedules.
    """
    return join(schedules, boundaries=boundaries)


def clip(max_delta: float) -> Transform:
    """Clamp every number of every update to `[-max_delta, max_delta]`; ValueError for one below 0."""
    return clip_by_value(max_delta)
