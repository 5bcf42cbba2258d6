"""How the value of each node of a rank's graph is spread over the mesh: equal on all ranks, a piece of an array, or
local to the rank.

The graph of one rank holds local tensors, and no op says of which arrays they are pieces. This file computes a `Spread`
for every node, op by op, from the spreads of the graph's inputs:

- The result of an elementwise op on pieces is a piece of an array of the same shape.
- The result of a collective is equal on its ranks.
- A reduction over a divided dim gives only a part of the array's result. Either it is finished over the ranks (`Fix`),
  or its spread records the op as `cause`, and a result of the step that depends on it is refused with the user's line.

It also works during a trace, so that a loss can be differentiated at parameters that the step itself has computed.

Terms: a "piece" is a rank's part of an array (`ftrain.sharding.placement.Placement`). A value of a rank's "own" differs
between ranks and is no piece of an array.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import fx

from ftrain.graph.loop import is_loop, loop_body
from ftrain.graph.op_effects import draws
from ftrain.sharding.collectives import gather_ranks
from ftrain.sharding.mesh import BASE_AXES, Mesh
from ftrain.sharding.placement import Placement, Split
from ftrain.trace.spread_ops import (
    ALONG,
    CONSTANTS,
    PRODUCTS,
    REDUCTIONS,
    SCATTERS,
    coordinates_of,
    group_of,
    is_elementwise,
    is_number,
    is_view,
    norm_order,
    reduced_dims,
    takes_statistics,
    tensor_of,
)
from ftrain.trace.spread_views import keeps_divided, moved

_aten, _c10d = torch.ops.aten, torch.ops._c10d_functional
_FOLDED = frozenset({"shard", "sequence"})
_EXPERTS = frozenset({"expert", "expert_shard"})


@dataclass(frozen=True)
class Spread:
    """How one value is spread over the mesh. The default is equal on all ranks.

    - `axes`: the mesh axes along which ranks may hold different values.
    - `placement`: the array of which the value is a piece, and how it is divided; None for no piece.
    - `uniform`: all elements are one number, so the value counts as a piece of any array that it is combined with.
    - `batch`: a stack along dim 0 of matrices (of experts) that differ between ranks and are no piece of one array.
    - `drawn`: random numbers drawn from a key for a shape. They are equal on all ranks, so they are not the numbers
      that the rows of a whole batch would get.
    - `cause`: an op that read one rank's piece as if it were the whole array, so that the value differs from that of
      one device; None if there is none.
    """

    axes: frozenset[str] = frozenset()
    placement: Placement | None = None
    uniform: bool = False
    batch: bool = False
    drawn: bool = False
    cause: fx.Node | None = field(default=None, compare=False)


SAME = Spread()
_UNIFORM = Spread(uniform=True)


def placed(placement: Placement) -> Spread:
    """The spread of a value with this placement: a piece, or equal on all ranks if no dim is divided."""
    axes = frozenset(axis for split in placement.splits for axis in split.axes)
    return Spread(axes, placement) if axes else SAME


class Fix(NamedTuple):
    """A reduction over divided dims that must be finished over the ranks with the other pieces.

    - `node`: the reduction. `how`: "sum", "mean", "max", "min", "all", "any" or "norm".
    - `placement`: the array of which its input is a piece.
    - `over`: the divided dims that it reduces. `dims`: all dims that it reduces.
    """

    node: fx.Node
    how: str
    placement: Placement
    over: tuple[Split, ...]
    dims: frozenset[int]


class Spreads:
    """Computes and caches the spreads of graphs' nodes on `mesh`, in the order of each graph.

    `everywhere`: the mesh axes with more than one rank. `fixes`: by node, the fixes that the spreads rely on.
    """

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.everywhere = frozenset(axis for axis in BASE_AXES if mesh.axis_size(axis) > 1)
        self.fixes: dict[fx.Node, Fix] = {}
        self._known: dict[fx.Node, Spread] = {}
        self._latest: dict[fx.Graph, fx.Node] = {}
        self._of_loops: dict[fx.Node, list[Spread]] = {}

    def of(self, node: fx.Node) -> Spread:
        """The spread of a node. The graph may still be under construction."""
        graph = node.graph
        while node not in self._known:
            latest = self._latest.get(graph)
            following = next(iter(graph.nodes)) if latest is None else latest.next
            self._known[following] = self._compute(following)
            self._latest[graph] = following
        return self._known[node]

    def set(self, node: fx.Node, spread: Spread) -> None:
        """Set the spread of a node, for inputs and for nodes whose op does not determine it."""
        node.meta["spread"] = spread
        self.recompute(node)

    def recompute(self, node: fx.Node) -> None:
        """Compute the spread of a node again, after a note in its `meta`. Nodes that depend on it are not updated."""
        self._of_loops.clear()
        if node in self._known:
            self._known[node] = self._compute(node)

    def discard_after(self, node: fx.Node) -> None:
        """Discard the spreads and fixes of all nodes after this one, because the trace will replace these nodes."""
        self._of_loops.clear()
        after = node.next
        while after.op != "root":
            self._known.pop(after, None)
            self.fixes.pop(after, None)
            after = after.next
        if self._latest.get(node.graph) not in self._known:
            self._latest[node.graph] = node

    def of_loop(self, node: fx.Node, carry: list[Spread] | None = None) -> list[Spread]:
        """The spread of each result of a loop: a fixed point of the loop's body.

        `carry`: the spreads of the carry to begin with; None for those of the loop's inputs.
        """
        inputs, xs, consts = (list(group) for group in node.args[2:])  # type: ignore[arg-type]
        given = carry if carry is not None else [self.of(n) for n in inputs]
        rows = [_without_first_dim(self.of(x)) for x in xs]
        body = loop_body(node) if node.graph.owning_module is not None else node.meta["body"]
        placeholders = [n for n in body.graph.nodes if n.op == "placeholder"]
        for inner, spread in zip(placeholders, [*given, *rows, *map(self.of, consts)], strict=True):
            self.set(inner, spread)
        self._latest.pop(body.graph, None)
        for inner in body.graph.nodes:
            self._known.pop(inner, None)
            self.fixes.pop(inner, None)
        results = [self.of(n) for n in body.graph.output_node().args[0]]  # type: ignore[union-attr,arg-type]
        joined = [_either(a, b) for a, b in zip(given, results, strict=True)]
        return joined if joined == given else self.of_loop(node, joined)

    def _compute(self, node: fx.Node) -> Spread:
        noted = node.meta.get("spread")
        if isinstance(noted, Spread):
            return noted
        if node.op != "call_function":
            return SAME
        computed = self._of_op(node)
        noted = node.meta.get("spread_if_clean")
        return replace(noted, cause=computed.cause) if isinstance(noted, Spread) else computed

    def _of_op(self, node: fx.Node) -> Spread:
        if is_loop(node):
            return SAME  # the spread of each result is computed at its getitem
        parents = [self._known[n] for n in node.all_input_nodes]
        cause = next((p.cause for p in parents if p.cause is not None), None)
        if getattr(node.target, "__name__", "") == "getitem" and node.op == "call_function":
            source = node.args[0]
            assert isinstance(source, fx.Node)
            return self._of_result(source, node.args[1]) if is_loop(source) else self._known[source]  # type: ignore[arg-type]
        group = group_of(node)
        if group is not None:
            return replace(self._of_collective(node, group, parents), cause=cause)
        if node.meta.get("purpose"):  # an inner node of a collective; its result has a note
            return Spread(frozenset[str]().union(*(p.axes for p in parents)), cause=cause)
        found = self._of_plain(node, parents)
        return found if cause is None else replace(found, cause=cause)

    def _of_result(self, loop: fx.Node, number: int) -> Spread:
        """One result of a loop; a body is gone through once for all of them, until a spread is set or recomputed."""
        if loop not in self._of_loops:
            self._of_loops[loop] = self.of_loop(loop)
        return self._of_loops[loop][number]

    def _of_collective(self, node: fx.Node, group: str, parents: list[Spread]) -> Spread:
        before = frozenset[str]().union(*(p.axes for p in parents))
        axes = frozenset(group.removeprefix("axis_").split("@")[0].split("+"))
        axes = frozenset("sequence" if ":" in axis else axis for axis in axes)
        if node.target in (_c10d.all_reduce.default, gather_ranks):
            return Spread(_without(before, axes))
        return Spread(before | axes)

    def _of_plain(self, node: fx.Node, parents: list[Spread]) -> Spread:
        target = node.target
        if target in CONSTANTS:
            return _constant(node, parents)
        if draws(node):
            return Spread(self.everywhere, cause=node if self.everywhere else None)
        if target is torch.ops.ftrain.philox.default:
            value = tensor_of(node)
            return Spread(drawn=node.args[1] is None and value is not None and value.numel() > 1)
        axes = frozenset[str]().union(*(p.axes for p in parents))
        if axes and takes_statistics(node):
            return Spread(axes, cause=node)
        if any(p.batch for p in parents):
            alone = is_elementwise(target) or is_view(target) or _keeps_batches(node)
            return Spread(axes, batch=True) if alone else Spread(axes, cause=node)
        if not any(p.placement is not None for p in parents):
            keeps = is_elementwise(target) or getattr(target, "is_view", False)
            alike = all(p.uniform or is_number(n) for p, n in zip(parents, node.all_input_nodes, strict=True))
            uniform = any(p.uniform for p in parents) and not axes and alike and keeps
            drawn = any(p.drawn for p in parents) and (keeps or is_view(target))
            if axes and drawn and _rows_were_drawn(self._known, node):
                return Spread(axes, cause=node)
            return Spread(axes, uniform=uniform, drawn=drawn and not axes)
        if any(p.axes and p.placement is None for p in parents):
            return Spread(axes, cause=_mixing(node, parents))
        if is_elementwise(target):
            return self._together(node, axes)
        view = moved(node, [self._known.get(n, SAME).placement for n in node.all_input_nodes])
        if view is not None:
            return placed(view)
        if is_view(target) and not any(s.gathered for p in parents if p.placement for s in p.placement.splits):
            return Spread(axes, batch=True)
        if target in REDUCTIONS:
            return self._reduced(node, parents[0])
        if target in ALONG:
            return _along(node, parents[0], axes)
        if target in SCATTERS:
            return self._scattered(node, axes)
        return self._of_product(node, axes) or Spread(axes, cause=node)

    def _together(self, node: fx.Node, axes: frozenset[str]) -> Spread:
        """The spread of an elementwise op, with broadcasting."""
        value = tensor_of(node)
        if value is None:
            return Spread(axes, cause=node)
        sizes, splits, copies = list(value.shape), dict[int, Split](), tuple[str, ...]()
        for source in node.all_input_nodes:
            spread, own = self._known[source], tensor_of(source)
            if own is None or spread.placement is None:
                continue
            copies = spread.placement.copies
            shift = len(sizes) - own.dim()
            for split in spread.placement.splits:
                dim = split.dim + shift
                if splits.setdefault(dim, split._replace(dim=dim))[1:] != split[1:]:
                    return Spread(axes, cause=node)
                sizes[dim] = spread.placement.shape[split.dim]
        for source in node.all_input_nodes:
            spread, own = self._known[source], tensor_of(source)
            if own is None:
                continue
            held = {s.dim + len(sizes) - own.dim() for s in spread.placement.splits} if spread.placement else set()
            for dim, split in splits.items():
                at = dim - (len(sizes) - own.dim())
                fits = (1, -(-sizes[dim] // split.size)) if spread.uniform else (1,)
                if dim not in held and at >= 0 and own.shape[at] not in fits:
                    return Spread(axes, cause=node)
        if share_ranks(splits.values()):
            return Spread(axes, cause=node)
        return placed(Placement(tuple(sizes), tuple(splits[d] for d in sorted(splits)), copies))

    def _reduced(self, node: fx.Node, source: Spread) -> Spread:
        placement, value = source.placement, tensor_of(node.args[0])
        if placement is None or value is None:
            return Spread(source.axes, cause=node)
        (dims, keep), how = reduced_dims(node, value.dim()), REDUCTIONS[node.target]
        over = [s for s in placement.splits if s.dim in dims]
        left = [s for s in placement.splits if s.dim not in dims]
        if over:
            uneven = any(placement.shape[s.dim] % s.size for s in over) and coordinates_of(node.graph) is None
            if uneven or (how == "norm" and norm_order(node) not in (1, 2, float("inf"))):
                return Spread(source.axes, cause=node)
            self.fixes[node] = Fix(node, how, placement, tuple(over), frozenset(dims))
        kept = [d for d in range(value.dim()) if keep or d not in dims]
        sizes = tuple(1 if d in dims else placement.shape[d] for d in kept)
        splits = tuple(s._replace(dim=kept.index(s.dim)) for s in left)
        copies = tuple(dict.fromkeys([*placement.copies, *(a for s in over for a in s.axes)]))
        return placed(Placement(sizes, splits, copies))

    def _scattered(self, node: fx.Node, axes: frozenset[str]) -> Spread:
        """The spread of an array after a write into a part of an undivided dim, of an array that is divided equally."""
        into, written = (self._known[n] for n in node.args[:2])  # type: ignore[index]
        if into.placement is None or not keeps_divided(node, into.placement, first=2):
            return Spread(axes, cause=node)
        given: Any = node.args[2] if len(node.args) > 2 else 0
        dim = given % len(into.placement.shape)
        gone = node.target is _aten.select_scatter.default
        if gone and any(s.dim == dim for s in into.placement.splits):
            return Spread(axes, cause=node)
        splits = tuple(s._replace(dim=s.dim - int(gone and s.dim > dim)) for s in into.placement.splits)
        alike = written.placement is not None and written.placement.splits == splits
        return placed(into.placement) if alike or written.uniform else Spread(axes, cause=node)

    def _of_product(self, node: fx.Node, axes: frozenset[str]) -> Spread | None:
        """The spread of a matrix product; None if it sums over a divided dim."""
        value, splits, copies = tensor_of(node), dict[int, Split](), tuple[str, ...]()
        if node.target not in PRODUCTS or value is None:
            return None
        added, kept = PRODUCTS[node.target]
        factors = node.args[added : added + 2]
        sizes = list(value.shape)
        for source, dims in zip(factors, kept, strict=True):
            placement = self._known[source].placement  # type: ignore[index]
            for split in () if placement is None else placement.splits:
                if split.dim not in dims or splits.setdefault(dims[split.dim], split)[1:] != split[1:]:
                    return None
                sizes[split.dim] = placement.shape[split.dim]  # type: ignore[union-attr]
                copies = placement.copies  # type: ignore[union-attr]
        of_batches = len(sizes) == 3
        if of_batches and 0 in splits and any(self._known[n].placement is None for n in factors):  # type: ignore[index]
            return None
        if share_ranks(splits.values()):
            return None
        found = Placement(tuple(sizes), tuple(s._replace(dim=d) for d, s in sorted(splits.items())), copies)
        spread = placed(found)
        plus = self._known[node.args[0]] if added else _UNIFORM  # type: ignore[index]
        return spread if plus.uniform or plus == spread else None


def _keeps_batches(node: fx.Node) -> bool:
    """True for batched products, and for reductions that keep dim 0."""
    if node.target in (_aten.bmm.default, _aten.baddbmm.default):
        return True
    value = tensor_of(node.args[0]) if node.args else None
    if node.target not in REDUCTIONS or value is None:
        return False
    return 0 not in reduced_dims(node, value.dim())[0]


def _mixing(node: fx.Node, parents: Sequence[Spread]) -> fx.Node | None:
    """The node, if it combines a piece of a parameter, which must be gathered first, with a rank's own data."""
    pieces = (p.placement for p in parents if p.placement is not None and not p.uniform)
    splits = (s for placement in pieces for s in placement.splits)
    return node if any(split.gathered for split in splits) else None


