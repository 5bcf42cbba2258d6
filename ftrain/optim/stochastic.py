"""Stochastic rounding of bfloat16 parameters (Gupta et al., "Deep learning with limited numerical precision", arXiv
1502.02551).
"""

import zlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ftrain import tree
from ftrain.kernels import random
from ftrain.optim.shards import bits_of_leaf
from ftrain.optim.transform import Transform, device_of, merge, new_count, require_like, select, trainable
from ftrain.tree import Tree

_LOST = 16
"""Bits of a float32 that a bfloat16 lacks."""


class RoundingState(NamedTuple):
    """`inner`: the state of the transform within; `key`: random, int64 `[2]`; `steps`: 0-d int64, updates made so
    far.
    """

    inner: Any
    key: Tensor
    steps: Tensor


def stochastic_rounding(transform: Transform, *, seed: int = 0) -> Transform:
    """`transform` in float32, its result rounded at random to one of the two nearest bfloat16 numbers.

    Each is taken with the probability that makes the mean the float32 value: updates too small for bfloat16 move a
    parameter now and then, and none is lost on average. Parameters keep no float32 master (`master_weights`, which is
    exact and costs four bytes each); what is random is of the size of the rounding.

    `seed`: numbers depend on it, the count of updates, the leaf's path and the index in its array alone: they are the
    same on every mesh. Leaves that are not bfloat16, or are frozen, are passed through as they are. ValueError at an
    update for gradients that do not have the parameters' structure and shapes. Source: Gupta et al., arXiv 1502.02551.

    >>> import torch
    >>> from ftrain import optim
    >>> tx = optim.stochastic_rounding(optim.sgd(1e-3))
    >>> params = grads = {"w": torch.ones(1000, dtype=torch.bfloat16)}
    >>> updates, state = tx.update(grads, tx.init(params), params)
    >>> after = optim.apply_updates(params, updates)["w"]
    >>> len(after.unique()), abs(float(after.float().mean()) - 0.999) < 5e-4
    (2, True)
    """

    def narrow(params: Tree) -> Tree:
        return tree.map(lambda p, moves: moves and p.dtype == torch.bfloat16, params, trainable(transform, params))

    def widened(values: Tree, chosen: Tree) -> Tree:
        return tree.map(lambda x, wide: x.detach().to(torch.float32) if wide else x, values, chosen)

    def init(params: Tree) -> RoundingState:
        inner = transform.init(widened(params, narrow(params)))
        return RoundingState(inner, random.key(seed, device=device_of(params)), new_count(params))

    def update(grads: Tree, state: RoundingState, params: Tree) -> tuple[Tree, RoundingState]:
        require_like(grads, params)
        chosen = narrow(params)
        before = widened(params, chosen)
        updates, inner = transform.update(widened(grads, chosen), state.inner, before)
        drawn = random.fold_in(state.key, state.steps)

        def rounded(path: str, p: Tensor, u: Tensor) -> Tensor:
            key = random.fold_in(drawn, zlib.crc32(path.encode()))
            return round_at_random(p + u, bits_of_leaf(key, p)) - p

        before_narrow, narrow_updates = select(before, chosen), select(updates, chosen)
        moved = [
            rounded(*leaf)
            for leaf in zip(
                tree.paths(before_narrow), tree.leaves(before_narrow), tree.leaves(narrow_updates), strict=True
            )
        ]
        told = merge(updates, chosen, tree.unflatten(tree.flatten(before_narrow)[1], moved))
        return told, RoundingState(inner, state.key, state.steps + 1)

    return Transform(init, update, transform.frozen)


def round_at_random(x: Tensor, word: Tensor) -> Tensor:
    """Float32 numbers that bfloat16 can hold: `x` rounded down or up in size by a random 32-bit `word` each,
    elementwise.

    What bfloat16 can hold already stays as it is, and so does what is not finite. The mean over all words is `x`.
    `x`: float32 of any shape; `word`: int64 of its shape, as `bits_of_leaf` draws them.

    >>> import torch
    >>> from ftrain.optim.stochastic import round_at_random
    >>> round_at_random(torch.full((2,), 1 + 2**-9), torch.tensor([0, 2**16 - 1]))  # bfloat16 has 1 and 1 + 2**-7
    tensor([1.0000, 1.0078])
    """
    kept = (x.view(torch.int32) + (word & ((1 << _LOST) - 1)).to(torch.int32)) & -(1 << _LOST)
    return torch.where(x.isfinite(), kept.view(torch.float32), x)
