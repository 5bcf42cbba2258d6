"""Gradients inside of a loss that mix rows of the batch, of which a rank holds its share: refused with the line.

- The backward of a `torch.autograd.Function`, or of an op with `register_autograd`, is the user's own code. It is run
  when the loss is differentiated, and the nodes that it leaves are looked at (`ftrain.trace.batch_rows`).
- So is a hook of a tensor (`Tensor.register_hook`).
- A gradient that the loss takes itself (`torch.autograd.grad`, `torch.func.grad`) is a rank's part of the whole batch's
  if what it differentiates is a rank's part of a sum. A mean over the rank's rows is divided by another number, and a
  value of the whole batch is counted once a rank.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, fx

from ftrain.graph.source import user_source
from ftrain.graph.torch_private import node_of, own_backward, tracing_graph
from ftrain.trace.batch_kinds import SAME, Kind, name_of
from ftrain.trace.batch_rows import BatchRows
from ftrain.trace.gathered_copies import last_node
from ftrain.trace.provenance import backward_nodes, sources
from ftrain.trace.refusals import Untraceable
from ftrain.trace.spread_ops import tensor_of


def watch_own_backwards(loss: Tensor, rows: BatchRows) -> None:
    """Look at what backwards of the user's own leave in the graph, once `loss` (0-d) is differentiated. ValueError then
    for a node that mixes rows.
    """
    for node in backward_nodes(loss):
        function = own_backward(node)
        if function is not None and not function.__module__.startswith("ftrain."):
            _watch(node, function.__name__, rows)


def _watch(backward: Any, name: str, rows: BatchRows) -> None:
    before = list[fx.Node]()

    def enter(gradients: Sequence[Tensor | None]) -> None:
        graph = tracing_graph()
        if graph is not None:
            before[:] = [last_node(graph)]
            _note_rows(gradients, backward._sequence_nr(), graph, rows)

    def leave(results: Any, gradients: Any) -> None:
        node = _first_that_mixes(before[0], rows) if before else None
        if node is not None:
            raise Untraceable(
                f"the backward of {name} mixes rows of the batch at {node.meta.get('source')}, and a rank holds "
                "its share of them: let it give each row the gradient of that row alone, or write the op in "
                "functions of torch, whose gradients are taken for you"
            )

    backward.register_prehook(enter)
    backward.register_hook(leave)


def _first_that_mixes(before: fx.Node, rows: BatchRows) -> fx.Node | None:
    node = before.next
    while node.op != "root" and not rows.of(node).mixes and not _spreads_a_part(node, rows):
        node = node.next
    return None if node.op == "root" else node


def watched_hook(hook: Callable[[Tensor], Any], tensor: Tensor, rows: BatchRows) -> Callable[[Tensor], Any]:
    """`hook`, of `tensor` of any shape, with a ValueError if it does not treat each row alone, or is not linear in a
    rank's part of a gradient.
    """
    line, node, shape = user_source(), node_of(tensor), tensor.shape  # the tensor itself must not be kept

    @functools.wraps(hook)
    def watched(gradient: Tensor) -> Any:
        graph, own = tracing_graph(), node_of(gradient)
        if graph is None or own is None:
            return hook(gradient)
        kind = Kind("unknown") if node is None else rows.of(node).kind
        if rows.of(own).kind == SAME and kind.what == "rows" and shape == gradient.shape:
            rows.note(own, kind)
        before = last_node(graph)
        result = hook(gradient)
        if _first_that_mixes(before, rows) is not None:
            raise Untraceable(
                f"{line}: a hook mixes rows of the batch, of which a rank holds its share, or is not linear in a "
                "gradient that is the sum of all ranks': let it treat each row alone, or change the gradients that "
                "ftrain.value_and_grad returns"
            )
        return result

    return watched


def _note_rows(gradients: Sequence[Tensor | None], number: int, graph: fx.Graph, rows: BatchRows) -> None:
    """A gradient that is equal on all ranks (of a plain sum) belongs to a rank's rows as the result that it is of."""
    results = [n for n in graph.nodes if n.meta.get("seq_nr") == number and n.meta.get("phase") == "forward"]
    for gradient in gradients:
        node = None if gradient is None else node_of(gradient)
        if gradient is None or node is None or rows.of(node).kind != SAME:
            continue
        for result in results:
            kind = rows.of(result).kind
            if kind.what == "rows" and _shape(result) == gradient.shape:
                rows.note(node, kind)


def _shape(node: fx.Node) -> Any:
    value = tensor_of(node)
    return None if value is None else value.shape


def _spreads_a_part(node: fx.Node, rows: BatchRows) -> bool:
    """True for a sum or mean over a rank's rows that is given to each of them."""
    source = node.args[0] if node.args else None
    return name_of(node) == "expand" and isinstance(source, fx.Node) and rows.of(source).kind.partial


def require_part_of_sum(outputs: Any, rows: BatchRows) -> None:
    """ValueError for a gradient, which a loss takes itself, of what is no part of a sum over the batch.

    `outputs`: what is differentiated, a tensor or several of any shape.
    """
    for output in outputs if isinstance(outputs, list | tuple) else (outputs,):
        node = node_of(output) if isinstance(output, Tensor) else None
        if node is None:
            continue
        what = rows.of(node).kind.what
        if what == "mean" or (what == "same" and any(rows.of(n).kind.what == "rows" for n in sources(node))):
            has = "a mean over a rank's rows" if what == "mean" else "a number of the whole batch, which all ranks have"
            raise Untraceable(
                f"{user_source()}: a gradient inside of a loss differentiates {has}, so its gradient is not the one of "
                "one device: differentiate the sum over the rows (.sum()), and divide by numbers afterwards"
            )
