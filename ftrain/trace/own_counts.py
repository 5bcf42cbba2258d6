"""Counts of a loss that are the whole batch's where they must be a rank's own, since the counts of all are added."""

from collections.abc import Iterable, Set
from typing import Any

from torch import Tensor, fx

from ftrain.graph.source import user_source
from ftrain.graph.torch_private import functional_transform, node_of, number_of
from ftrain.kernels.mean import Mean
from ftrain.trace.batch_kinds import name_of, number_in
from ftrain.trace.batch_rows import BatchRows, summed
from ftrain.trace.refusals import Untraceable
from ftrain.trace.spmd import current_sharded
from ftrain.trace.spread_ops import tensor_of


def require_own_counts(means: Iterable[Mean]) -> None:
    """ValueError, on a mesh, for a mean whose count is as many times too large as there are ranks, as far as one sees.

    - A count that is a number: it must not be that of the whole batch, if the total is a sum over a rank's rows.
    - A count of rows beside a total that all ranks have alike, which is added once for each rank.
    """
    trace = current_sharded()
    if trace is None or trace.plan.mesh.size == 1 or functional_transform():
        return
    for mean in means:
        total = node_of(mean.total)
        if total is not None:
            _require_own(mean, total, node_of(mean.count), trace.rows, trace.plan.mesh.size)


def _require_own(mean: Mean, total: fx.Node, count: fx.Node | None, rows: BatchRows, ranks: int) -> None:
    of_total, of_count = rows.of(total).kind.what, "same" if count is None else rows.of(count).kind.what
    number = _number(mean.count, count)
    sizes = set(summed(total, rows))
    if of_total == "same" and of_count == "sum":
        raise Untraceable(
            f"{user_source()}: a Mean whose total all ranks have alike, over a count of rows that is summed over the "
            "ranks: make the total one of rows too (total * count), or count 1"
        )
    many = {n for n in sizes if n > 1}
    if of_total == "mean" and (of_count == "sum" or number in many) and not _is_scaled(total, sizes, rows):
        raise Untraceable(
            f"{user_source()}: a Mean whose total is a mean over rows already, over a count of rows: make the total a "
            "sum (mean * count), or count 1"
        )
    if of_total == "sum" and of_count == "mean":
        raise Untraceable(
            f"{user_source()}: a Mean whose total is a sum over a rank's rows, over a count that is none of its rows: "
            "give the count of the rank's own rows, as the counts of all ranks are added"
        )
    if of_total != "sum" or number is None or max(sizes, default=1) == 1:
        return
    if number in sizes and not _counts_sums(total, number, rows):
        return
    if number in sizes or number / ranks in many or all(number % n for n in many):
        raise Untraceable(
            f"{user_source()}: a Mean counts {number:g}, and its total is a sum over a rank's {min(many)} rows: give "
            "the count of the rank's own rows (x.numel(), len(x)), as the counts of all ranks are added"
        )


def _counts_sums(total: fx.Node, number: float, rows: BatchRows) -> bool:
    """True for the number of elements of a tensor of sums over rows, whose total it is (`Mean.of(x.T @ x)`)."""
    while name_of(total) in ("sum", "_to_copy"):
        total = total.all_input_nodes[0]
        value = tensor_of(total)
        if rows.of(total).kind.what == "sum" and value is not None and 1 < value.numel() == number:
            return True
    return False


def _is_scaled(total: fx.Node, sizes: Set[int], rows: BatchRows) -> bool:
    """True for a mean that was multiplied by a number of rows, or by a count of them, on its way."""
    node: Any = total
    while isinstance(node, fx.Node) and rows.of(node).kind.partial:
        factors = [x for x in node.args if not (isinstance(x, fx.Node) and rows.of(x).kind.what == "mean")]
        numbers = [number_in(x) if isinstance(x, fx.Node) else x for x in factors]
        if name_of(node) == "mul" and any(isinstance(x, int | float) and x in sizes for x in numbers):
            return True
        node = next((x for x in node.all_input_nodes if rows.of(x).kind.partial), None)
    return False


def _number(tensor: Tensor, node: fx.Node | None) -> float | None:
    known = number_of(tensor)
    return number_in(node) if known is None and node is not None else known
