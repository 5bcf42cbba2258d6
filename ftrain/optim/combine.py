"""Transforms made of transforms: one after the other, on some leaves only, or a different one for each group of leaves.

Where a transform sees some of the leaves, the others are None in the tree that it gets: None has no leaves, so paths
stay what they are and its state mirrors the parameters with gaps.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ftrain import tree
from ftrain.optim.transform import (
    EmptyState,
    Mask,
    Schedule,
    Transform,
    decays,
    new_count,
    require_like,
    require_range,
)
from ftrain.tree import Tree

Labels = Callable[[str], str] | Sequence[tuple[str, str]] | Tree


class ScheduleState(NamedTuple):
    """`steps`: updates made so far."""

    steps: Tensor


def chain(*transforms: Transform) -> Transform:
    """One after the other: each gets the updates of the one before. The state is the tuple of their states."""

    def init(params: Tree) -> tuple:
        return tuple(t.init(params) for t in transforms)

    def update(updates: Tree, state: tuple, params: Tree) -> tuple[Tree, tuple]:
        if len(state) != len(transforms):
            raise ValueError(f"a chain of {len(transforms)} transforms got a state of {len(state)}")
        states = []
        for transform, before in zip(transforms, state, strict=True):
            updates, after = transform.update(updates, before, params)
            states.append(after)
        return updates, tuple(states)

    return Transform(init, update)


def masked(transform: Transform, mask: Mask) -> Transform:
    """`transform` on the leaves that `mask` selects; the updates of all others pass unchanged.

    `mask`: a tree of bools shaped as the parameters, or a function from parameters to one.
    """

    def init(params: Tree) -> Any:
        return transform.init(_select(params, decays(mask, params)))

    def update(updates: Tree, state: Any, params: Tree) -> tuple[Tree, Any]:
        require_like(updates, params, name="the updates")
        chosen = decays(mask, params)
        inner, state = transform.update(_select(updates, chosen), state, _select(params, chosen))
        return _merge(updates, chosen, inner), state

    return Transform(init, update)


def multi_transform(transforms: Mapping[str, Transform], labels: Labels) -> Transform:
    """Each leaf to the transform of its label; the state is a dict of their states by label.

    `labels`: a list of (pattern, label) over dotted paths (`tree.match`; the first match wins), a function from path to
    label, or a tree of labels. A leaf that no pattern matches, or a label without a transform, is a ValueError.
    """

    def groups(params: Tree) -> dict[str, Tree]:
        given = label_tree(labels, params)
        for path, label in zip(tree.paths(given), tree.leaves(given), strict=True):
            if label not in transforms:
                near = tree.nearest(str(label), transforms)
                hint = f"; did you mean {near!r}?" if near else ""
                raise ValueError(f"{path!r} has label {label!r}, not one of {sorted(transforms)}{hint}")
        return {name: tree.map(lambda label, name=name: label == name, given) for name in transforms}

    def init(params: Tree) -> dict[str, Any]:
        return {name: transforms[name].init(_select(params, chosen)) for name, chosen in groups(params).items()}

    def update(updates: Tree, state: dict[str, Any], params: Tree) -> tuple[Tree, dict[str, Any]]:
        require_like(updates, params)
        merged, after = updates, {}
        for name, chosen in groups(params).items():
            part, after[name] = transforms[name].update(_select(updates, chosen), state[name], _select(params, chosen))
            merged = _merge(merged, chosen, part)
        return merged, after

    return Transform(init, update)


def label_tree(labels: Labels, params: Tree) -> Tree:
    """The label of every leaf: strings in a tree shaped as `params`; `multi_transform` says what `labels` may be."""
    if callable(labels):
        return tree.map_with_path(lambda path, _: labels(path), params)
    if _is_patterns(labels):
        return tree.map_with_path(lambda path, _: _first_match(path, labels), params)
    tree.require_same(params, labels, names=("the parameters", "the labels"))
    return labels


def scale(factor: float) -> Transform:
    """Multiply every update by `factor`; -rate makes a descent step of a gradient."""

    def update(updates: Tree, state: EmptyState, params: Tree) -> tuple[Tree, EmptyState]:
        require_like(updates, params, name="the updates")
        return tree.map(lambda u: u * factor, updates), state

    return Transform(lambda params: EmptyState(), update)


def scale_by_schedule(schedule: Schedule) -> Transform:
    """Multiply every update by the schedule's value, which is positive: put `scale(-1.0)` beside it to descend."""

    def update(updates: Tree, state: ScheduleState, params: Tree) -> tuple[Tree, ScheduleState]:
        require_like(updates, params, name="the updates")
        factor = schedule(state.steps)
        return tree.map(lambda u: u * factor.to(u.dtype), updates), ScheduleState(state.steps + 1)

    return Transform(lambda params: ScheduleState(new_count(params)), update)


def add_decayed_weights(weight_decay: float, *, mask: Mask = None) -> Transform:
    """Add `weight_decay * p` to every update whose leaf `mask` selects (None: all), before it is scaled."""
    require_range("weight_decay", weight_decay, 0.0)

    def update(updates: Tree, state: EmptyState, params: Tree) -> tuple[Tree, EmptyState]:
        require_like(updates, params, name="the updates")

        def leaf(u: Tensor, p: Tensor, decay: bool) -> Tensor:
            return torch.add(u, p, alpha=weight_decay) if decay else u

        return tree.map(leaf, updates, params, decays(mask, params)), state

    return Transform(lambda params: EmptyState(), update)


def freeze() -> Transform:
    """Zero updates, whatever the gradients (NaN included): for groups of a `multi_transform` that must not move."""

    def update(updates: Tree, state: EmptyState, params: Tree) -> tuple[Tree, EmptyState]:
        require_like(updates, params, name="the updates")
        return tree.map(lambda u: u.new_zeros(()).expand_as(u), updates), state

    return Transform(lambda params: EmptyState(), update)


def _select(values: Tree, chosen: Tree) -> Tree:
    return tree.map(lambda value, keep: value if keep else None, values, chosen)


def _merge(values: Tree, chosen: Tree, part: Tree) -> Tree:
    """`values` with the chosen leaves taken from `part`, which holds those alone."""
    tree.require_same(_select(values, chosen), part, names=("the selected leaves", "the inner updates"))
    taken = iter(tree.leaves(part))
    return tree.map(lambda value, keep: next(taken) if keep else value, values, chosen)


def _is_patterns(labels: Any) -> bool:
    """A list of pairs of strings: a tree of labels that has this shape must be given as a function instead."""
    pairs = isinstance(labels, list | tuple) and all(isinstance(x, tuple) and len(x) == 2 for x in labels)
    return pairs and all(isinstance(x, str) for pair in labels for x in pair)


def _first_match(path: str, patterns: Sequence[tuple[str, str]]) -> str:
    for pattern, label in patterns:
        if tree.match(path, pattern):
            return label
    raise ValueError(f"no label for {path!r}: none of {[p for p, _ in patterns]} matches; end with ('**', label)")
