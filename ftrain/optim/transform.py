"""The contract of an optimizer: a pair of pure functions, as in optax, and `apply_updates`.

`init(params) -> state` and `update(grads, state, params) -> (updates, state)`. Updates are *added* to the parameters.
Both are tensor operations only, without in-place writes or branches on values, so that they trace into the graph of a
step. A state is a NamedTuple whose subtrees mirror the parameters, so sharding and checkpoints follow the parameters;
counts are 0-d int64 tensors, one per transform: the number of updates made so far.
"""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ftrain import tree
from ftrain.tree import Tree

Schedule = Callable[[Tensor], Tensor]
LearningRate = float | Tensor | Schedule
Mask = Callable[[Tree], Tree] | Tree | None


class Transform(NamedTuple):
    """An optimizer, or a part of one: a pair of pure functions of trees shaped as the parameters.

    - `init(params) -> state`.
    - `update(grads, state, params) -> (updates, state)`; updates are added to the parameters.
    - `frozen(params)`: a tree of bools, True for leaves whose update is zero whatever the gradient; None: there are
      none. What comes before such a transform in a chain does not see these leaves, so that their gradients are not
      computed.

    >>> import torch
    >>> from ftrain import optim
    >>> signs = optim.Transform(
    ...     init=lambda params: optim.EmptyState(),
    ...     update=lambda grads, state, params: ({"w": -0.1 * grads["w"].sign()}, state),
    ... )
    >>> params = {"w": torch.ones(1)}
    >>> updates, state = signs.update({"w": torch.tensor([7.0])}, signs.init(params), params)
    >>> optim.apply_updates(params, updates)
    {'w': tensor([0.9000])}
    """

    init: Callable[[Tree], Any]
    update: Callable[[Tree, Any, Tree], tuple[Tree, Any]]
    frozen: Callable[[Tree], Tree] | None = None


class EmptyState(NamedTuple):
    """The state of a transform that remembers nothing."""


def apply_updates(params: Tree, updates: Tree) -> Tree:
    """`params + updates`, each leaf in its parameter's dtype: summed in the wider of the two, rounded once.

    ValueError unless both trees have one structure and equal shapes; it names the leaf.

    >>> import torch
    >>> from ftrain import optim
    >>> optim.apply_updates({"w": torch.ones(2)}, {"w": torch.tensor([-0.5, 0.0])})
    {'w': tensor([0.5000, 1.0000])}
    """
    require_like(updates, params, name="the updates")
    return tree.map(_add, params, updates)