def _without(axes: frozenset[str], group: frozenset[str]) -> frozenset[str]:
    """The axes along which a value still differs if it is equal over `group`.

    The expert axes are the shard and sequence axes, divided in another way.
    """
    if group & _EXPERTS and axes & _FOLDED:
        axes = (axes - _FOLDED) | _EXPERTS
    if group & _FOLDED and axes & _EXPERTS:
        axes = (axes - _EXPERTS) | _FOLDED
    return axes - group


def share_ranks(splits: Iterable[Split]) -> bool:
    """True if two dims are divided among the same ranks, which then hold only the blocks on the diagonal."""
    axes = [axis for split in splits for axis in split.axes]
    return len(set(axes)) < len(axes) or not (_FOLDED.isdisjoint(axes) or _EXPERTS.isdisjoint(axes))


def _without_first_dim(spread: Spread) -> Spread:
    """The spread of one row along dim 0."""
    placement = spread.placement
    if placement is None:
        return spread
    splits = tuple(s._replace(dim=s.dim - 1) for s in placement.splits if s.dim)
    return replace(spread, placement=Placement(placement.shape[1:], splits, placement.copies))


def _either(a: Spread, b: Spread) -> Spread:
    """The spread of a value that has one of two spreads: what holds for both."""
    cause = a.cause or b.cause
    if a.uniform and not b.uniform:
        return replace(b, cause=cause)
    if b.uniform and not a.uniform:
        return replace(a, cause=cause)
    same = a.placement == b.placement
    placement = a.placement if same else None
    joined = Spread(a.axes | b.axes, placement, a.uniform and b.uniform, a.batch and b.batch, a.drawn or b.drawn)
    return replace(joined, cause=cause)


