"""Gradient accumulation: gradients over micro-batches that equal those of the whole batch.

A mean of means is wrong if counts differ. So a first loop sums the counts of all micro-batches. After dead-code
elimination it reads only labels. A second loop differentiates the totals of each micro-batch, weighted by the counts of
the whole batch, and adds the gradients up. Both loops are single nodes of the graph, whose size does not depend on the
number of micro-batches.

A loss may itself sum over the batch (`ftrain.kernels.mean.sum_over_batch`, as `ftrain.modules.moe.aux_loss` does for
the load of experts). `ftrain.trace.batch_sums` computes these sums over all micro-batches before the two loops.
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
from ftrain.trace.batch_sums import require_constant, supplying_sums, whole_sums
from ftrain.trace.grad import differentiated
from ftrain.trace.micro_batches import MicroBatches, divide, drawing_as_one_batch, stacked
from ftrain.trace.parameter_view import compute_views


def accumulate(
    loss_fn: Callable[..., Any],
    micro_batches: int,
    *,
    has_aux: bool = False,
    batch: Mapping[str, BatchRule] = MappingProxyType({}),
    stacked: bool = False,
) -> "Accumulated":
    """Evaluate `loss_fn(params, batch)` over `micro_batches` parts of the batch, one after the other.

    Pass the result, which is called as `loss_fn` is, to `grad` or `value_and_grad` in place of `loss_fn`, with the same
    `has_aux`. The batch stays the same, because it is divided here.

    - `loss_fn`: returns a `Mean` or a `WeightedSum` whose counts do not depend on the parameters; with `has_aux`, a
      pair of it and a tree of tensors `aux`. Leaves of `aux` are summed over the micro-batches, so return sums and
      counts (`Mean`s) there.
    - `micro_batches`: their number, at least 1.
    - `batch`: rules by which leaves are divided, by globs over their paths, as in `Plan(batch=...)`. A leaf without a
      rule follows the plan. Without a plan, 0-d leaves and a leaf `key` are the same for every micro-batch and all
      others are divided along dim 0. `ftrain.modules.mesh_packing.BATCH` are the rules of packs with media.
    - `stacked`: the leaves of the batch have a leading dim of `micro_batches` already (see
      `ftrain.modules.packs.stack_packs`).

    A batch of rows (images and labels) is divided along dim 0. A batch of tokens consists of `micro_batches` packs of
    documents, one after the other; on a mesh, of as many for each data rank
    (`ftrain.modules.mesh_packing.pack_for_mesh(packs=...)`, `ftrain.modules.packs.join_packs`).

    The value and the gradient equal those of the whole batch for every loss that is a sum over rows divided by counts,
    also if it contains constants computed by `sum_over_batch`. Such sums cost another loop over the part of the loss
    that they need: for the balance loss of experts a forward pass of the whole model (about a third of the step; a
    balance by "bias" costs nothing). An op that reads across rows without `sum_over_batch` (batch norm, a contrastive
    loss) sees one micro-batch.

    Random numbers from a key: with `ftrain.kernels.pack.draw_over_batch` every row gets the numbers that it has in the
    whole batch. Numbers drawn from the key alone are the same in every micro-batch, as on every rank of a mesh. Numbers
    of torch's generator are those of a plain loop over the micro-batches.

    ValueError for fewer than 1 micro-batch, and for `stacked` together with `batch`. At a call also for a loss of
    another type, a leaf that does not divide, a sum over the batch that depends on the parameters, and, in a jitted
    step, counts or sums that depend on torch's generator. When the step runs: a document that would be cut in two is a
    ValueError on a CPU, and an assertion on the device on CUDA.

    >>> import torch
    >>> import ftrain
    >>> def loss(params, batch):
    ...     errors = (batch["x"] * params["w"] - batch["y"]).square()
    ...     return ftrain.Mean(errors.sum(), torch.tensor(float(errors.numel())))
    >>> params = {"w": torch.tensor(2.0)}
    >>> batch = {"x": torch.arange(4.0), "y": torch.ones(4)}
    >>> ftrain.value_and_grad(loss)(params, batch)
    (tensor(9.), {'w': tensor(11.)})
    >>> ftrain.value_and_grad(ftrain.accumulate(loss, micro_batches=2))(params, batch)
    (tensor(9.), {'w': tensor(11.)})
    """
    if micro_batches < 1:
        raise ValueError(f"accumulate: micro_batches must be at least 1, not {micro_batches}")
    if stacked and batch:
        raise ValueError("accumulate: stacked micro-batches are divided already; leave batch=... out")
    return Accumulated(loss_fn, micro_batches, has_aux, dict(batch), stacked)


@dataclass(frozen=True)
class Accumulated:
    """A loss over micro-batches, made by `accumulate`, which explains its fields."""

    loss_fn: Callable[..., Any]
    micro_batches: int
    has_aux: bool
    batch: Mapping[str, BatchRule]
    stacked: bool

    def __call__(self, params: Any, batch: Any) -> Any:
        """The loss (a `Mean` or `WeightedSum`; with `has_aux`, a pair with aux) over all micro-batches.

        ValueError as for `accumulate`.
        """
        leaves, params_tree = tree.flatten(params)
        leaves = [v(x) for v, x in zip(compute_views(leaves, tree.paths(params)), leaves, strict=True)]
        call = self._over(batch, leaves, lambda leaves: tree.unflatten(params_tree, leaves))
        (loss, aux), xs, whole = call.shapes, call.xs, call.sums()
        counted = shapes_of_result(lambda: _counts(loss))
        start = zeros_like_all([*_totals(loss), *counted, *tree.flatten(aux)[0]])
        k, m, n = len(start), len(xs), len(_totals(loss))

        def body(*flat: Tensor) -> list[Tensor]:
            consts = list(flat[k + m :])
            with supplying_sums(dict(enumerate(consts[len(leaves) :]))):
                loss, aux = call.loss_of(consts[: len(leaves)], list(flat[k : k + m]))
            new = [*_totals(loss), *_counts(loss), *tree.flatten(aux)[0]]
            return [c + x for c, x in zip(flat[:k], new, strict=True)]

        sums = loop(body, self.micro_batches, carry=start, xs=xs, consts=[*leaves, *whole])
        total = _rebuild(loss, sums[:n], sums[n : 2 * n])
        return (total, tree.unflatten(tree.flatten(aux)[1], sums[2 * n :])) if self.has_aux else total

    def value_and_grad(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        numbers: tuple[int, ...],
        leaves: list[Tensor],
        treedef: Any,
        has_aux: bool,
    ) -> tuple[Tensor, Any, list[Tensor]]:
        """Value (0-d), aux and gradients (one per leaf, of its shape) with respect to the parameters.

        `ftrain.value_and_grad` calls this with the loss's `args` and `kwargs`, the positions of the differentiated
        arguments, their leaves and tree, and its `has_aux`. ValueError if the loss is not called as
        `loss(params, batch)`, is differentiated in another argument, or has another `has_aux`.
        """
        if numbers != (0,) or len(args) != 2 or kwargs or has_aux != self.has_aux:
            raise ValueError(
                "an accumulated loss is called as loss(params, batch), differentiated in its first argument, and with "
                f"the has_aux it was made with ({self.has_aux})"
            )
        views = compute_views(leaves, tree.paths(args[0]))

        def params_of(params: list[Tensor]) -> Any:
            (found,) = tree.unflatten(treedef, [v(x) for v, x in zip(views, params, strict=True)])
            return found

        call = self._over(args[1], leaves, params_of)
        whole = call.sums()
        return _sum_gradients(call, _sum_counts(call, whole), whole)

    def _over(self, batch: Any, leaves: list[Tensor], params_of: Callable[[list[Tensor]], Any]) -> "_Call":
        """The loss on this batch, after one run on fake tensors that finds its shapes and sums."""
        parts = stacked(batch, self.micro_batches) if self.stacked else divide(batch, self.micro_batches, self.batch)
        call = _Call(self, parts, params_of, leaves)
        return call.probed()

    def _call(self, params: Any, batch: Any) -> tuple[Any, Any]:
        out = self.loss_fn(params, batch)
        return out if self.has_aux else (out, None)


@dataclass(frozen=True)
class _Call:
    """An accumulated loss with the batch of a call.

    - `xs`: tensors with a leading dim of micro-batches: the leaves of the batch, and the number of the micro-batch if
      random numbers are drawn by row (`numbered`).
    - `shapes`: fake tensors of the loss and of aux. `requested`: fake tensors of the sums over the batch.
    """

    loss: Accumulated
    parts: MicroBatches
    params_of: Callable[[list[Tensor]], Any]
    leaves: list[Tensor]
    numbered: bool = False
    shapes: tuple[Any, Any] = (None, None)
    requested: tuple[Tensor, ...] = ()

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

    def probed(self) -> "_Call":
        """The same call, with the results of a run on fake tensors of the first micro-batch."""

        def probe() -> tuple[Any, bool, list[Tensor]]:
            with supplying_sums({}) as sums:
                shapes, drawn = self._drawing(self.leaves, [x[0] for x in self.parts.leaves])
            return shapes, drawn, sums.requested

        shapes, drawn, requested = shapes_of_result(probe)
        return replace(self, numbered=drawn, shapes=shapes, requested=tuple(requested))

    def sums(self) -> list[Tensor]:
        """The sums over the whole batch that the loss requests."""
        return whole_sums(self.loss_of, self.count, self.leaves, self.xs, self.requested)


def _sum_counts(call: _Call, whole: list[Tensor]) -> list[Tensor]:
    xs, leaves = call.xs, call.leaves
    start = zeros_like_all(shapes_of_result(lambda: _counts(call.shapes[0])))
    k, m, n = len(start), len(xs), len(leaves)

    def body(*flat: Tensor) -> list[Tensor]:
        batch, consts = list(flat[k : k + m]), flat[k + m :]
        with supplying_sums(dict(enumerate(consts[n:]))):
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
            with supplying_sums(all_sums) as sums:
                loss, aux = call.loss_of(list(params), batch)
            require_constant(sums, len(all_sums))
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
