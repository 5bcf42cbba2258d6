"""Transforms made of transforms: one after the other, on some leaves only, or a different one for each group of leaves.

Where a transform sees some of the leaves, the others are None in the tree that it gets: None has no leaves, so paths
stay what they are and its state mirrors the parameters with gaps.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import optree
import torch
from torch import Tensor

from ftrain import tree
from ftrain.optim.transform import (
    EmptyState,
    Mask,
    Schedule,
    Transform,
    decays,
    merge,
    new_count,
    require_like,
    require_range,
    select,
    trainable,
)
from ftrain.sharding.paths import Rules
from ftrain.tree import Tree

Labels = Callable[[str], str] | Mapping[str, str] | Sequence[tuple[str, str]] | Tree


class ScheduleState(NamedTuple):
    """`steps`: 0-d int64, updates made so far."""

    steps: Tensor


def chain(*transforms: Transform) -> Transform:
    """One transform after the other: each gets the updates of the one before. The state is the tuple of their states.

    Leaves that a later one freezes are hidden from those before it: a clip measures and scales only what is trained,
    and the gradients of the rest are not computed. ValueError at an update for a state of another length, and for
    gradients that do not have the parameters' structure and shapes.

    >>> import torch
    >>> from ftrain import optim
    >>> tx = optim.chain(optim.clip_by_global_norm(1.0), optim.sgd(0.5))
    >>> params = {"w": torch.zeros(2)}
    >>> updates, state = tx.update({"w": torch.tensor([3.0, 4.0])}, tx.init(params), params)
    >>> updates
    {'w': tensor([-0.3000, -0.4000])}
    """

    def visible(params: Tree) -> list[Tree]:
        """For each transform, which leaves those after it may move."""
        masks, moving = [], tree.map(lambda _: True, params)
        for transform in reversed(transforms):
            masks.append(moving)
            moving = tree.map(lambda a, b: a and b, moving, trainable(transform, params))
        return masks[::-1]

    def init(params: Tree) -> tuple[Any, ...]:
        return tuple(t.init(select(params, seen)) for t, seen in zip(transforms, visible(params), strict=True))

    def update(updates: Tree, state: tuple[Any, ...], params: Tree) -> tuple[Tree, tuple[Any, ...]]:
        if len(state) != len(transforms):
            raise ValueError(f"a chain of {len(transforms)} transforms got a state of {len(state)}")
        require_like(updates, params, name="the updates")
        states = []
        for transform, before, seen in zip(transforms, state, visible(params), strict=True):
            part, after = transform.update(select(updates, seen), before, select(params, seen))
            updates = merge(updates, seen, part)
            states.append(after)
        return updates, tuple(states)

    def frozen(params: Tree) -> Tree:
        moving = [trainable(t, params) for t in transforms]
        return tree.map(lambda _, *may: not all(may), params, *moving)

    return Transform(init, update, frozen)


def masked(transform: Transform, mask: Mask, *, rest: Literal["pass", "freeze"] | None = None) -> Transform:
    """`transform` on the leaves that `mask` selects; `rest` says what happens to all others.

    - `mask`: a tree of bools shaped as the parameters, or a function from parameters to one.
    - `rest`: "freeze", their updates are zero; "pass", they go on unchanged, to a later transform of a chain (as optax
      does: at the end of a chain these parameters would move by plus their gradient).

    ValueError where `rest` is not given, and at an update for a mask that does not have the parameters' structure.

    >>> import torch
    >>> from ftrain import optim
    >>> params = grads = {"w": torch.ones(1), "frozen": torch.ones(1)}
    >>> tx = optim.masked(optim.sgd(0.1), {"w": True, "frozen": False}, rest="freeze")
    >>> tx.update(grads, tx.init(params), params)[0]
    {'w': tensor([-0.1000]), 'frozen': tensor([0.])}
    """
    if rest not in ("pass", "freeze"):
        raise ValueError(
            f"masked: rest={rest!r}: say what happens to the leaves that the mask leaves out: rest='freeze' holds them "
            "still, rest='pass' hands their gradients on unchanged to a later transform of the chain"
        )

    def groups(params: Tree) -> tuple[Tree, Tree]:
        chosen = decays(mask, params)
        return chosen, tree.map(lambda keep: not keep, chosen)

    def init(params: Tree) -> Any:
        return transform.init(select(params, groups(params)[0]))

    def update(updates: Tree, state: Any, params: Tree) -> tuple[Tree, Any]:
        require_like(updates, params, name="the updates")
        chosen, others = groups(params)
        inner, state = transform.update(select(updates, chosen), state, select(params, chosen))
        if rest == "freeze":
            updates = merge(updates, others, _zeros(select(params, others)))
        return merge(updates, chosen, inner), state

    def frozen(params: Tree) -> Tree:
        chosen, others = groups(params)
        still = others if rest == "freeze" else tree.map(lambda _: False, params)
        moving = trainable(transform, select(params, chosen))
        return merge(still, chosen, tree.map(lambda moves: not moves, moving))

    return Transform(init, update, frozen)


def multi_transform(transforms: Mapping[str, Transform], labels: Labels) -> Transform:
    """Each leaf to the transform of its label; the state is a dict of their states by label.

    - `transforms`: label -> transform.
    - `labels`: globs over dotted paths and their labels (`ftrain.sharding.paths`: the most specific decides), as a
      mapping or a list of pairs; a function from path to label; or a tree of labels shaped as the parameters.

    ValueError, at `init` or an update, for a leaf that no glob matches, a glob that matches no leaf or is given twice,
    two that decide differently and are equally specific, or a label without a transform.

    >>> import torch
    >>> from ftrain import optim
    >>> params = grads = {"embed": torch.ones(4, 2), "layers": [{"w": torch.ones(2, 2)}]}
    >>> tx = optim.multi_transform({"matrices": optim.muon(0.02), "rest": optim.adamw(1e-3)},
    ...                            {"layers.**": "matrices", "**": "rest"})
    >>> sorted(tx.init(params))
    ['matrices', 'rest']
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
        return {name: transforms[name].init(select(params, chosen)) for name, chosen in groups(params).items()}

    def update(updates: Tree, state: dict[str, Any], params: Tree) -> tuple[Tree, dict[str, Any]]:
        require_like(updates, params)
        merged, after = updates, {}
        for name, chosen in groups(params).items():
            part, after[name] = transforms[name].update(select(updates, chosen), state[name], select(params, chosen))
            merged = merge(merged, chosen, part)
        return merged, after

    def frozen(params: Tree) -> Tree:
        still = tree.map(lambda _: False, params)
        for name, chosen in groups(params).items():
            moving = trainable(transforms[name], select(params, chosen))
            still = merge(still, chosen, tree.map(lambda moves: not moves, moving))
        return still

    return Transform(init, update, frozen)


