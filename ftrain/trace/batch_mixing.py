"""Functions in a user's own loss or update that mix rows of the batch, of which a rank holds its share: finished over
the ranks, done on the rows of all, or refused with the line.

A function of torch that a user's line calls is run on the share, and the nodes that it left are looked at
(`ftrain.trace.batch_rows`). If one of them mixes rows, the function is taken back and run again:

1. with means over the rows averaged over the ranks, if there are any (`h - h.mean(0)`);
2. else with the rows of all ranks, if it reduces them (`h.std(0)`), or gives as many and the share is cut out of them
   again (`h.softmax(0)`).

Gradients are right by the transposes: each rank's total uses the rows of all, so theirs is the sum over ranks. What
else mixes rows, or does so within `torch.func`'s transforms, is a ValueError. Not looked at: the library's own modules
and kernels, and what `ftrain.within_documents` covers.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from ftrain.graph.source import is_users, user_source
from ftrain.graph.torch_private import (
    functional_transform,
    node_of,
    number_of,
    runs_again_in_backward,
    tracing_graph,
)  # fmt: skip
from ftrain.kernels.whole_batch import stays_within_documents
from ftrain.sharding.batch import TokenOrder
from ftrain.sharding.mesh import Mesh
from ftrain.sharding.whole_rows import mean_of_ranks
from ftrain.trace.batch_backward import require_part_of_sum, watched_hook
from ftrain.trace.batch_functions import kept_apart
from ftrain.trace.batch_gathering import RowsOfAll, Run, kind_of
from ftrain.trace.batch_kinds import Kind, number_in
from ftrain.trace.batch_rows import BatchRows, summed
from ftrain.trace.batch_writes import is_write, note_write
from ftrain.trace.gathered_copies import last_node, tensors_in
from ftrain.trace.refusals import Untraceable
from ftrain.trace.spmd import batch_sum
from ftrain.trace.spread_ops import tensor_of
from ftrain.trace.whole_arrays import WholeArrays, map_tensors, writes

_OVER_LABELS = {torch.nn.functional.cross_entropy, torch.nn.functional.nll_loss}
"""Functions whose mean is over the labels that are not ignored, by their weights."""


class _Cause(NamedTuple):
    """A node that is not right on a share of the rows. `known`: certainly, not only as far as one knows."""

    node: fx.Node
    known: bool


class BatchMixing:
    """Watches the functions that a user's lines call. `rows`: what is known of the trace's tensors; `arrays`: takes
    tries back.
    """

    def __init__(self, rows: BatchRows, arrays: WholeArrays, mesh: Mesh, order: TokenOrder) -> None:
        self._rows, self._arrays = rows, arrays
        self._mesh = mesh
        self._all = RowsOfAll(rows, mesh, order)

    def call(
        self, func: Callable[..., Any], run: Run, args: Sequence[Any], kwargs: Mapping[str, Any], line: str
    ) -> Any:
        """What `run(args, kwargs)` gives on one device, or a rank's share of it. ValueError where neither can be.

        `func`: the function that `run` calls; `line`: the user's.
        """
        graph = tracing_graph()
        if graph is None:
            return run(args, kwargs)
        if functional_transform():
            return self._transformed(func, run, args, kwargs, line)
        self._note_own_parts((args, kwargs))
        if not self._concerned((args, kwargs)):
            return run(args, kwargs)
        if writes(func, kwargs) and args and self._kind(args[0]).what == "rows":
            args = (args[0], *map_tensors(self._finished, args[1:]))
        if func in _OVER_LABELS and (found := self._over_labels(func, run, args, kwargs, line)) is not None:
            return found
        apart = kept_apart(func, args, kwargs, self._kind)
        if apart is not None:
            return self._apart(run(args, kwargs), apart)
        before = last_node(graph)
        result = run(args, kwargs)
        cause = None if stays_within_documents() else self._cause(before, result)
        if cause is None:
            return result
        del result
        self._arrays.discard_after(before)
        if runs_again_in_backward():
            raise Untraceable(_refusal(func.__name__, line, of_sums=False, again=True))
        if last_node(graph) is before:
            finished = map_tensors(self._finished, args), map_tensors(self._finished, kwargs)
            if any(a is not b for a, b in zip(tensors_in(finished), tensors_in((args, kwargs)), strict=True)):
                return self.call(func, run, *finished, line)
            if self._all.can_take(func, args, kwargs):
                return self._all.run(func, run, args, kwargs)
        line = line if is_users(line.rpartition(":")[0]) else str(user_source())
        raise Untraceable(self._refusal(func, line, (args, kwargs), cause.known))

    def differentiate(self, outputs: Any) -> None:
        """ValueError for a gradient that a loss takes itself, unless `outputs` (a tensor or several of any shape) are
        parts of a sum over the batch.
        """
        require_part_of_sum(outputs, self._rows)

    def hooked(self, tensor: Tensor, hook: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
        """`hook`, of the gradient of `tensor` (any shape), with a ValueError when it runs if it mixes rows."""
        return hook if self._mesh.size == 1 else watched_hook(hook, tensor, self._rows)

    def _transformed(
        self, func: Callable[..., Any], run: Run, args: Sequence[Any], kwargs: Mapping[str, Any], line: str
    ) -> Any:
        """A function within `torch.func`'s transforms, whose tries cannot be taken back. They leave nodes that nothing
        reads.
        """
        before = last_node(tracing_graph())  # type: ignore[arg-type]
        result = run(args, kwargs)
        cause = None if stays_within_documents() else self._cause(before, result)
        if cause is not None:
            raise Untraceable(self._refusal(func, line, (args, kwargs), cause.known))
        return result

    def _refusal(self, func: Callable[..., Any], line: str, values: Any, known: bool) -> str:
        """`known`: whether it is certain that rows are mixed."""
        name = getattr(func, "__name__", str(func)).partition(".")[0]
        of_sums = any(self._kind(t).what == "sum" for t in tensors_in(values))
        return _refusal(name, line, of_sums) if known else _unclear(name, line)

    def _kind(self, tensor: Any) -> Kind:
        return kind_of(tensor, self._rows)

    def _concerned(self, values: Any) -> bool:
        kinds = (self._kind(t) for t in tensors_in(values))
        return any(kind.own or kind.partial for kind in kinds)

    def _note_own_parts(self, values: Any) -> None:
        """Beside a part of a sum two things are parts too, though all ranks have them alike: zeros, as a running total
        begins, and what is multiplied by the number of the rank's own rows (a penalty for each).
        """
        single = (t for t in tensors_in(values) if all(isinstance(n, int) and n == 1 for n in t.shape))
        for node, number in ((node_of(t), number_of(t)) for t in single):
            if node is not None and number is not None:
                node.meta["number"] = number
        total = next((t for t in tensors_in(values) if self._kind(t).what == "sum"), None)
        if total is None:
            return
        sizes = set(summed(node_of(total), self._rows))  # type: ignore[arg-type]
        for node in (node_of(t) for t in tensors_in(values) if self._kind(t).what == "same"):
            if node is not None and (number_in(node) == 0 or _is_multiple(node, sizes)):
                self._rows.set(node, Kind("sum"))

    def _cause(self, before: fx.Node, result: Any) -> _Cause | None:
        """The first node after this one that mixes rows, or of which nothing is known.

        Nodes that nothing reads, as torch leaves some, count if they are a `result` or write.
        """
        made = set(map(node_of, tensors_in(result)))
        unclear = None
        node = before.next
        while node.op != "root":
            if node.users or node in made or is_write(node):
                if self._mixes(node) or note_write(node, self._rows):
                    return _Cause(node, known=True)
                if unclear is None and self._rows.unclear(node):
                    unclear = _Cause(node, known=False)
            node = node.next
        return unclear

    def _mixes(self, node: fx.Node) -> bool:
        return self._rows.of(node).mixes or self._cuts(node)

    def _cuts(self, node: fx.Node) -> bool:
        """True for a slice of the rows, which is another one on each rank."""
        source = node.args[0] if node.args else None
        if node.op != "call_function" or not isinstance(source, fx.Node):
            return False
        kind, value, after = self._rows.of(source).kind, tensor_of(source), tensor_of(node)
        if kind.what != "rows" or value is None or after is None or kind.dim >= after.dim():
            return False
        return "slice" in str(node.target) and value.shape[kind.dim] != after.shape[kind.dim]

    def _apart(self, result: Any, kinds: Sequence[Kind]) -> Any:
        """The result of a function that keeps rows apart, whose tensors are of these kinds."""
        for tensor, kind in zip(tensors_in(result), kinds, strict=True):
            node = node_of(tensor)
            if node is not None:
                self._rows.set(node, kind)
        return result

    def _over_labels(
        self, func: Callable[..., Any], run: Run, args: Sequence[Any], kwargs: Mapping[str, Any], line: str
    ) -> Tensor | None:
        """The whole batch's mean cross entropy over the labels that count, of which ranks may have unlike numbers; None
        for a reduction that needs no care.
        """
        given = inspect.signature(func).bind(*args, **kwargs)
        given.apply_defaults()
        scores, labels, weight = (given.arguments[name] for name in ("input", "target", "weight"))
        old = (given.arguments["size_average"], given.arguments["reduce"])
        if (
            old != (None, None)
            or given.arguments["reduction"] != "mean"
            or labels.dtype.is_floating_point
            or stays_within_documents()
        ):
            return None
        if self._kind(scores).what != "rows" or self._mesh.size == 1:
            return None
        if runs_again_in_backward():
            raise Untraceable(_refusal(f"a mean {func.__name__}", line, of_sums=False, again=True))
        if not self._kind(scores).ordered:
            raise Untraceable(_refusal(f"a mean {func.__name__}", line, of_sums=True))
        counted = labels != given.arguments["ignore_index"]
        weights = counted if weight is None else weight[torch.where(counted, labels, 0)] * counted
        given.arguments["reduction"] = "sum"
        total = run(given.args, given.kwargs)
        return batch_sum(total, self._mesh) / batch_sum(weights.sum().to(total.dtype), self._mesh)

    def _finished(self, tensor: Tensor) -> Tensor:
        """The whole batch's mean, of a rank's."""
        return mean_of_ranks(tensor, self._mesh) if self._kind(tensor).what == "mean" else tensor


def _refusal(name: str, line: str, of_sums: bool, *, again: bool = False) -> str:
    """`again`: in a function that the backward runs again, where nothing can be gathered."""
    if again:
        return (
            f"{name} at {line} mixes rows of the batch in a function of torch.utils.checkpoint, which the backward "
            "runs again on a rank's share: call the function itself, and save memory by ftrain.jit(..., remat=...)"
        )
    if of_sums:
        return (
            f"{name} at {line} reads a sum over rows of the batch, and a rank has summed its share of them: make it "
            "the whole batch's first (ftrain.kernels.mean.sum_over_batch, of the count too), return it as the total "
            "of a Mean, or, if it adds what all ranks have alike (a penalty on weights), make that a term of its own "
            "(ftrain.weighted_sum)"
        )
    return (
        f"{name} at {line} mixes rows of the batch, and a rank holds its share of them: gather them "
        "(ftrain.whole_rows), sum what it sums (ftrain.kernels.mean.sum_over_batch), or put it under `with "
        "ftrain.within_documents():` if it stays within documents"
    )


def _unclear(name: str, line: str) -> str:
    return (
        f"{name} at {line} is not known to keep rows of the batch apart, of which a rank holds its share: gather them "
        "(ftrain.whole_rows), or put it under `with ftrain.within_documents():` if it works row by row or within "
        "documents"
    )


def _is_multiple(node: fx.Node, sizes: Set[int]) -> bool:
    """True for a product with one of these numbers."""
    factors = list[Any]([node])
    while factors:
        factor = factors.pop()
        number = number_in(factor) if isinstance(factor, fx.Node) else factor
        if factor is not node and isinstance(number, int | float) and number in sizes:
            return True
        if isinstance(factor, fx.Node) and "mul" in str(factor.target):
            factors.extend(factor.args)
    return False