def _add(param: Tensor, update: Tensor) -> Tensor:
    return cast(param + update, param.dtype)


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x`, of any shape, in `dtype`, without a node in the graph when it has that dtype already."""
    return x if x.dtype == dtype else x.to(dtype)


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which running averages of a leaf are kept: its own, but at least float32.

    In bfloat16 0.999 * v rounds back to v, so an average would never forget.
    """
    return torch.promote_types(dtype, torch.float32)


def zeros(params: Tree, dtype: torch.dtype | None = None) -> Tree:
    """Zeros shaped as `params`, in `dtype` or else in each leaf's `state_dtype`."""
    return tree.map(lambda p: torch.zeros_like(p, dtype=dtype or state_dtype(p.dtype)), params)


def new_count(params: Tree) -> Tensor:
    """A count of zero: 0-d int64, on the device of the parameters."""
    return torch.zeros((), dtype=torch.int64, device=device_of(params))


def device_of(params: Tree) -> torch.device:
    """The device of the first leaf; the CPU for a tree without leaves."""
    found = tree.leaves(params)
    return found[0].device if found else torch.device("cpu")


def trainable(transform: Transform, params: Tree) -> Tree:
    """Which leaves the transform may move: a tree of bools shaped as `params`, such as a mask for `global_norm`.

    >>> import torch
    >>> from ftrain import optim
    >>> transforms = {"train": optim.adamw(1e-3), "keep": optim.freeze()}
    >>> tx = optim.multi_transform(transforms, {"head": "train", "body": "keep"})
    >>> optim.trainable(tx, {"head": torch.ones(2), "body": torch.ones(2)})
    {'head': True, 'body': False}
    """
    if transform.frozen is None:
        return tree.map(lambda _: True, params)
    return tree.map(lambda frozen: not frozen, transform.frozen(params))


def select(values: Tree, chosen: Tree) -> Tree:
    """`values` with None, which has no leaves, in the place of those that are not chosen."""
    return tree.map(lambda value, keep: value if keep else None, values, chosen)


def merge(values: Tree, chosen: Tree, part: Tree) -> Tree:
    """`values` with the chosen leaves taken from `part`, which holds those alone; ValueError if it holds others."""
    tree.require_same(select(values, chosen), part, names=("the selected leaves", "the inner updates"))
    taken = iter(tree.leaves(part))
    return tree.map(lambda value, keep: next(taken) if keep else value, values, chosen)


def rate_at(learning_rate: LearningRate, count: Tensor) -> float | Tensor:
    """The learning rate of the update that comes after `count` (0-d int64) others: the number itself, or the schedule's
    value.
    """
    return learning_rate(count) if callable(learning_rate) else learning_rate


def decays(mask: Mask, params: Tree) -> Tree:
    """Which leaves a mask selects: a tree of bools shaped as `params`; None selects all.

    ValueError for a mask of another structure, or with other values than bools; it names the leaf.
    """
    if mask is None:
        return tree.map(lambda _: True, params)
    chosen = mask(params) if callable(mask) else mask
    tree.require_same(params, chosen, names=("the parameters", "the mask"))
    for path, value in zip(tree.paths(chosen), tree.leaves(chosen), strict=True):
        if not isinstance(value, bool):
            raise ValueError(f"a mask holds bools; at {path!r} it holds {tree.describe(value)}")
    return chosen


def require_like(updates: Tree, params: Tree, *, name: str = "the gradients") -> None:
    """ValueError unless `updates` have the structure of `params` and equal shapes; it names the leaf.

    `name`: what the message calls the updates.
    """
    tree.require_same(params, updates, names=("the parameters", name))
    for i, (p, u) in enumerate(zip(tree.leaves(params), tree.leaves(updates), strict=True)):
        if p.shape != u.shape:
            path = tree.paths(params)[i]
            raise ValueError(f"{name} at {path!r} have shape {list(u.shape)}, the parameter has {list(p.shape)}")


def warn_of_rounding(params: Tree, optimizer: str) -> None:
    """A warning where parameters are narrower than float32, in which small updates silently round to nothing.

    `optimizer`: what the warning calls it.
    """
    narrow = [
        (path, p.dtype)
        for path, p in zip(tree.paths(params), tree.leaves(params), strict=True)
        if p.is_floating_point() and p.dtype.itemsize < 4
    ]
    if narrow:
        path, dtype = narrow[0]
        smallest = round(2 / torch.finfo(dtype).eps)
        warnings.warn(
            f"{optimizer}: {len(narrow)} parameters, such as {path!r}, are {str(dtype).removeprefix('torch.')}: an "
            f"update below 1/{smallest} of a parameter rounds to nothing. Keep float32 parameters and compute in "
            "bfloat16 (ftrain.Precision), or wrap the optimizer in ftrain.optim.master_weights or stochastic_rounding",
            stacklevel=3,
        )


def require_rate(learning_rate: LearningRate) -> None:
    """ValueError for a rate below zero or not a number, and for a tensor that is not floating and 0-d.

    A 0-d tensor may change from call to call, and a schedule is not checked.
    """
    if isinstance(learning_rate, Tensor):
        if learning_rate.dim() or not learning_rate.is_floating_point():
            found = f"{learning_rate.dtype} {list(learning_rate.shape)}"
            raise ValueError(f"learning_rate as a tensor must be floating and 0-d, not {found}")
    elif not callable(learning_rate):
        require_range("learning_rate", learning_rate, 0.0)


def require_range(name: str, value: float, low: float, below: float = float("inf")) -> None:
    """ValueError unless `value` is a number and `low <= value < below`."""
    if isinstance(value, Tensor):
        raise ValueError(f"{name} must be a number of Python, not a tensor; a learning_rate may be one")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} must be a number, not {value!r}")
    if not low <= value < below:
        upper = "" if below == float("inf") else f" and < {below}"
        raise ValueError(f"{name} must be >= {low}{upper}, not {value}")