def label_tree(labels: Labels, params: Tree) -> Tree:
    """The label of every leaf: strings in a tree shaped as `params`; `multi_transform` says what `labels` may be.

    ValueError for a leaf without a label, a glob that matches no leaf or is given twice, and labels of another
    structure.

    >>> import torch
    >>> from ftrain import optim
    >>> optim.label_tree({"**.b": "plain", "**": "decayed"}, {"layer": {"w": torch.ones(2), "b": torch.ones(2)}})
    {'layer': {'w': 'decayed', 'b': 'plain'}}
    """
    if callable(labels):
        return tree.map_with_path(lambda path, _: labels(path), params)
    rules = _rules(labels, params)
    if rules is None:
        tree.require_same(params, labels, names=("the parameters", "the labels"))
        return labels
    if not _has_gaps(params):  # else a group's leaves may be hidden by a transform around this one
        rules.require_used(tree.paths(params))

    def label(path: str, _: Tensor) -> str:
        found = rules.find(path)
        if found is None:
            raise ValueError(
                f"no label for {path!r}: none of {[*rules.values]} matches; add ('**', label) for the rest"
            )
        return found

    return tree.map_with_path(label, params)


def scale(factor: float) -> Transform:
    """Multiply every update by `factor`; minus a rate makes a descent step of a gradient.

    >>> import torch
    >>> from ftrain import optim
    >>> tx = optim.scale(-0.1)
    >>> params = grads = {"w": torch.ones(1)}
    >>> tx.update(grads, tx.init(params), params)[0]
    {'w': tensor([-0.1000])}
    """

    def update(updates: Tree, state: EmptyState, params: Tree) -> tuple[Tree, EmptyState]:
        require_like(updates, params, name="the updates")
        return tree.map(lambda u: u * factor, updates), state

    return Transform(lambda params: EmptyState(), update)


