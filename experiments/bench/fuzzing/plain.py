"""What `ftrain.value_and_grad` and `ftrain.accumulate` mean, in a few lines of plain autograd: the oracle.

Nothing of the trainer's own differentiation is used here, so an error in it does not stand on both sides.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ftrain import tree
from ftrain.kernels.mean import Mean, WeightedSum


@dataclass(frozen=True)
class Micro:
    """A loss over micro-batches, one after the other."""

    loss: Callable
    number: int
    has_aux: bool


def plain_accumulate(loss: Callable, micro_batches: int, *, has_aux: bool = False, stacked: bool) -> Micro:
    """As `ftrain.accumulate` of `stacked` micro-batches."""
    assert stacked
    return Micro(loss, micro_batches, has_aux)


def plain_value_and_grad(compute: torch.dtype | None) -> Callable:
    """As `ftrain.value_and_grad`; losses see float32 leaves in `compute`."""

    def value_and_grad(loss: Callable, argnums: int | tuple[int, ...] = 0, has_aux: bool = False) -> Callable:
        numbers = (argnums,) if isinstance(argnums, int) else argnums

        def wrapped(*args: Any) -> Any:
            flat, structure = tree.flatten([args[n] for n in numbers])
            leaves = [leaf.detach().requires_grad_() for leaf in flat]
            shown = tree.unflatten(structure, [_cast(leaf, compute) for leaf in leaves])
            whole = dict(zip(numbers, shown, strict=True))
            value, aux = _evaluate(loss, [whole.get(i, arg) for i, arg in enumerate(args)], has_aux)
            grads = _gradients(value, leaves)
            found = tree.unflatten(structure, grads)
            out = (value.detach(), tree.map(_detached, aux)) if has_aux else value.detach()
            return out, (found[0] if isinstance(argnums, int) else tuple(found))

        return wrapped

    return value_and_grad


def _cast(leaf: Tensor, compute: torch.dtype | None) -> Tensor:
    return leaf.to(compute) if compute is not None and leaf.dtype == torch.float32 else leaf


def _detached(leaf: Any) -> Any:
    """As `torch.func` returns a leaf of aux: what depends on no parameter is the same tensor."""
    return leaf.detach() if isinstance(leaf, Tensor) and leaf.requires_grad else leaf


def _gradients(value: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    if not value.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    return list(torch.autograd.grad(value, leaves, materialize_grads=True))


def _evaluate(loss: Callable | Micro, args: list[Any], has_aux: bool) -> tuple[Tensor, Any]:
    if not isinstance(loss, Micro):
        out = loss(*args)
        result, aux = out if has_aux else (out, None)
        return _number(result), aux
    *params, batch = args
    outs = [loss.loss(*params, tree.map(lambda x, i=i: x[i], batch)) for i in range(loss.number)]
    results = [out[0] if has_aux else out for out in outs]
    aux = tree.map(lambda *xs: sum(xs[1:], xs[0]), *(out[1] for out in outs)) if has_aux else None
    return _number(_pooled(results)), aux


def _pooled(results: list[Any]) -> Any:
    if isinstance(results[0], Mean):
        return Mean(sum(r.total for r in results), sum(r.count for r in results))
    terms = zip(*(r.terms for r in results), strict=True)
    return WeightedSum(tuple(_pooled(list(term)) for term in terms), results[0].weights)


def _number(result: Any) -> Tensor:
    return result.value() if isinstance(result, Mean | WeightedSum) else result
