"""Run a graph node by node, bodies of loops included, on one rank or on all ranks of a mesh in lockstep.

`ftrain.profile` and `ftrain.debug` are built on it.
"""

from collections import defaultdict
from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from ftrain.graph.collectives import COLLECTIVES, WAIT
from ftrain.graph.loop import is_loop, loop_body
from ftrain.graph.torch_private import below_autograd
from ftrain.runtime.lockstep import GroupTable, Request, exchange
from ftrain.sharding.mesh import Mesh


class Iteration(NamedTuple):
    """An iteration of an enclosing loop: the name of its node, and the number of the iteration, from 0."""

    loop: str
    number: int


class Op(NamedTuple):
    """An op to compute: its node, the loops that enclose it (`inside`, outermost first), and the values of its
    arguments.
    """

    node: fx.Node
    inside: tuple[Iteration, ...]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


Visit = Callable[[fx.Node, tuple[Iteration, ...], tuple[Any, ...], dict[str, Any]], Any]
Look = Callable[[Sequence[Op], Sequence[Any]], None]
Walk = Generator[Op, Any, list[Any]]


def interpret(module: fx.GraphModule, inputs: Sequence[Tensor], visit: Visit) -> list[Any]:
    """Run the graph on its flat inputs and return its flat outputs.

    `visit(node, iterations, args, kwargs)` computes the value of every op and returns it; `iterations` are the loops
    that enclose the node, outermost first. Values are dropped after their last use. AssertionError for a graph without
    output.
    """
    with torch.no_grad(), below_autograd():
        walk, value = _walk(module, inputs, ()), None
        while True:
            try:
                op = walk.send(value)
            except StopIteration as end:
                return end.value
            value = visit(*op)


def interpret_ranks(module: fx.GraphModule, ranks: Sequence[Sequence[Tensor]], mesh: Mesh, look: Look) -> None:
    """Run the graph for all ranks of a virtual mesh, each node on every rank before the next node.

    `ranks`: the flat inputs of each rank. `look(ops, values)` is called after each node, with one op and one value per
    rank. RuntimeError if ranks stand at different collectives; AssertionError for a graph without output.
    """
    groups = GroupTable(mesh)
    with torch.no_grad(), below_autograd():
        walks = [_walk(module, inputs, ()) for inputs in ranks]
        values: list[Any] = [None] * len(walks)
        while ops := _advance(walks, values):
            values = _of_all_ranks(ops, groups)
            look(ops, values)


def _of_all_ranks(ops: Sequence[Op], groups: GroupTable) -> list[Any]:
    target = ops[0].node.target
    if target in COLLECTIVES:
        return exchange([Request(COLLECTIVES[target], op.args) for op in ops], groups)
    if target is WAIT:
        return [op.args[0] for op in ops]
    return [target(*op.args, **op.kwargs) for op in ops]  # type: ignore[operator]


def _advance(walks: Sequence[Walk], values: Sequence[Any]) -> list[Op]:
    """The next op of every rank; empty at the end, which all ranks reach together."""
    found = []
    for walk, value in zip(walks, values, strict=True):
        try:
            found.append(walk.send(value))
        except StopIteration:
            continue
    return found


def _walk(module: fx.GraphModule, inputs: Sequence[Any], inside: tuple[Iteration, ...]) -> Walk:
    """Yields each op, is sent its value, and returns the values of the output."""
    values: dict[fx.Node, Any] = {}
    dropped = _dropped_after(module.graph)
    given = iter(inputs)
    for node in module.graph.nodes:
        if node.op == "placeholder":
            values[node] = next(given)
        elif node.op == "get_attr":
            values[node] = getattr(module, str(node.target))
        elif node.op == "output":
            return list(fx.map_arg(node.args[0], values.__getitem__))
        else:
            args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            if is_loop(node):
                values[node] = yield from _walk_loop(node, inside, *args[1:])
            else:
                values[node] = yield Op(node, inside, args, kwargs)
            del args, kwargs
        for last in dropped[node]:
            del values[last]
    raise AssertionError("a graph ends with its output")


def _dropped_after(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """For each node, the nodes of which it is the last reader (itself if nobody reads it)."""
    last: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        last[node] = node
        last.update(dict.fromkeys(node.all_input_nodes, node))
    found: dict[fx.Node, list[fx.Node]] = defaultdict(list)
    for node, reader in last.items():
        found[reader].append(node)
    return found


def _walk_loop(
    node: fx.Node,
    inside: tuple[Iteration, ...],
    n: int,
    carry: list[Tensor],
    xs: list[Tensor],
    consts: list[Tensor],
) -> Walk:
    carry = [c.clone() for c in carry]
    body = loop_body(node)
    for i in range(n):
        within = (*inside, Iteration(node.name, i))
        carry = yield from _walk(body, [*carry, *[x[i] for x in xs], *consts], within)
    return carry
