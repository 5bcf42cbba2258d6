"""Float32 masters of parameters that are kept in fewer bits (Micikevicius et al., "Mixed precision training", arXiv
1710.03740).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ftrain import tree
from ftrain.optim.transform import Transform, apply_updates, cast, merge, require_like, select, trainable
from ftrain.tree import Tree


class MasterState(NamedTuple):
    """`inner`: the state of the transform within; `masters`: float32 copies of narrow trained leaves, None for all
    others.
    """

    inner: Any
    masters: Tree


def master_weights(transform: Transform) -> Transform:
    """`transform` on float32 masters; a parameter in bfloat16 or float16 becomes its master, rounded.

    Without masters an update below 1/256 of a bfloat16 parameter rounds to nothing. Gradients are widened before
    `transform` sees them. After the first step masters lead: change them, not the parameters. The price is four bytes
    per narrow parameter; float32 parameters with `ftrain.Precision(compute="bfloat16")` cost two fewer. ValueError at
    an update for gradients that do not have the parameters' structure and shapes. Source: Micikevicius et al., arXiv
    1710.03740.

    >>> import torch
    >>> from ftrain import optim
    >>> tx = optim.master_weights(optim.sgd(1e-3))
    >>> params = {"w": torch.ones(1, dtype=torch.bfloat16)}
    >>> updates, state = tx.update({"w": torch.ones(1, dtype=torch.bfloat16)}, tx.init(params), params)
    >>> optim.apply_updates(params, updates), state.masters
    ({'w': tensor([1.], dtype=torch.bfloat16)}, {'w': tensor([0.9990])})
    """

    def narrow(params: Tree) -> Tree:
        moving = trainable(transform, params)
        return tree.map(lambda p, moves: moves and p.is_floating_point() and p.dtype.itemsize < 4, params, moving)

    def widened(values: Tree, chosen: Tree) -> Tree:
        return tree.map(lambda x, wide: x.detach().to(torch.float32) if wide else x, values, chosen)

    def init(params: Tree) -> MasterState:
        chosen = narrow(params)
        masters = widened(params, chosen)
        return MasterState(transform.init(masters), select(masters, chosen))

    def update(grads: Tree, state: MasterState, params: Tree) -> tuple[Tree, MasterState]:
        require_like(grads, params)
        chosen = narrow(params)
        before = merge(params, chosen, state.masters)
        updates, inner = transform.update(widened(grads, chosen), state.inner, before)
        after = apply_updates(before, updates)

        def difference(p: Tensor, u: Tensor, master: Tensor, wide: bool) -> Tensor:
            # what brings the parameter to its rounded master; its own rounding is far below half a bfloat16 digit
            return cast(cast(master, p.dtype), master.dtype) - cast(p, master.dtype) if wide else u

        told = tree.map(difference, params, updates, after, chosen)
        return told, MasterState(inner, select(after, chosen))

    return Transform(init, update, transform.frozen)
