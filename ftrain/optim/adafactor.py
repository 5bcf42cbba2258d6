"""Adafactor: second moments kept as a row and a column instead of a matrix (Shazeer and Stern, arXiv 1804.04235).

As `torch.optim.Adafactor`: the step is relative to the size of the parameter, at most `learning_rate`, and there is no
first moment. A leaf of two or more dims is factored over its last two; leading dims are a batch of matrices.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ftrain import tree
from ftrain.optim.shards import mean_over_leaf
from ftrain.optim.transform import (
    LearningRate,
    Transform,
    cast,
    new_count,
    rate_at,
    require_like,
    require_range,
    require_rate,
    state_dtype,
    warn_of_rounding,
)
from ftrain.tree import Tree


class AdafactorState(NamedTuple):
    """The state of `adafactor`; each tree has None where it does not apply.

    - `steps`: 0-d int64, updates made so far.
    - `row`, `column`: mean squared gradients `[..., N, 1]` and `[..., 1, M]` of leaves with two or more dims.
    - `whole`: mean squared gradients of all other leaves, in their shapes.
    """

    steps: Tensor
    row: Tree
    column: Tree
    whole: Tree


def adafactor(
    learning_rate: LearningRate = 1e-2,
    *,
    beta2_decay: float = -0.8,
    eps: tuple[float | None, float] = (None, 1e-3),
    clip: float = 1.0,
    weight_decay: float = 0.0,
) -> Transform:
    """Adafactor: a step relative to the size of each parameter, with factored second moments.

    `p <- p - max(eps[1], rms(p)) * min(rate, 1/sqrt(t)) * u / max(1, rms(u) / clip)`, `u = g / sqrt(v)`, where for a
    matrix `v = row column / mean(row)` and t counts updates from 1.

    - `learning_rate`: the largest relative step; a number >= 0, a 0-d floating tensor or a schedule.
    - `beta2_decay`: the average v forgets with `1 - t^beta2_decay`; at most 0.
    - `eps`: `eps[0]` bounds sqrt(v) from below (None: the dtype's epsilon), `eps[1]` rms(p); both >= 0.
    - `clip`: the largest root mean square of u, at least 1.
    - `weight_decay`: decoupled, `p <- p - rate * weight_decay * p`; >= 0.

    Averages have the leaf's dtype, but at least float32. Equal to `torch.optim.Adafactor`. ValueError for values out of
    range, and at an update for gradients that do not have the parameters' structure and shapes. Source: Shazeer and
    Stern, arXiv 1804.04235.

    >>> import torch
    >>> from ftrain import optim
    >>> params = {"w": torch.ones(4, 3)}
    >>> tx = optim.adafactor(0.1)
    >>> state = tx.init(params)
    >>> state.row["w"].shape, state.column["w"].shape
    (torch.Size([4, 1]), torch.Size([1, 3]))
    >>> updates, state = tx.update({"w": torch.ones(4, 3)}, state, params)
    >>> round(float(updates["w"][0, 0]), 3)
    -0.1
    """
    require_rate(learning_rate)
    require_range("clip", clip, 1.0)
    require_range("weight_decay", weight_decay, 0.0)
    require_range("eps[0]", eps[0] or 0.0, 0.0)
    require_range("eps[1]", eps[1], 0.0)
    if beta2_decay > 0:
        raise ValueError(f"beta2_decay must be <= 0, not {beta2_decay}")

    def init(params: Tree) -> AdafactorState:
        warn_of_rounding(params, "adafactor")

        def moments(p: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
            if p.ndim < 2:
                return None, None, torch.zeros_like(p, dtype=state_dtype(p.dtype))
            zero, last = torch.zeros_like(p, dtype=state_dtype(p.dtype)), p.ndim - 1
            return mean_over_leaf(zero, [last], p), mean_over_leaf(zero, [last - 1], p), None

        return AdafactorState(new_count(params), *tree.map_many(moments, 3, params))

    def update(grads: Tree, state: AdafactorState, params: Tree) -> tuple[Tree, AdafactorState]:
        require_like(grads, params)
        count = state.steps + 1
        steps = count.to(torch.float64)
        forget, rate = steps**beta2_decay, rate_at(learning_rate, state.steps)
        keep = 1 - rate * weight_decay
        relative = (steps**-0.5).clamp(max=rate)

        def leaf(
            p: Tensor, g: Tensor, row: Tensor | None, column: Tensor | None, whole: Tensor | None
        ) -> tuple[Tensor | None, ...]:
            floor = torch.finfo(p.dtype).eps if eps[0] is None else eps[0]
            moments, u = _precondition(p, g, row, column, whole, forget, floor)
            size, over = _rms(p, p).clamp(min=eps[1]), (_rms(u, p) / clip).clamp(min=1.0)
            factor = cast(-relative * size / over, u.dtype)
            if weight_decay == 0.0:
                return u * factor, *moments
            # decayed and stepped as torch does and then told as a difference: its rounding of p * keep adds up
            p = cast(p, u.dtype)
            return torch.addcmul(p * keep, u, factor) - p, *moments

        updates, *moments = _map_factored(leaf, params, grads, state)
        return updates, AdafactorState(count, *moments)

    return Transform(init, update)


def _precondition(
    p: Tensor, g: Tensor, row: Tensor | None, column: Tensor | None, whole: Tensor | None, forget: Tensor, floor: float
) -> tuple[tuple[Tensor | None, Tensor | None, Tensor | None], Tensor]:
    """The moments after this gradient, and the gradient over their root."""
    g = cast(g, state_dtype(g.dtype))
    square = g * g
    if row is None or column is None:
        assert whole is not None
        whole = torch.lerp(whole, square, cast(forget, whole.dtype))
        return (None, None, whole), g * whole.clamp(min=floor**2).rsqrt()
    last = p.ndim - 1
    row = torch.lerp(row, mean_over_leaf(square, [last], p), cast(forget, row.dtype))
    column = torch.lerp(column, mean_over_leaf(square, [last - 1], p), cast(forget, column.dtype))
    estimate = row / mean_over_leaf(row, [last - 1], p).clamp(min=floor) * column
    return (row, column, None), g * estimate.clamp(min=floor**2).rsqrt()


def _map_factored(
    leaf: Callable[..., tuple[Tensor | None, ...]], params: Tree, grads: Tree, state: AdafactorState
) -> tuple[Tree, ...]:
    """`leaf(p, g, row, column, whole)` at every parameter, with None for the moments it does not have."""
    factored = tree.map(lambda p: p if p.ndim >= 2 else None, params)
    plain = tree.map(lambda p: p if p.ndim < 2 else None, params)
    for name, part, expected in (("row", state.row, factored), ("column", state.column, factored)):
        tree.require_same(expected, part, names=("the factored parameters", f"the state's {name}"))
    tree.require_same(plain, state.whole, names=("the parameters of less than two dims", "the state's whole"))
    rows, columns, wholes = (iter(tree.leaves(part)) for part in (state.row, state.column, state.whole))
    values, treedef = tree.flatten(params)
    results = []
    for p, g in zip(values, tree.leaves(grads), strict=True):
        moments = (next(rows), next(columns), None) if p.ndim >= 2 else (None, None, next(wholes))
        results.append(leaf(p, g, *moments))
    return tuple(tree.unflatten(treedef, [result[i] for result in results]) for i in range(4))


def _rms(x: Tensor, leaf: Tensor) -> Tensor:
    """The root of the mean square of the whole array, 0-d; zero of an empty tensor."""
    if x.numel() == 0:
        return x.new_zeros(())
    return mean_over_leaf(x * x, range(x.ndim), leaf).reshape(()).sqrt()
