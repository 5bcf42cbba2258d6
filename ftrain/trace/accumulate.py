"""Gradients over micro-batches that equal those of one big batch, from a graph that does not grow with their number.

A mean of means is wrong when counts differ. So the counts of all micro-batches are summed first: a loop over the
counting part of the loss alone, which after dead-code elimination reads labels and computes nothing else. Then a second
loop differentiates each micro-batch's totals, weighed by the whole batch's counts, and adds up.

A loss may itself sum over the batch (`ftrain.kernels.mean.sum_over_batch`, as `ftrain.modules.moe.aux_loss` does for
the load of experts): what it gets is the sum over all micro-batches, made first (`trace.batch_sums`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ftrain import tree
from ftrain.graph.loop import loop, zeros_like_all
from ftrain.graph.torch_private import shapes_of_result
from ftrain.kernels.mean import Mean, WeightedSum, count_of, sum_over_batch
from ftrain.sharding.batch import BatchRule
from ftrain.trace.batch_sums import answering, require_constant, whole_sums
from ftrain.trace.grad import differentiated
from ftrain.trace.micro_batches import MicroBatches, divide, drawing_as_one_batch, stacked
from ftrain.trace.parameter_view import compute_views


def accumulate(
    loss_fn: Callable,
    micro_batches: int,
    *,
    has_aux: bool = False,
    batch: Mapping[str, BatchRule] = MappingProxyType({}),
    stacked: bool = False,
) -> "Accumulated":
    """`loss_fn(params, batch)` over `micro_batches` parts of the batch, one after the other; called as `loss_fn` is.

    Give the result to `grad` or `value_and_grad` (with the same `has_aux`) in place of `loss_fn`, and the same batch:
    it is divided here. A batch of rows (images and labels) is divided along dim 0; a batch of tokens is one pack of
    documents after the other, `micro_batches` of them, or on a mesh so many for each data rank
    (`ftrain.modules.mesh_packing.pack_for_mesh(packs=...)`, `ftrain.modules.packs.join_packs`). So one batch, one plan
    and one `share` serve training and evaluation.

    `batch`: how leaves are divided, by globs over their paths, as in `Plan(batch=...)`, whose rules hold where these
    say nothing (`ftrain.modules.mesh_packing.BATCH` are those of packs with media). Without any, 0-d leaves and what is
    called `key` are the same for each micro-batch, all else is divided along dim 0. ValueError names a leaf that does
    not divide, and, when the step runs, one in which a document would be cut (on CUDA an assertion on the device).
    `stacked`: leaves of the batch have a leading dim of micro-batches already (`ftrain.modules.packs.stack_packs`).

    The loss must be a `Mean` or a `WeightedSum`, whose counts do not depend on the parameters. Leaves of `aux` are
    summed over the micro-batches, so return sums and counts (`Mean`s) there.

    Value and gradient are those of one big batch for every loss that is a sum over rows divided by counts, also where a
    constant in it is itself a sum over the batch taken with `sum_over_batch`. Such sums cost a further loop over as
    much of the loss as they need: for the balance loss of experts a forward pass of the whole stack (about a third of
    the step; a balance by "bias" costs none). One whose terms depend on the parameters is a ValueError. Whatever else
    looks across the batch without `sum_over_batch` (batch norm, a contrast of rows) sees one micro-batch.

    Random numbers from a key: `ftrain.kernels.pack.draw_over_batch` gives every micro-batch those that its rows have in
    the whole batch; what is drawn from the key alone is the same in each, as it is on each rank of a mesh. Numbers of
    torch's generator are those of a plain loop over the micro-batches; in a jitted step counts and sums over the batch
    must not depend on them (a ValueError).
    """
    if micro_batches < 1:
        raise ValueError(f"accumulate: micro_batches must be at least 1, not {micro_batches}")
    if stacked and batch:
        raise ValueError("accumulate: stacked micro-batches are divided already; leave batch=... out")
    return Accumulated(loss_fn, micro_batches, has_aux, dict(batch), stacked)


@dataclass(frozen=True)
class Accumulated:
    """A loss over micro-batches; see `accumulate`."""

    loss_fn: Callable
    micro_batches: int
    has_aux: bool
    batch: Mapping[str, BatchRule]
    stacked: bool

    def __call__(self, params: Any, batch: Any) -> Any:
        """The loss over all micro-batches, without gradients."""
        leaves, params_tree = tree.flatten(params)
        leaves = [v(x) for v, x in zip(compute_views(leaves), leaves, strict=True)]
        call = self._over(batch, leaves, lambda leaves: tree.unflatten(params_tree, leaves))
        (loss, aux), xs, whole = call.shapes, call.xs, call.sums()
        counted = shapes_of_result(lambda: _counts(loss))
        start = zeros_like_all([*_totals(loss), *counted, *tree.flatten(aux)[0]])
        k, m, n = len(start), len(xs), len(_totals(loss))

        def body(*flat: Tensor) -> list[Tensor]:
            consts = list(flat[k + m :])
            with answering(dict(enumerate(consts[len(leaves) :]))):
                loss, aux = call.loss_of(consts[: len(leaves)], list(flat[k : k + m]))
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
        views = compute_views(leaves)

        def shown(params: list[Tensor]) -> Any:
            (found,) = tree.unflatten(treedef, [v(x) for v, x in zip(views, params, strict=True)])
            return found

        call = self._over(args[1], leaves, shown)
        whole = call.sums()
        return _sum_gradients(call, _sum_counts(call, whole), whole)

    def _over(self, batch: Any, leaves: list[Tensor], params_of: Callable[[list[Tensor]], Any]) -> "_Call":
        """The loss on this batch; one look at it, for shapes, tells what it needs."""
        parts = stacked(batch, self.micro_batches) if self.stacked else divide(batch, self.micro_batches, self.batch)
        call = _Call(self, parts, params_of, leaves)
        return call.looked_at()

    def _call(self, params: Any, batch: Any) -> tuple[Any, Any]:
        out = self.loss_fn(params, batch)
        return out if self.has_aux else (out, None)


@dataclass(frozen=True)
class _Call:
    """An accumulated loss with the batch of a call. `xs`: what each micro-batch gets an element of: the leaves of the
    batch, and its number where random numbers are drawn for rows; `shapes`: of the loss and of aux; `asked`: of the
    sums over the batch.
    """

    loss: Accumulated
    parts: MicroBatches
    params_of: Callable[[list[Tensor]], Any]
    leaves: list[Tensor]
    numbered: bool = False
    shapes: tuple[Any, Any] = (None, None)
    asked: tuple[Tensor, ...] = ()

    @property
    def count(self) -> int:
        return self.loss.micro_batches

    @cached_property
    def xs(self) -> list[Tensor]:
        first = self.parts.leaves
        return [*first, torch.arange(self.count, device=first[0].device)] if self.numbered else first

    def loss_of(self, leaves: list[Tensor], xs: list[Tensor]) -> tuple[Any, Any]:
        """Loss and aux, from flat parameters and an element of each of `xs`."""
        return self._drawing(leaves, xs)[0]

    def _drawing(self, leaves: list[Tensor], xs: list[Tensor]) -> tuple[tuple[Any, Any], bool]:
        batch, number = xs[: len(self.parts.leaves)], xs[len(self.parts.leaves) :]
        with drawing_as_one_batch(number[0] if number else None, self.count) as drawn:
            found = self.loss._call(self.params_of(leaves), self.parts.put(batch))
        return found, bool(drawn)

    def looked_at(self) -> "_Call":
        """The same with what a run on the first micro-batch's shapes tells."""

        def look() -> tuple[Any, bool, list[Tensor]]:
            with answering({}) as questions:
                shapes, drawn = self._drawing(self.leaves, [x[0] for x in self.parts.leaves])
            return shapes, drawn, questions.asked

        shapes, drawn, asked = shapes_of_result(look)
        return replace(self, numbered=drawn, shapes=shapes, asked=tuple(asked))

    def sums(self) -> list[Tensor]:
        """What the loss sums over the whole batch."""
        return whole_sums(self.loss_of, self.count, self.leaves, self.xs, self.asked)


