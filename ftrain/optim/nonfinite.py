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
    """The state of the transform within; how many updates were skipped in all, and how many since the last that was
    not: 0-d int64."""

    inner: Any
    skipped_total: Tensor
    skipped_in_a_row: Tensor


def skip_nonfinite(transform: Transform, *, max_consecutive: int | None = None) -> Transform:
    """`transform`, but where a gradient holds a NaN or an infinity the updates are zero and its state stays as it is.

    Put it around everything that keeps state. Values are chosen with `where`, so no NaN passes. Gradients of frozen
    leaves are not looked at. After `max_consecutive` skips in a row the next update is let through, that a run which
    cannot recover is seen to fail (as in optax); None skips for ever. The price is one pass to look at the gradients,
    and a `where` over each update and state leaf, but for those that AdamW writes in place.
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
    """Is every number of every leaf, on every shard, finite? 0-d bool. One pass per leaf: its smallest and largest."""
    leaves = [g for g in tree.leaves(gradients) if g.numel()]
    if not leaves:
        return torch.ones((), dtype=torch.bool, device=device_of(gradients))
    bad_N = (~extremes(leaves).isfinite()).any(dim=1).to(torch.float32)
    return sum_over_shards(bad_N, leaves).sum() == 0
