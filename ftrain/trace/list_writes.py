"""Ops that write into a list of tensors, such as `torch._foreach_copy_(xs, xs[::-1])`, whose tensors share memory.

Eager PyTorch treats the lists one tensor after the other, so that later ones see what was written into earlier ones.
Functionalization computes all results from the values before: such an op becomes one for each tensor.
"""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, fx

from ftrain.graph.aliasing import storage


def split_list_writes(module: fx.GraphModule, nodes: Iterable[fx.Node]) -> None:
    """Replace, in place, those of `nodes` that write into lists with shared memory by one op for each tensor.

    `nodes`: those of `module` whose ops write into an argument. Lists whose tensors lie apart stay together.
    """
    for node in nodes:
        written = _written_list(node)
        if written and _meet(written, node):
            _split(module.graph, node, len(written))
    module.graph.lint()
    module.recompile()


def _written_list(node: fx.Node) -> list[fx.Node]:
    """The list of tensors that an op writes into; empty for one that writes into single tensors."""
    first = node.args[0] if node.args else None
    marked = node.target._schema.arguments[0].is_write  # type: ignore[union-attr]
    return list(first) if marked and isinstance(first, list | tuple) else []


def _meet(written: list[fx.Node], node: fx.Node) -> bool:
    """True if a tensor that is written shares memory with one of another place in the lists, or with a single one."""
    others = [(i, x) for argument in node.args[1:] for i, x in _places(argument)]
    return any(i != j and _overlap(x, y) for i, x in enumerate(written) for j, y in [*enumerate(written), *others])


def _places(argument: Any) -> list[tuple[int, fx.Node]]:
    """The tensors of an argument, with their places in its list; -1 for one that stands alone."""
    pairs = enumerate(argument) if isinstance(argument, list | tuple) else [(-1, argument)]
    return [(i, x) for i, x in pairs if isinstance(x, fx.Node) and isinstance(x.meta.get("val"), Tensor)]


def _overlap(x: fx.Node, y: fx.Node) -> bool:
    """True if the runs of memory in which two tensors lie meet; also where their sizes depend on data."""
    if storage(x) != storage(y):
        return False
    (x_first, x_end), (y_first, y_end) = _run(x.meta["val"]), _run(y.meta["val"])
    bounds = (x_first, x_end, y_first, y_end)
    return not all(isinstance(b, int) for b in bounds) or (x_first < y_end and y_first < x_end)


def _run(value: Tensor) -> tuple[Any, Any]:
    """The bytes of its storage between which a tensor lies."""
    first = value.storage_offset()
    last = first + sum((n - 1) * step for n, step in zip(value.shape, value.stride(), strict=True))
    return first * value.element_size(), (last + 1) * value.element_size()


def _split(graph: fx.Graph, node: fx.Node, count: int) -> None:
    """One op for each of `count` tensors, in order: of each list it has a list with one member."""

    def at(i: int, argument: Any) -> Any:
        return [argument[i]] if isinstance(argument, list | tuple) and len(argument) == count else argument

    for i in range(count):
        with graph.inserting_before(node):
            args = tuple(at(i, a) for a in node.args)
            one = graph.call_function(node.target, args, {key: at(i, a) for key, a in node.kwargs.items()})  # type: ignore[arg-type]
        one.meta.update(node.meta)
    graph.erase_node(node)