def _sum_counts(call: _Call, whole: list[Tensor]) -> list[Tensor]:
    xs, leaves = call.xs, call.leaves
    start = zeros_like_all(shapes_of_result(lambda: _counts(call.shapes[0])))
    k, m, n = len(start), len(xs), len(leaves)

    def body(*flat: Tensor) -> list[Tensor]:
        batch, consts = list(flat[k : k + m]), flat[k + m :]
        with answering(dict(enumerate(consts[n:]))):
            counted, _ = call.loss_of(list(consts[:n]), batch)
        return [a + b.detach() for a, b in zip(flat[:k], _counts(counted), strict=True)]

    sums = loop(body, call.count, carry=start, xs=xs, consts=[*leaves, *whole], preview=True)
    return list(sum_over_batch(torch.stack(sums)).unbind())


def _sum_gradients(call: _Call, counts: list[Tensor], whole: list[Tensor]) -> tuple[Tensor, Any, list[Tensor]]:
    xs, leaves = call.xs, call.leaves
    aux_leaves, aux_tree = tree.flatten(call.shapes[1])
    value = shapes_of_result(lambda: _weigh(call.shapes[0], counts))
    start = zeros_like_all([*leaves, value, *aux_leaves])
    n, k, m, c = len(leaves), len(start), len(xs), len(counts)

    def body(*flat: Tensor) -> list[Tensor]:
        batch, consts = list(flat[k : k + m]), flat[k + m :]
        all_counts, all_sums = list(consts[n : n + c]), dict(enumerate(consts[n + c :]))

        def weighed(*params: Tensor) -> tuple[Tensor, list[Tensor]]:
            with answering(all_sums) as questions:
                loss, aux = call.loss_of(list(params), batch)
            require_constant(questions, len(all_sums))
            return _weigh(loss, all_counts), tree.flatten(aux)[0]

        value, aux, grads = differentiated(weighed, list(consts[:n]))
        return [a + b for a, b in zip(flat[:k], [*grads, value, *aux], strict=True)]

    sums = loop(body, call.count, carry=start, xs=xs, consts=[*leaves, *counts, *whole])
    return sum_over_batch(sums[n]), tree.unflatten(aux_tree, sums[n + 1 :]), sums[:n]


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
