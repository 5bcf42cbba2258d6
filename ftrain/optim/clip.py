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
    """The state of `clip_by_global_norm`: `norm` of the last gradients before clipping, 0-d, which is a metric for
    free.
    """

    norm: Tensor


def clip_by_global_norm(max_norm: float, *, mask: Mask = None) -> Transform:
    """Scale all gradients by `min(1, max_norm / (norm + 1e-6))`, as `torch.nn.utils.clip_grad_norm_`.

    - `max_norm`: of all leaves together, above 0.
    - `mask`: which leaves are measured and scaled, a tree of bools or a function from parameters to one; None: all.
      Others pass unchanged. Leaves that a later transform of a `chain` freezes are left out in any case.

    On a mesh the norm is that of the whole gradients. ValueError for a norm that is not above 0: leave clipping out, or
    freeze. Source: Pascanu et al., arXiv 1211.5063.

    >>> import torch
    >>> from ftrain import optim
    >>> params = grads = {"w": torch.tensor([3.0, 4.0])}
    >>> tx = optim.clip_by_global_norm(1.0)
    >>> updates, state = tx.update(grads, tx.init(params), params)
    >>> updates, state.norm
    ({'w': tensor([0.6000, 0.8000])}, tensor(5.))
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
    """Clamp every number of every gradient to `[-limit, limit]`. ValueError for a limit below 0.

    >>> import torch
    >>> from ftrain import optim
    >>> tx = optim.clip_by_value(1.0)
    >>> params = grads = {"w": torch.tensor([3.0, -0.5])}
    >>> tx.update(grads, tx.init(params), params)[0]
    {'w': tensor([ 1.0000, -0.5000])}
    """
    require_range("limit", limit, 0.0)

    def update(grads: Tree, state: EmptyState, params: Tree) -> tuple[Tree, EmptyState]:
        require_like(grads, params)
        return tree.map(lambda g: g.clamp(-limit, limit), grads), state

    return Transform(lambda params: EmptyState(), update)
