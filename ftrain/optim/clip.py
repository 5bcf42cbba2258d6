"""Clipping: by the norm of all gradients together, or value by value."""

from typing import NamedTuple

import torch
from torch import Tensor

from ftrain import tree
from ftrain.optim.norms import global_norm, norm_dtype
from ftrain.optim.transform import (
    EmptyState,
    Mask,
    Transform,
    cast,
    decays,
    device_of,
    require_like,
    require_range,
    select,
)
from ftrain.tree import Tree


class ClipState(NamedTuple):
    """`norm` of the last gradients before clipping, 0-d: a metric for free."""

    norm: Tensor


def clip_by_global_norm(max_norm: float, *, mask: Mask = None) -> Transform:
    """Scale all gradients by `min(1, max_norm / (norm + 1e-6))`, as `torch.nn.utils.clip_grad_norm_`.

    `mask` says which leaves are measured and scaled (None: all); others pass unchanged. Leaves that a later transform
    of a `chain` freezes are left out in any case. ValueError for a norm that is not above 0: leave clipping out, or
    freeze.
    """
    require_range("max_norm", max_norm, 0.0)
    if max_norm == 0:
        raise ValueError("max_norm=0 makes every gradient zero: leave the transform out, or use ftrain.optim.freeze")

    def init(params: Tree) -> ClipState:
        return ClipState(torch.zeros((), dtype=norm_dtype(params), device=device_of(params)))

    def update(grads: Tree, state: ClipState, params: Tree) -> tuple[Tree, ClipState]:
        require_like(grads, params)
        chosen = decays(mask, params)
        norm = global_norm(select(grads, chosen)).to(state.norm.dtype)
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        return tree.map(lambda g, keep: cast(g * factor, g.dtype) if keep else g, grads, chosen), ClipState(norm)

    return Transform(init, update)


def clip_by_value(limit: float) -> Transform:
    """Clamp every gradient to `[-limit, limit]`."""
    require_range("limit", limit, 0.0)

    def update(grads: Tree, state: EmptyState, params: Tree) -> tuple[Tree, EmptyState]:
        require_like(grads, params)
        return tree.map(lambda g: g.clamp(-limit, limit), grads), state

    return Transform(lambda params: EmptyState(), update)
