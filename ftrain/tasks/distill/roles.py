"""Roles: who a step trains and who it only asks, as views of one tree.

A tree such as `{"base": ..., "student": ..., "critic": ..., "student_opt": ...}` holds everything. A role is a subtree,
or a base with the deltas of a subtree: then teacher, student and critic share one base.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ftrain import tree as trees
from ftrain.modules.spec import Tree
from ftrain.optim.transform import Transform, apply_updates
from ftrain.trace.grad import forward, value_and_grad

RoleTree = Mapping[str, Any]


@dataclass(frozen=True)
class Role:
    """A model's parameters in a tree of roles.

    - `own`: the name of its subtree: all its parameters, or its deltas.
    - `base`, `bind`: the name of what the deltas belong to, and `bind(base, deltas)`, such as `partial(lora.bind,
      adapter=adapter)`.

    ValueError for one of `base` and `bind` without the other.

    >>> Role("critic").of({"critic": {"w": 1.0}})
    {'w': 1.0}
    >>> Role("delta", base="base", bind=lambda base, delta: base + delta).of({"base": 2.0, "delta": 0.5})
    2.5
    """

    own: str
    base: str | None = None
    bind: Callable[[Tree, Tree], Tree] | None = None

    def __post_init__(self) -> None:
        if (self.base is None) != (self.bind is None):
            raise ValueError(f"role {self.own!r}: base={self.base!r} needs bind, which adds the deltas, and vice versa")

    def of(self, tree: RoleTree, own: Tree | None = None) -> Tree:
        """The parameters; `own` in the place of the tree's, where it is differentiated. ValueError for a tree without
        the role.
        """
        own = _entry(tree, self.own) if own is None else own
        if self.base is None or self.bind is None:
            return own
        return self.bind(_entry(tree, self.base), own)

    @property
    def opt(self) -> str:
        """The name of its optimizer's state in the tree."""
        return f"{self.own}_opt"

    def begun(self, tree: RoleTree, own: Tree, tx: Transform) -> dict[str, Any]:
        """The tree with this subtree and a fresh state of its optimizer.

        The optimizer's trees of parameters are `{own: ...}`: on a mesh a leaf is known by the end of its path, and
        roles may have equal paths.
        """
        own = trees.map(lambda x: x.detach().clone(), own)  # no leaf at two places of a tree that a step overwrites
        return {**tree, self.own: own, self.opt: tx.init({self.own: own})}


def _entry(tree: RoleTree, name: str) -> Any:
    if name not in tree:
        raise ValueError(f"the tree has {', '.join(sorted(tree))} and no {name!r}: start it in the stage's init map")
    return tree[name]


def updated(
    tree: RoleTree, role: Role, tx: Transform, loss: Callable[[Tree, RoleTree, Any], tuple[Any, Any]], batch: Any
) -> tuple[dict[str, Any], Tensor, Any]:
    """One update of a role, which changes its subtree and its optimizer's state alone.

    `loss(params, tree, batch)` gives what is differentiated (a scalar, `Mean` or `WeightedSum`) and any tree for the
    log; it gets the role's parameters, and the tree as losses see it. Returns the new tree, the value and that tree.
    ValueError for a tree without the role, or without its optimizer's state.
    """
    own, rest = _entry(tree, role.own), {name: x for name, x in tree.items() if name != role.own}
    state = _entry(tree, role.opt)

    def of(own: Tree, batch: Any) -> tuple[Any, Any]:
        seen = forward(lambda rest: rest)(rest)
        return loss(role.of(seen, own), {**seen, role.own: own}, batch)

    (value, log), grads = value_and_grad(of, has_aux=True)(own, batch)
    updates, state = tx.update({role.own: grads}, state, {role.own: own})
    return {**tree, **apply_updates({role.own: own}, updates), role.opt: state}, value, log


def averaged(average: Tree, params: Tree, decay: float) -> Tree:
    """`decay * average + (1 - decay) * params`, leaf by leaf, in the dtype of the average.

    >>> averaged({"w": torch.tensor(0.0)}, {"w": torch.tensor(4.0)}, 0.75)
    {'w': tensor(1.)}
    """
    return trees.map(lambda a, p: torch.lerp(a, p.to(a.dtype), 1 - decay), average, params)
