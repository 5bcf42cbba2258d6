"""All ranks of a mesh in one process: the graph runs for every rank in turn, from one collective to the next.

The graph's Python becomes a generator that yields at each collective. The driver advances the generators of all ranks
to their next yield, exchanges their tensors, and sends each rank its part. Nothing else of the graph changes, so tests
run the same code as processes do. Sums over ranks are computed in the order of the group.
"""

import functools
from collections.abc import Callable, Generator, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from ftrain.graph.collectives import COLLECTIVES, axes_of_group
from ftrain.graph.loop import is_loop, loop_body
from ftrain.graph.torch_private import below_autograd
from ftrain.sharding.mesh import Mesh

_c10d = torch.ops._c10d_functional
RankGenerator = Generator["Request", Any, list[Tensor]]
_Given = list[tuple[Any, ...]]
"""The arguments of a collective, from each rank of its group."""


class Request(NamedTuple):
    """A collective that a rank waits at: the op's name and its arguments."""

    op: str
    args: tuple[Any, ...]


def lockstep_program(module: fx.GraphModule, mesh: Mesh) -> Callable[[Sequence[Sequence[Tensor]]], list[list[Tensor]]]:
    """The graph `module` for all ranks of a mesh: a function from the flat inputs of every rank to the flat outputs of
    every rank.

    The function raises a RuntimeError if ranks stand at different collectives, which a pass that depends on the rank
    would cause.
    """
    start = _generator_of(module)
    groups = GroupTable(mesh)

    def run(inputs: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
        with torch.no_grad(), below_autograd():
            ranks = [start(*given) for given in inputs]
            return _drive(ranks, groups)

    return run


def _drive(ranks: list[RankGenerator], groups: "GroupTable") -> list[list[Tensor]]:
    answers: list[Any] = [None] * len(ranks)
    results: list[list[Tensor] | None] = [None] * len(ranks)
    while True:
        requests: list[Request | None] = []
        for rank, generator in enumerate(ranks):
            answer, answers[rank] = answers[rank], None
            try:
                requests.append(generator.send(answer))
            except StopIteration as stop:
                results[rank] = stop.value
                requests.append(None)
            del answer
        if all(r is None for r in requests):
            return results  # type: ignore[return-value]
        answers = exchange(requests, groups)


def exchange(requests: list[Request | None], groups: "GroupTable") -> list[Any]:
    """The result for each rank of the collective at which all ranks stand. `requests`: one per rank, None for a rank
    that has ended. `groups`: of the mesh.

    RuntimeError if they stand at different ones, or some have ended. ValueError for an all_reduce other than sum, max
    and min.
    """
    ops = {None if r is None else (r.op, r.args[-1]) for r in requests}
    if len(ops) != 1 or None in ops:
        raise RuntimeError(f"ranks stand at different collectives: {sorted(map(str, ops))}")
    ((op, name),) = ops  # type: ignore[misc]
    answers: list[Any] = [None] * len(requests)
    for members in groups.members(name):
        given = [requests[rank].args for rank in members]  # type: ignore[union-attr]
        for rank, answer in zip(members, _EXCHANGES[op](given), strict=True):
            answers[rank] = answer
    return answers


class GroupTable:
    """From the name of a process group in graphs to the ranks of all groups of that name."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._found: dict[str, tuple[tuple[int, ...], ...]] = {}

    def members(self, name: str) -> tuple[tuple[int, ...], ...]:
        """The ranks of each group of this name, in the order of the group."""
        if name not in self._found:
            self._found[name] = self._mesh.members(*axes_of_group(name))
        return self._found[name]


def _all_gather(given: _Given) -> list[Tensor]:
    whole = torch.cat([x for x, *_ in given])
    return [whole, *(whole.clone() for _ in given[1:])]


def _reduce_scatter(given: _Given) -> list[Tensor]:
    pieces = [x.chunk(len(given)) for x, *_ in given]
    return [_sum([p[i] for p in pieces]) for i in range(len(given))]


def _all_reduce(given: _Given) -> list[Tensor]:
    how = given[0][1]
    if how not in _REDUCTIONS:
        raise ValueError(f"a virtual mesh has no all_reduce {how!r}, only {', '.join(_REDUCTIONS)}")
    total = _REDUCTIONS[how]([x for x, *_ in given])
    return [total, *(total.clone() for _ in given[1:])]


def _all_to_all(given: _Given) -> list[Tensor]:
    sent = [x.split(send) for x, _, send, _ in given]
    return [torch.cat([pieces[i] for pieces in sent]) for i in range(len(given))]


def _shift_ranks(given: _Given) -> list[Tensor]:
    n, shift = len(given), given[0][1]
    return [given[(i - shift) % n][0].clone() for i in range(n)]


def _exchange_rows(given: _Given) -> list[Tensor]:
    sent = [x.split(send.tolist()) for x, send, *_ in given]
    found = [torch.cat([pieces[i] for pieces in sent]) for i in range(len(given))]
    for (_, _, receive, rows, _), got in zip(given, found, strict=True):
        assert got.shape[0] == rows == int(receive.sum()), "the ranks disagree about the sizes of an exchange"
    return found


def _sum(parts: list[Tensor]) -> Tensor:
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return total


def _extreme(pick: Callable[[Tensor, Tensor], Tensor]) -> Callable[[list[Tensor]], Tensor]:
    return lambda parts: functools.reduce(pick, parts[1:], parts[0].clone())


_REDUCTIONS: dict[str, Callable[[list[Tensor]], Tensor]] = {
    "sum": _sum,
    "max": _extreme(torch.maximum),
    "min": _extreme(torch.minimum),
}


_EXCHANGES: dict[str, Callable[[_Given], list[Tensor]]] = {
    "all_gather": _all_gather,
    "reduce_scatter": _reduce_scatter,
    "all_reduce": _all_reduce,
    "all_to_all": _all_to_all,
    "shift_ranks": _shift_ranks,
    "exchange_rows": _exchange_rows,
}


def _generator_of(module: fx.GraphModule) -> Callable[..., RankGenerator]:
    """The graph's function as a generator, with a yield at each collective and each loop."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    own = SimpleNamespace(**{str(n.target): getattr(module, str(n.target)) for n in graph.nodes if n.op == "get_attr"})
    for node, original in zip(graph.nodes, module.graph.nodes, strict=True):
        if node.target in COLLECTIVES:
            node.args = (COLLECTIVES[node.target], *node.args)
            node.target = _yield_collective
        elif node.target is _c10d.wait_tensor.default:
            node.target = _done
        elif is_loop(node):
            setattr(own, str(node.args[0].target), _generator_of(loop_body(original)))
            node.target = _yield_loop
    source = graph.python_code("self")
    text = source.src.replace(f"{_name(source, _yield_collective)}(", "yield _request(")
    text = text.replace(f"{_name(source, _yield_loop)}(", "yield from _lockstep_loop(")
    if "yield" not in text:
        text += "\n    yield\n"  # a generator even if there is nothing to exchange
    space = {**source.globals, "_request": _request, "_lockstep_loop": _lockstep_loop}
    exec(compile(text, "<lockstep>", "exec"), space)
    forward = space["forward"]
    return lambda *inputs: forward(own, *inputs)


def _name(source: Any, target: Callable[..., Any]) -> str:
    """The name of a function of this file in the generated source; a name that never occurs if it is not used there."""
    return next((name for name, value in source.globals.items() if value is target), "\0")


def _yield_collective(op: str, *args: Any) -> Any:
    raise AssertionError("only a marker in the graph")


def _yield_loop(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("only a marker in the graph")


def _done(x: Tensor) -> Tensor:
    """A wait: in lockstep the exchange has finished when its result arrives."""
    return x


def _request(op: str, *args: Any) -> Request:
    return Request(op, args)


def _lockstep_loop(
    body: Callable[..., RankGenerator],
    n: int,
    carry: list[Tensor],
    xs: list[Tensor],
    consts: list[Tensor],
    *,
    copy: list[bool] | None = None,
) -> Generator[Request, Any, list[Tensor]]:
    """`run_loop` in lockstep with the other ranks."""
    carry = [c.clone() if must else c for c, must in zip(carry, copy or [True] * len(carry), strict=True)]
    for i in range(n):
        carry = list((yield from body(*carry, *[x[i] for x in xs], *consts)))
    return carry
