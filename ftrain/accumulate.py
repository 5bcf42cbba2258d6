"""Gradients over micro-batches that equal those of one big batch, from a graph that does not grow with their number.

A mean of means is wrong when counts differ. So the counts of all micro-batches are summed first: a loop over the
counting part of the loss alone, which after dead-code elimination reads labels and computes nothing else. Then a second
loop differentiates each micro-batch's totals, weighed by the whole batch's counts, and adds up.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ftrain import tree
from ftrain.grad import differentiated
from ftrain.loop import loop, zeros_like_all
from ftrain.parameter_view import views_of
from ftrain.private import shapes_of_result
from kernels.mean import Mean, WeightedSum, sum_over_batch


def accumulate(loss_fn: Callable, micro_batches: int, *, has_aux: bool = False) -> "Accumulated":
    """`loss_fn(params, batch)` over `micro_batches` parts of a batch whose leaves have that number as first dim.

    Give the result to `grad` or `value_and_grad` (with the same `has_aux`) in place of `loss_fn`. The loss must be a
    `Mean` or a `WeightedSum`, whose counts do not depend on the parameters. Leaves of `aux` are summed over the
    micro-batches, so return sums and counts (`Mean`s) there.
    """
    if micro_batches < 1:
        raise ValueError(f"accumulate: micro_batches must be at least 1, not {micro_batches}")
    return Accumulated(loss_fn, micro_batches, has_aux)


@dataclass(frozen=True)
class Accumulated:
    """A loss over micro-batches; see `accumulate`."""

    loss_fn: Callable
    micro_batches: int
    has_aux: bool

    def __call__(self, params: Any, batch: Any) -> Any:
        """The loss over all micro-batches, without gradients."""
        leaves, params_tree = tree.flatten(params)
        params = tree.unflatten(params_tree, [v(x) for v, x in zip(views_of(leaves), leaves, strict=True)])
        xs, batch_tree = self._leaves(batch)

        def body(*flat: Tensor) -> list[Tensor]:
            loss, aux = self._call(params, tree.unflatten(batch_tree, list(flat[-len(xs) :])))
            new = [*_totals(loss), *_counts(loss), *tree.flatten(aux)[0]]
            return [c + x for c, x in zip(flat[: len(new)], new, strict=True)]

        loss, aux = self._shapes(params, xs, batch_tree)
        start = zeros_like_all([*_totals(loss), *_totals(loss), *tree.flatten(aux)[0]])
        sums = loop(body, self.micro_batches, carry=start, xs=xs, consts=[])
        n = len(_totals(loss))
        total = _rebuild(loss, sums[:n], sums[n : 2 * n])
        return (total, tree.unflatten(tree.flatten(aux)[1], sums[2 * n :])) if self.has_aux else total

    def value_and_grad(
        self, args: tuple, kwargs: dict, numbers: tuple[int, ...], leaves: list[Tensor], treedef: Any, has_aux: bool
    ) -> tuple[Tensor, Any, list[Tensor]]:
        """Value, aux and flat gradients with respect to the parameters; called by `ftrain.value_and_grad`."""
        if numbers != (0,) or len(args) != 2 or kwargs or has_aux != self.has_aux:
            raise ValueError(
                "an accumulated loss is called as loss(params, batch), differentiated in its first argument, and with "
                f"the has_aux it was made with ({self.has_aux})"
            )
        xs, batch_tree = self._leaves(args[1])
        views = views_of(leaves)

        def loss_of(params: list[Tensor], batch: list[Tensor]) -> tuple[Any, Any]:
            (shown,) = tree.unflatten(treedef, [v(x) for v, x in zip(views, params, strict=True)])
            return self._call(shown, tree.unflatten(batch_tree, batch))

        loss, aux = shapes_of_result(lambda: loss_of(leaves, [x[0] for x in xs]))
        counts = self._sum_counts(loss_of, loss, leaves, xs)
        return self._sum_gradients(loss_of, (loss, aux), counts, leaves, xs)

    def _sum_counts(self, loss_of: Callable, loss: Any, leaves: list[Tensor], xs: list[Tensor]) -> list[Tensor]:
        start = zeros_like_all(_totals(loss))  # counts are cast to the dtype of totals
        k, m = len(start), len(xs)

        def body(*flat: Tensor) -> list[Tensor]:
            counted, _ = loss_of(list(flat[k + m :]), list(flat[k : k + m]))
            return [a + b.detach() for a, b in zip(flat[:k], _counts(counted), strict=True)]

        sums = loop(body, self.micro_batches, carry=start, xs=xs, consts=leaves)
        return list(sum_over_batch(torch.stack(sums)).unbind())

    def _sum_gradients(
        self, loss_of: Callable, shapes: tuple[Any, Any], counts: list[Tensor], leaves: list[Tensor], xs: list[Tensor]
    ) -> tuple[Tensor, Any, list[Tensor]]:
        aux_leaves, aux_tree = tree.flatten(shapes[1])
        start = zeros_like_all([*leaves, *_totals(shapes[0])[:1], *aux_leaves])
        n, k, m = len(leaves), len(start), len(xs)

        def body(*flat: Tensor) -> list[Tensor]:
            batch, consts = list(flat[k : k + m]), flat[k + m :]
            whole = list(consts[n:])

            def weighed(*params: Tensor) -> tuple[Tensor, list[Tensor]]:
                loss, aux = loss_of(list(params), batch)
                return _weigh(loss, whole), tree.flatten(aux)[0]

            value, aux, grads = differentiated(weighed, list(consts[:n]))
            return [a + b for a, b in zip(flat[:k], [*grads, value, *aux], strict=True)]

        sums = loop(body, self.micro_batches, carry=start, xs=xs, consts=[*leaves, *counts])
        return sum_over_batch(sums[n]), tree.unflatten(aux_tree, sums[n + 1 :]), sums[:n]

    def _call(self, params: Any, batch: Any) -> tuple[Any, Any]:
        out = self.loss_fn(params, batch)
        return out if self.has_aux else (out, None)

    def _shapes(self, params: Any, xs: list[Tensor], batch_tree: Any) -> tuple[Any, Any]:
        return shapes_of_result(lambda: self._call(params, tree.unflatten(batch_tree, [x[0] for x in xs])))

    def _leaves(self, batch: Any) -> tuple[list[Tensor], Any]:
        for path, leaf in zip(tree.paths(batch), tree.flatten(batch)[0], strict=True):
            if not isinstance(leaf, Tensor) or leaf.dim() == 0 or leaf.shape[0] != self.micro_batches:
                shape = tuple(leaf.shape) if isinstance(leaf, Tensor) else type(leaf).__name__
                raise ValueError(
                    f"accumulate over {self.micro_batches} micro-batches: batch leaf {path!r} has shape {shape}; "
                    f"its first dim must be {self.micro_batches}"
                )
        return tree.flatten(batch)


def _terms(loss: Any) -> WeightedSum:
    if isinstance(loss, Mean):
        return WeightedSum((loss,), (1.0,))
    if isinstance(loss, WeightedSum):
        return loss
    raise ValueError(f"an accumulated loss must be a Mean or a WeightedSum, not {type(loss).__name__}")


def _totals(loss: Any) -> list[Tensor]:
    return [t.total for t in _terms(loss).terms]


def _counts(loss: Any) -> list[Tensor]:
    return [t.count.to(t.total.dtype) for t in _terms(loss).terms]


def _weigh(loss: Any, counts: list[Tensor]) -> Tensor:
    return _terms(loss).combine(torch.stack(_totals(loss)), torch.stack(counts))


def _rebuild(loss: Any, totals: list[Tensor], counts: list[Tensor]) -> Any:
    terms = tuple(Mean(t, c) for t, c in zip(totals, counts, strict=True))
    return terms[0] if isinstance(loss, Mean) else WeightedSum(terms, loss.weights)