def tainted(nodes: Iterable[fx.Node], of: Callable[[fx.Node], Spread]) -> fx.Node | None:
    """The first of `nodes` whose spread has a cause; None if there is none. `of`: the spread of a node."""
    return next((n for n in nodes if of(n).cause is not None), None)


def _constant(node: fx.Node, parents: list[Spread]) -> Spread:
    """A tensor of one number. With the shape of a piece, it counts as a piece of such an array."""
    value = tensor_of(node)
    for source, spread in zip(node.all_input_nodes, parents, strict=True):
        like = tensor_of(source)
        if spread.placement is not None and like is not None and value is not None and like.shape == value.shape:
            return Spread(spread.axes, spread.placement, uniform=True)
    return _UNIFORM


def _along(node: fx.Node, source: Spread, axes: frozenset[str]) -> Spread:
    """The spread of an op that works along one dim and treats the other dims as batch dims."""
    at = ALONG[node.target]
    given: Any = node.args[at] if len(node.args) > at else node.kwargs.get("dim", -1)
    value = tensor_of(node)
    if source.placement is None or value is None:
        return Spread(axes, cause=node)
    dims = {d % max(1, value.dim()) for d in (given if isinstance(given, list | tuple) else [given])}
    if any(s.dim in dims for s in source.placement.splits):
        return Spread(axes, cause=node)
    sizes = [value.shape[d] if d in dims else n for d, n in enumerate(source.placement.shape)]
    return placed(replace(source.placement, shape=tuple(sizes)))


def _rows_were_drawn(known: dict[fx.Node, Spread], node: fx.Node) -> bool:
    """True if numbers drawn for a shape are combined with a rank's own rows, with other numbers for each row."""
    value = tensor_of(node)
    for source in node.all_input_nodes:
        own = tensor_of(source)
        drawn = known[source].drawn and own is not None and value is not None
        if drawn and own.dim() == value.dim() and own.dim() > 0 and own.shape[0] > 1:  # type: ignore[union-attr]
            return True
    return False
