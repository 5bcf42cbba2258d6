"""Skip a step whose gradients are not finite: nothing changes but a counter."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ftrain import tree
from ftrain.kernels.squares import extremes
from ftrain.optim.norms import sum_over_shards
from ftrain.optim.transform import (
    Transform,
    device_of,
    new_count,
    require_like,
    require_range,
    select,
    trainable,
)
from ftrain.tree import Tree


class SkipState(NamedTuple):
    """The state of `skip_nonfinite`: that of the transform within, and two counts, 0-d int64.

    - `skipped_total`: how many updates were skipped in all.
    - `skipped_in_a_row`: how many since the last one that was not.
    """

    inner: Any
    skipped_total: Tensor
    skipped_in_a_row: Tensor


def skip_nonfinite(transform: Transform, *, max_consecutive: int | None = None) -> Transform:
    """`transform`, but where a gradient holds a NaN or an infinity the updates are zero and its state stays as it is.

    `max_consecutive`: after so many skips in a row the next update is let through, so that a run which cannot recover
    is seen to fail (as in optax's `apply_if_finite`); None skips for ever; at least 1, else ValueError.

    Put it around everything that keeps state. Values are chosen with `where`, so no NaN passes. Gradients of frozen
    leaves are not looked at. The price is one pass to look at the gradients, and a `where` over each update and state
    leaf, but for those that AdamW writes in place.

    >>> import torch
    >>> from ftrain import optim
    >>> tx = optim.skip_nonfinite(optim.adamw(1e-3))
    >>> params = {"w": torch.ones(1)}
    >>> updates, state = tx.update({"w": torch.tensor([float("nan")])}, tx.init(params), params)
    >>> updates, state.skipped_total
    ({'w': tensor([0.])}, tensor(1))
    """
    if max_consecutive is not None:
        require_range("max_consecutive", max_consecutive, 1)

    def init(params: Tree) -> SkipState:
        return SkipState(transform.init(params), new_count(params), new_count(params))

    def update(grads: Tree, state: SkipState, params: Tree) -> tuple[Tree, SkipState]:
        require_like(grads, params)
        updates, inner = transform.update(grads, state.inner, params)
        finite = all_finite(select(grads, trainable(transform, params)))
        keep = finite
        if max_consecutive is not None:
            keep = finite | (state.skipped_in_a_row >= max_consecutive)
        none = torch.zeros((), device=keep.device)
        updates = tree.map(lambda u: torch.where(keep, u, none), updates)
        inner = tree.map(lambda new, old: torch.where(keep, new, old), inner, state.inner)
        skipped = (~keep).to(torch.int64)
        in_a_row = torch.where(finite, 0, state.skipped_in_a_row + skipped)
        return updates, SkipState(inner, state.skipped_total + skipped, in_a_row)

    return Transform(init, update, transform.frozen)


def all_finite(gradients: Tree) -> Tensor:
    """Is every number of every leaf, on every shard, finite? 0-d bool. One pass per leaf: its smallest and largest.

    >>> import torch
    >>> from ftrain import optim
    >>> bool(optim.all_finite({"w": torch.tensor([1.0, float("inf")])}))
    False
    """
    leaves = [g for g in tree.leaves(gradients) if g.numel()]
    if not leaves:
        return torch.ones((), dtype=torch.bool, device=device_of(gradients))
    bad_N = (~extremes(leaves).isfinite()).any(dim=1).to(torch.float32)
    return sum_over_shards(bad_N, leaves).sum() == 0
