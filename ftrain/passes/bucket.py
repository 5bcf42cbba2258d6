"""Join small collectives of the same group and dtype into one larger message (bucketing)."""

import heapq
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from ftrain.graph.collectives import WAIT
from ftrain.graph.torch_private import value_of
from ftrain.sharding.collectives import gather_ranks

_aten, _c10d = torch.ops.aten, torch.ops._c10d_functional
GATHER = gather_ranks
SCATTER = _c10d.reduce_scatter_tensor.default
REDUCE = _c10d.all_reduce.default
_NEAR = 400  # nodes between the first and the last of a bucket


def bucket(module: fx.GraphModule, *, limit: int) -> None:
    """Join gathers, reduce-scatters and all-reduces of one group, dtype and phase into larger messages, in place.

    `limit`: the largest size of a joined message in bytes (the output of a gather, the input of a sum). No value
    changes by a bit.
    """
    for kind, join in ((GATHER, _join_gathers), (SCATTER, _join_scatters), (REDUCE, _join_reduces)):
        priority = {n: float(i) for i, n in enumerate(module.graph.nodes)}
        buckets = _buckets(module, kind, priority, limit)
        for members in buckets:
            made = join(module.graph, members)
            # The first reader needs the gather; a sum can start when the last of its inputs exists.
            at = priority[members[0]] if kind is GATHER else priority[members[-1]]
            priority.update({n: at + (i + 1) / (len(made) + 2) for i, n in enumerate(made)})
        if buckets:
            _sort(module, priority)


def _buckets(module: fx.GraphModule, kind: Any, priority: dict[fx.Node, float], limit: int) -> list[list[fx.Node]]:
    """Groups of collectives of one kind that can be one message, because none is computed from another."""
    open_buckets: dict[tuple[tuple[Any, ...], torch.dtype, str | None], list[fx.Node]] = {}
    closed: list[list[fx.Node]] = []
    behind: dict[fx.Node, set[fx.Node]] = {}  # by node, the members of open buckets that it is computed from
    for node in module.graph.nodes:
        sources = set().union(*(behind.get(p, set()) for p in node.all_input_nodes))
        if node.target is kind:
            value = _input_of(node)
            key = (node.args[1:], value.dtype, node.meta.get("phase"))
            members = open_buckets.setdefault(key, [])
            size = sum(map(_message_bytes, [*members, node]))
            far = bool(members) and priority[node] - priority[members[0]] > _NEAR
            if members and (size > limit or far or sources & set(members)):
                closed.append(members)
                open_buckets[key] = members = []
            members.append(node)
            sources = sources | {node}
        if sources:
            behind[node] = sources
    return [members for members in [*closed, *open_buckets.values()] if len(members) > 1]


def _input_of(node: fx.Node) -> Any:
    """The fake tensor that a rank sends in a collective."""
    return node.args[0].meta["val"]  # type: ignore[union-attr]


def _message_bytes(node: fx.Node) -> int:
    """The size of a message in bytes: the output of a gather, the input of a sum."""
    return max(_input_of(node).nbytes, node.meta["val"].nbytes)


def _join_gathers(graph: fx.Graph, members: Sequence[fx.Node]) -> list[fx.Node]:
    ranks, group = members[0].args[1:]
    make = _Maker(graph, members[0])
    flats = [make(_aten.reshape.default, (m.args[0], [-1])) for m in members]
    gathered = make.collective(GATHER, (make(_aten.cat.default, (flats,)), ranks, group))
    whole = make(_aten.view.default, (gathered, [ranks, -1]))
    at = 0
    for member in members:
        length, shape = _input_of(member).numel(), list(member.meta["val"].shape)
        piece = make(_aten.slice.Tensor, (whole, 1, at, at + length))
        _replace(member, make(_aten.clone.default, (make(_aten.reshape.default, (piece, shape)),)))
        at += length
    return make.made


def _join_scatters(graph: fx.Graph, members: Sequence[fx.Node]) -> list[fx.Node]:
    op, ranks, group = members[0].args[1:]
    make = _Maker(graph, members[-1])
    rows = [make(_aten.reshape.default, (m.args[0], [ranks, -1])) for m in members]
    flat = make(_aten.reshape.default, (make(_aten.cat.default, (rows, 1)), [-1]))
    return _hand_out(make, make.collective(SCATTER, (flat, op, ranks, group)), members)


def _join_reduces(graph: fx.Graph, members: Sequence[fx.Node]) -> list[fx.Node]:
    make = _Maker(graph, members[-1])
    flats = [make(_aten.reshape.default, (m.args[0], [-1])) for m in members]
    return _hand_out(make, make.collective(REDUCE, (make(_aten.cat.default, (flats,)), *members[0].args[1:])), members)


def _hand_out(make: "_Maker", flat: fx.Node, members: Sequence[fx.Node]) -> list[fx.Node]:
    """Replace each member by a copy of its part of the flat result."""
    at = 0
    for member in members:
        shape = list(member.meta["val"].shape)
        length = member.meta["val"].numel()
        piece = make(_aten.slice.Tensor, (flat, 0, at, at + length))
        _replace(member, make(_aten.clone.default, (make(_aten.view.default, (piece, shape)),)))
        at += length
    return make.made


class _Maker:
    """Creates nodes with the provenance of `like`, at the end of the graph; `_sort` moves them."""

    def __init__(self, graph: fx.Graph, like: fx.Node) -> None:
        self._graph, self._like = graph, like
        self.made: list[fx.Node] = []

    def __call__(self, target: Callable[..., Any], args: tuple[Any, ...]) -> fx.Node:
        with self._graph.inserting_before(self._graph.output_node()):
            node = self._graph.call_function(target, args)
        node.meta.update({k: v for k, v in self._like.meta.items() if k not in ("val", "sized", "purpose")})
        node.meta["val"] = value_of(node)
        self.made.append(node)
        return node

    def collective(self, target: Callable[..., Any], args: tuple[Any, ...]) -> fx.Node:
        """A collective and its wait."""
        start = self(target, args)
        start.meta["purpose"] = self._like.meta.get("purpose", "")
        end = self(WAIT, (start,))
        start.meta["val"] = end.meta["val"]
        return end


def _replace(member: fx.Node, new: fx.Node) -> None:
    """Let the readers of a collective's waits read `new`, and erase the collective and its waits."""
    for wait in list(member.users):
        assert wait.target is WAIT, "a started collective is only waited for"
        wait.replace_all_uses_with(new)
        new.meta["val"] = wait.meta["val"]  # later views share this memory
        wait.graph.erase_node(wait)
    member.graph.erase_node(member)


def _sort(module: fx.GraphModule, priority: dict[fx.Node, float]) -> None:
    """Sort the nodes topologically; among the nodes that are ready, the lowest priority comes first."""
    graph = module.graph
    nodes = [n for n in graph.nodes if n.op != "output"]
    missing = {n: len(n.all_input_nodes) for n in nodes}
    number = {n: i for i, n in enumerate(nodes)}
    placed = 0
    ready = [(priority[n], number[n], n) for n in nodes if missing[n] == 0]
    heapq.heapify(ready)
    previous: fx.Node | None = None
    while ready:
        _, _, node = heapq.heappop(ready)
        placed += 1
        if previous is not None:
            previous.append(node)
        previous = node
        for user in node.users:
            if user in missing:
                missing[user] -= 1
                if missing[user] == 0:
                    heapq.heappush(ready, (priority[user], number[user], user))
    assert placed == len(nodes), "a bucket holds two collectives of which one is computed from the other"
    graph.lint()
    module.recompile()
