"""Counts of a loss that are the whole batch's where they must be a rank's own, since the counts of all are added."""

from collections.abc import Iterable

from torch import Tensor, fx

from ftrain.graph.source import user_source
from ftrain.graph.torch_private import functional_transform, node_of, number_of
from ftrain.kernels.mean import Mean
from ftrain.trace.batch_kinds import number_in
from ftrain.trace.batch_rows import BatchRows, summed
from ftrain.trace.spmd import current_sharded


def require_own_counts(means: Iterable[Mean]) -> None:
    """ValueError, on a mesh, for a mean whose count is as many times too large as there are ranks, as far as one sees.

    - A count that is a number: it must not be that of the whole batch, if the total is a sum over a rank's rows.
    - A count of rows beside a total that all ranks have alike, which is added once for each rank.
    """
    trace = current_sharded()
    if trace is None or trace.plan.mesh.size == 1 or functional_transform():
        return
    for mean in means:
        total, count = node_of(mean.total), node_of(mean.count)
        if total is not None and count is not None:
            _require_own(mean, total, count, trace.rows, trace.plan.mesh.size)


def _require_own(mean: Mean, total: fx.Node, count: fx.Node, rows: BatchRows, ranks: int) -> None:
    of_total, number = rows.of(total).kind.what, _number(mean.count, count)
    if of_total == "same" and rows.of(count).kind.what == "sum":
        raise ValueError(
            f"{user_source()}: a Mean whose total all ranks have alike, over a count of rows that is summed over the "
            "ranks: make the total one of rows too (total * count), or count 1"
        )
    if of_total != "sum" or number is None:
        return
    sizes = set(summed(total, rows))
    if number not in sizes and number / ranks in sizes:
        raise ValueError(
            f"{user_source()}: a Mean counts {number:g}, and a rank has summed {number / ranks:g} numbers: its count "
            "is that of the rank's own rows (x.numel(), len(x)), as the counts of all ranks are added"
        )


def _number(tensor: Tensor, node: fx.Node) -> float | None:
    known = number_of(tensor)
    return number_in(node) if known is None else known
