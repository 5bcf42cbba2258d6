"""Gradients over micro-batches that equal those of one big batch, from a graph that does not grow with their number.

A mean of means is wrong when counts differ. So the counts of all micro-batches are summed first: a loop over the
counting part of the loss alone, which after dead-code elimination reads labels and computes nothing else. Then a second
loop differentiates each micro-batch's totals, weighed by the whole batch's counts, and adds up.

A loss may itself sum over the batch (`ftrain.kernels.mean.sum_over_batch`, as `ftrain.modules.moe.aux_loss` does for
the load of experts): what it gets is the sum over all micro-batches, made first (`trace.batch_sums`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ftrain import tree
from ftrain.graph.loop import loop, zeros_like_all
from ftrain.graph.torch_private import shapes_of_result
from ftrain.kernels.mean import Mean, WeightedSum, count_of, sum_over_batch
from ftrain.trace.batch_sums import answering, require_constant, whole_sums
from ftrain.trace.grad import differentiated
from ftrain.trace.parameter_view import compute_views


def accumulate(loss_fn: Callable, micro_batches: int, *, has_aux: bool = False) -> "Accumulated":
    """`loss_fn(params, batch)` over `micro_batches` parts of a batch whose leaves have that number as first dim.

    Give the result to `grad` or `value_and_grad` (with the same `has_aux`) in place of `loss_fn`. The loss must be a
    `Mean` or a `WeightedSum`, whose counts do not depend on the parameters. Leaves of `aux` are summed over the
    micro-batches, so return sums and counts (`Mean`s) there.

    Value and gradient are those of one big batch for every loss that is a sum over rows divided by counts, also where a
    constant in it is itself a sum over the batch taken with `sum_over_batch`. Such sums cost a further loop over as
    much of the loss as they need: for the balance loss of experts a forward pass of the whole stack (about a third of
    the step; a balance by "bias" costs none). One whose terms depend on the parameters is a ValueError. Whatever else
    looks across the batch without `sum_over_batch` (batch norm, a contrast of rows) sees one micro-batch.

    Random numbers of torch's generator are those of a plain loop over the micro-batches. In a jitted step counts and
    sums over the batch must not depend on them (a ValueError).
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
        leaves = [v(x) for v, x in zip(compute_views(leaves), leaves, strict=True)]
        xs, batch_tree = self._leaves(batch)

        def loss_of(leaves: list[Tensor], batch: list[Tensor]) -> tuple[Any, Any]:
            return self._call(tree.unflatten(params_tree, leaves), tree.unflatten(batch_tree, batch))

        whole = whole_sums(loss_of, self.micro_batches, leaves, xs)
        loss, aux = shapes_of_result(lambda: loss_of(leaves, [x[0] for x in xs]))
        counted = shapes_of_result(lambda: _counts(loss))
        start = zeros_like_all([*_totals(loss), *counted, *tree.flatten(aux)[0]])
        k, m, n = len(start), len(xs), len(_totals(loss))

        def body(*flat: Tensor) -> list[Tensor]:
            consts = list(flat[k + m :])
            with answering(dict(enumerate(consts[len(leaves) :]))):
                loss, aux = loss_of(consts[: len(leaves)], list(flat[k : k + m]))
            new = [*_totals(loss), *_counts(loss), *tree.flatten(aux)[0]]
            return [c + x for c, x in zip(flat[:k], new, strict=True)]

        sums = loop(body, self.micro_batches, carry=start, xs=xs, consts=[*leaves, *whole])
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
        views = compute_views(leaves)

        def loss_of(params: list[Tensor], batch: list[Tensor]) -> tuple[Any, Any]:
            (shown,) = tree.unflatten(treedef, [v(x) for v, x in zip(views, params, strict=True)])
            return self._call(shown, tree.unflatten(batch_tree, batch))

        whole = whole_sums(loss_of, self.micro_batches, leaves, xs)
        loss, aux = shapes_of_result(lambda: loss_of(leaves, [x[0] for x in xs]))
        counts = self._sum_counts(loss_of, loss, leaves, xs, whole)
        return self._sum_gradients(loss_of, (loss, aux), counts, leaves, xs, whole)

    def _sum_counts(
        self, loss_of: Callable, loss: Any, leaves: list[Tensor], xs: list[Tensor], whole: list[Tensor]
    ) -> list[Tensor]:
        start = zeros_like_all(shapes_of_result(lambda: _counts(loss)))
        k, m, n = len(start), len(xs), len(leaves)

        def body(*flat: Tensor) -> list[Tensor]:
            batch, consts = list(flat[k : k + m]), flat[k + m :]
            with answering(dict(enumerate(consts[n:]))):
                counted, _ = loss_of(list(consts[:n]), batch)
            return [a + b.detach() for a, b in zip(flat[:k], _counts(counted), strict=True)]

        sums = loop(body, self.micro_batches, carry=start, xs=xs, consts=[*leaves, *whole], preview=True)
        return list(sum_over_batch(torch.stack(sums)).unbind())

    def _sum_gradients(
        self,
        loss_of: Callable,
        shapes: tuple[Any, Any],
        counts: list[Tensor],
        leaves: list[Tensor],
        xs: list[Tensor],
        whole: list[Tensor],
    ) -> tuple[Tensor, Any, list[Tensor]]:
        aux_leaves, aux_tree = tree.flatten(shapes[1])
        value = shapes_of_result(lambda: _weigh(shapes[0], counts))
        start = zeros_like_all([*leaves, value, *aux_leaves])
        n, k, m, c = len(leaves), len(start), len(xs), len(counts)

        def body(*flat: Tensor) -> list[Tensor]:
            batch, consts = list(flat[k : k + m]), flat[k + m :]
            all_counts, all_sums = list(consts[n : n + c]), dict(enumerate(consts[n + c :]))

            def weighed(*params: Tensor) -> tuple[Tensor, list[Tensor]]:
                with answering(all_sums) as questions:
                    loss, aux = loss_of(list(params), batch)
                require_constant(questions, len(all_sums))
                return _weigh(loss, all_counts), tree.flatten(aux)[0]

            value, aux, grads = differentiated(weighed, list(consts[:n]))
            return [a + b for a, b in zip(flat[:k], [*grads, value, *aux], strict=True)]

        sums = loop(body, self.micro_batches, carry=start, xs=xs, consts=[*leaves, *counts, *whole])
        return sum_over_batch(sums[n]), tree.unflatten(aux_tree, sums[n + 1 :]), sums[:n]

    def _call(self, params: Any, batch: Any) -> tuple[Any, Any]:
        out = self.loss_fn(params, batch)
        return out if self.has_aux else (out, None)

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
    return [count_of(t) for t in _terms(loss).terms]


def _weigh(loss: Any, counts: list[Tensor]) -> Tensor:
    terms = _terms(loss)
    return terms.combine(terms.totals(), torch.stack(counts))


def _rebuild(loss: Any, totals: list[Tensor], counts: list[Tensor]) -> Any:
    terms = tuple(Mean(t, c) for t, c in zip(totals, counts, strict=True))
    return terms[0] if isinstance(loss, Mean) else WeightedSum(terms, loss.weights)