def scale_by_schedule(schedule: Schedule) -> Transform:
    """Multiply every update by the schedule's value, which is positive: put `scale(-1.0)` beside it to descend.

    `schedule`: from the count of updates made (0-d int64) to a 0-d float32.

    >>> import torch
    >>> from ftrain import optim
    >>> tx = optim.chain(optim.scale_by_schedule(optim.linear(0.0, 1.0, steps=2)), optim.scale(-1.0))
    >>> params = grads = {"w": torch.ones(1)}
    >>> updates, state = tx.update(grads, tx.init(params), params)
    >>> tx.update(grads, state, params)[0]
    {'w': tensor([-0.5000])}
    """

    def update(updates: Tree, state: ScheduleState, params: Tree) -> tuple[Tree, ScheduleState]:
        require_like(updates, params, name="the updates")
        factor = schedule(state.steps)
        return tree.map(lambda u: u * factor.to(u.dtype), updates), ScheduleState(state.steps + 1)

    return Transform(lambda params: ScheduleState(new_count(params)), update)


def add_decayed_weights(weight_decay: float, *, mask: Mask = None) -> Transform:
    """Add `weight_decay * p` to every update whose leaf `mask` selects (None: all), before it is scaled.

    `mask`: a tree of bools, or a function from parameters to one. ValueError for a decay below 0.

    >>> import torch
    >>> from ftrain import optim
    >>> tx = optim.chain(optim.add_decayed_weights(0.5), optim.scale(-0.1))
    >>> params = grads = {"w": torch.ones(1)}
    >>> tx.update(grads, tx.init(params), params)[0]
    {'w': tensor([-0.1500])}
    """
    require_range("weight_decay", weight_decay, 0.0)

    def update(updates: Tree, state: EmptyState, params: Tree) -> tuple[Tree, EmptyState]:
        require_like(updates, params, name="the updates")

        def leaf(u: Tensor, p: Tensor, decay: bool) -> Tensor:
            return torch.add(u, p, alpha=weight_decay) if decay else u

        return tree.map(leaf, updates, params, decays(mask, params)), state

    return Transform(lambda params: EmptyState(), update)


def freeze() -> Transform:
    """Zero updates, whatever the gradients (NaN included): for groups of a `multi_transform` that must not move.

    The zeros are not made from the gradients, so the backward that only these would need is not part of the step.

    >>> import torch
    >>> from ftrain import optim
    >>> tx = optim.freeze()
    >>> params = {"w": torch.ones(1)}
    >>> tx.update({"w": torch.tensor([float("nan")])}, tx.init(params), params)[0]
    {'w': tensor([0.])}
    """

    def update(updates: Tree, state: EmptyState, params: Tree) -> tuple[Tree, EmptyState]:
        require_like(updates, params, name="the updates")
        return _zeros(params), state

    return Transform(lambda params: EmptyState(), update, lambda params: tree.map(lambda _: True, params))


set_to_zero = freeze
"""optax's name of it."""


def identity() -> Transform:
    """Updates as they are, without a state."""
    return Transform(lambda params: EmptyState(), lambda updates, state, params: (updates, state))


def _zeros(params: Tree) -> Tree:
    return tree.map(lambda p: torch.zeros((), dtype=p.dtype, device=p.device).expand(p.shape), params)


def _rules(labels: Any, params: Tree) -> Rules[str] | None:
    """Globs and labels where `labels` are such: a mapping of strings that is not itself a tree of labels, or pairs.

    A tree of labels that looks like a list of pairs must be given as a function instead.
    """
    pairs = labels.items() if isinstance(labels, Mapping) else labels
    if not isinstance(labels, Mapping | list | tuple) or not all(_is_pair(x) for x in pairs):
        return None
    if isinstance(labels, Mapping) and tree.flatten(labels)[1] == tree.flatten(params)[1]:
        return None
    found: dict[str, str] = {}
    for glob, label in pairs:
        if found.setdefault(glob, label) != label:
            raise ValueError(f"labels: {glob!r} is given twice, as {found[glob]!r} and as {label!r}")
    return Rules(found, "labels")


def _is_pair(x: Any) -> bool:
    return isinstance(x, tuple) and len(x) == 2 and all(isinstance(part, str) for part in x)


def _has_gaps(params: Tree) -> bool:
    leaves = optree.tree_leaves(params, none_is_leaf=True, namespace=tree.NAMESPACE)
    return any(leaf is None for leaf in leaves)
