"""The trace for one rank of a mesh: of which arrays its tensors are pieces.

A leaf of the state whose path ends with that of a parameter, and whose dims are the parameter's or 1, is divided as the
parameter is (moments, averages). Any other leaf is whole on every rank. For values computed from leaves, the ops
determine it (`ftrain.trace.spread`).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from ftrain import tree
from ftrain.graph.torch_private import constant_of, functional_transform, node_of
from ftrain.kernels.mean import Mean
from ftrain.sharding import batch as batch_rules
from ftrain.sharding.collectives import copy_to_ranks, sum_of_parts
from ftrain.sharding.mesh import BASE_AXES, Mesh
from ftrain.sharding.paths import nearest
from ftrain.sharding.placement import Placement
from ftrain.sharding.plan import Plan
from ftrain.sharding.spmd import axis_index, on_mesh
from ftrain.trace.batch_kinds import UNKNOWN, Kind
from ftrain.trace.batch_rows import BatchRows
from ftrain.trace.provenance import sources
from ftrain.trace.refusals import Untraceable
from ftrain.trace.spread import SAME, Spread, Spreads, placed


class Placements:
    """The placements of parameters by path, and of other leaves of a state by the parameter that they belong to.

    `plan`: the plan of the mesh. `parameters`: placements of parameters by path.
    """

    def __init__(self, plan: Plan, parameters: dict[str, Placement] | None = None) -> None:
        self.plan = plan
        self._parameters = dict(parameters or {})

    def parameter_of(self, path: str) -> str | None:
        """The longest path of a parameter that `path` ends with; None if there is none."""
        parts = path.split(".")
        return next((tail for i in range(len(parts)) if (tail := ".".join(parts[i:])) in self._parameters), None)

    def of_global(self, path: str, shape: Sequence[int]) -> Placement:
        """The placement of a leaf with this path and global `shape`."""
        found = self._alike(path, shape, local=False)
        return found if found is not None else Placement(tuple(shape))

    def of_constant(self, path: str, shape: Sequence[int]) -> Placement:
        """The placement of a leaf that every rank has created with equal values and this `shape`.

        It is whole if `shape` is that of the array or has dims of 1, else a piece.
        """
        found = self._alike(path, shape, local=False)
        if found is not None:
            return Placement(tuple(shape)) if found.splits else found
        return self.of_local(path, shape)

    def of_local(self, path: str, shape: Sequence[int]) -> Placement:
        """The placement of a leaf with this path, of which a rank holds a piece of this `shape`."""
        found = self._alike(path, shape, local=True)
        return found if found is not None else Placement(tuple(shape))

    def _alike(self, path: str, shape: Sequence[int], *, local: bool) -> Placement | None:
        name = self.parameter_of(path)
        if name is None:
            return None
        model = self._parameters[name]
        sizes = model.local_shape if local else model.shape
        if len(shape) != len(sizes) or any(n not in (1, size) for n, size in zip(shape, sizes, strict=True)):
            return None
        kept = tuple(s for s in model.splits if shape[s.dim] == sizes[s.dim])
        whole = tuple(full if n == size else 1 for n, size, full in zip(shape, sizes, model.shape, strict=True))
        return Placement(whole, kept, model.copies)

    def nearest(self, path: str) -> str:
        """The end of an error message that names the parameter with the path most similar to the end of `path`.

        Empty if no parameter is known.
        """
        names = {".".join(k.split(".")[-2:]): k for k in self._parameters}
        near = nearest(".".join(path.split(".")[-2:]), names, cutoff=0.0)
        return "" if near is None else f"; the nearest it knows is {names[near]!r}"

    def register(self, path: str, placement: Placement) -> None:
        """Register the placement of a parameter. ValueError if another placement is registered for its path."""
        before = self._parameters.setdefault(path, placement)
        if before != placement:
            raise ValueError(
                f"two parameters have the path {path!r} and different placements ({before} and {placement}): put the "
                "models under names of their own in one tree of specs"
            )


class ShardedTrace:
    """The state of one trace for a rank: how its tensors are spread, and to which parameters they belong.

    `document_ids`: the set to which `note_documents` adds paths of the batch.
    """

    def __init__(self, placements: Placements, *, document_ids: set[str]) -> None:
        self.placements, self.plan = placements, placements.plan
        self._document_ids, self._batch = document_ids, dict[fx.Node, str]()
        self.spreads = Spreads(self.plan.mesh)
        self.rows = BatchRows(self.spreads)
        self._paths: dict[fx.Node, str] = {}
        self._packs: dict[fx.Node, Any] = {}
        self._strangers: dict[fx.Node, str] = {}

    def note_input(self, tensor: Tensor, path: str, spread: Spread, *, parameter: bool, batch: bool) -> None:
        """Record how an input of the step, `tensor` of any shape, is spread.

        `parameter`: the plan knows the array at `path`. `batch`: the input is a leaf of the batch.
        """
        node = node_of(tensor)
        if node is None:
            return
        self.spreads.set(node, spread)
        if parameter:
            self._paths[node] = path
        elif batch:
            self._batch[node] = path
        else:
            self._strangers[node] = path

    def note_documents(self, *segments: Any) -> None:
        """Record the leaves of the batch that attention reads as ids of documents."""
        nodes = [node_of(ids) for ids in segments if isinstance(ids, Tensor)]
        self._document_ids.update(self._batch[node] for node in nodes if node in self._batch)

    def note_use(self, tensor: Tensor, path: str, placement: Placement) -> None:
        """Record that a tensor, of any shape, is a parameter as a rank computes with it: gathered, except experts."""
        node = node_of(tensor)
        if node is not None:
            splits = tuple(s for s in placement.splits if not s.gathered)
            used = placed(Placement(placement.shape, splits, placement.copies))
            self._note(tensor, path, replace(used, cause=self.spreads.of(node).cause))

    def note_piece(
        self,
        tensor: Tensor,
        placement: Placement,
        path: str = "",
        *,
        of: Sequence[Tensor] = (),
        uniform: bool = False,
    ) -> None:
        """Record that a tensor, of the placement's local shape, is a piece, where its ops do not determine it.

        `path`: the parameter's. `of`: the tensors that it was computed from. `uniform`: all elements are one number.
        """
        nodes = [node for node in map(node_of, of) if node is not None]
        causes = (self.spreads.of(node).cause for node in nodes)
        cause = next((c for c in causes if c is not None), None)
        self._note(tensor, path, replace(placed(placement), uniform=uniform, cause=cause))

    def note_if_clean(self, tensor: Tensor, spread: Spread) -> None:
        """Record how a tensor, of any shape, is spread, if no value that it was computed from has a cause."""
        node = node_of(tensor)
        if node is not None:
            node.meta["spread_if_clean"] = spread
            self.spreads.recompute(node)

    def note_gradient(self, tensor: Tensor, leaf: Tensor) -> None:
        """Record that a gradient is divided as its leaf of the same shape, if no value behind it has a cause."""
        node, of = node_of(tensor), node_of(leaf)
        if node is None or of is None:
            return
        node.meta["spread_if_clean"] = replace(self.spreads.of(of), cause=None, uniform=False)
        self.spreads.recompute(node)
        if of in self._paths:
            self._paths.setdefault(node, self._paths[of])

    def _note(self, tensor: Tensor, path: str, spread: Spread) -> None:
        node = node_of(tensor)
        if node is not None:
            self.spreads.set(node, spread)
            if path:
                self._paths.setdefault(node, path)

    def array_of(self, tensor: Any) -> tuple[str, Placement] | None:
        """Path (or "") and placement of the array that a tensor is a piece or copy of; None for a rank's own value."""
        node = node_of(tensor) if isinstance(tensor, Tensor) else None
        if node is None:
            return None
        spread = self.spreads.of(node)
        path = self._paths.get(node, "")
        if spread.placement is not None:
            return path, spread.placement
        if spread.axes:
            return None
        return path, Placement(tuple(tensor.shape), (), tuple(a for a in BASE_AXES if a in self.spreads.everywhere))

    def require_known(self, tensor: Any) -> None:
        """ValueError, with its path, for an input of the step whose placement the plan does not know."""
        node = node_of(tensor) if isinstance(tensor, Tensor) else None
        if node in self._strangers and self.plan.mesh.size > 1:
            path = self._strangers[node]
            raise Untraceable(
                f"leaf {path!r} is differentiated, and the plan knows no parameter of that name and shape: make the "
                "state with step.init, or give jit(specs=...) a tree with it (ftrain.modules.spec.of(params) makes one "
                f"of tensors){self.placements.nearest(path)}"
            )

    def placement_of_piece(self, tensor: Any) -> Placement | None:
        """The placement of the array that a tensor is a piece of; None for no piece."""
        node = node_of(tensor) if isinstance(tensor, Tensor) else None
        return None if node is None else self.spreads.of(node).placement

    def component(self, *tensors: Tensor) -> str:
        """The path of the nearest parameter that these tensors, of any shapes, were computed from; empty for none."""
        found = next((f for f in map(self._nearest_path, tensors) if f), "")
        return self.placements.parameter_of(found) or found

    def _nearest_path(self, tensor: Tensor) -> str:
        start = node_of(tensor)
        return next((self._paths[n] for n in sources(start) if n in self._paths), "") if start is not None else ""

    def placement(self, leaf: Tensor) -> Placement:
        """The placement of a leaf, or of a value computed from it, of any shape; whole if it is no piece."""
        node = node_of(leaf)
        found = None if node is None else self.spreads.of(node).placement
        return found if found is not None else Placement(tuple(leaf.shape))

    def pack(self, segments_T: Tensor, make: Callable[[], Any]) -> Any:
        """The result of `make()`, called once for each tensor of segments: the segments of the whole pack."""
        node = node_of(segments_T)
        if node is None:
            return make()
        if node not in self._packs:
            self._packs[node] = make()
        return self._packs[node]


def batch_path(trace: ShardedTrace, tensor: Tensor) -> str | None:
    """The path within the batch of a tensor, of any shape, that is a leaf of it; None for any other tensor."""
    node = node_of(tensor)
    found = None if node is None else trace._batch.get(node)
    return None if found is None else found.partition(".")[2]


def note_rows(trace: ShardedTrace, tensor: Tensor, rule: batch_rules.BatchRule, *, ordered: bool = True) -> None:
    """Record which dim of a leaf of the batch, of any shape, runs over rows of which a rank has its share.

    `ordered`: the shares of all ranks, joined by the rule, are the batch's rows in their order.
    """
    node = node_of(tensor)
    if node is None or trace.plan.mesh.size == 1 or isinstance(rule, batch_rules.Replicated):
        return
    divided = isinstance(rule, batch_rules.Tokens | batch_rules.BatchRows) and tensor.dim() > rule.dim
    order = "tokens" if isinstance(rule, batch_rules.Tokens) else "rows"
    trace.rows.set(node, Kind("rows", rule.dim, order if ordered else "") if divided else UNKNOWN)  # type: ignore[union-attr]


def note_coordinates(coordinates_3: Tensor) -> None:
    """Record the input that holds the rank's mesh coordinates, int64 `[3]`."""
    node = node_of(coordinates_3)
    if node is not None:
        node.meta["coordinates"] = True


def spread_of(trace: ShardedTrace, tensor: Tensor) -> Spread:
    """How a tensor, of any shape, is spread over the ranks; what the trace does not know is the same on all."""
    node = node_of(tensor)
    return SAME if node is None else trace.spreads.of(node)


_current: ContextVar[ShardedTrace | None] = ContextVar("ftrain_sharded_trace", default=None)


def current_sharded() -> ShardedTrace | None:
    """The current trace for a rank, or None."""
    return _current.get()


@contextmanager
def tracing_rank(trace: ShardedTrace, coordinates_3: Tensor) -> Iterator[None]:
    """Within the block `value_and_grad` gathers parameters, and `axis_index` reads `coordinates_3`, int64 `[3]`."""
    token = _current.set(trace)
    try:
        with on_mesh(trace.plan.mesh, coordinates_3):
            yield
    finally:
        _current.reset(token)


_sums_totals: ContextVar[bool] = ContextVar("ftrain_sums_totals", default=False)


@contextmanager
def summing_totals() -> Iterator[None]:
    """Within the block a sum over the batch is the loss itself, which all ranks differentiate alike."""
    token = _sums_totals.set(True)
    try:
        yield
    finally:
        _sums_totals.reset(token)


def note_gradients(leaves: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    """Record that each gradient is divided as its leaf. Without a trace for a rank it does nothing."""
    trace = current_sharded()
    if trace is None:
        return
    for leaf, gradient in zip(leaves, gradients, strict=True):
        trace.note_gradient(gradient, leaf)


def reduce_means(result: Any, trace: ShardedTrace) -> Any:
    """The step's result with every `Mean` summed over the mesh, by one collective for all of them."""
    leaves, treedef = tree.flatten_until(result, Mean)
    means = [m for m in leaves if isinstance(m, Mean)]
    if not means or trace.plan.mesh.size == 1:
        return result
    dtype = torch.float64 if any(m.total.dtype == torch.float64 for m in means) else torch.float32
    flat = torch.stack([x.detach().to(dtype) for m in means for x in m])
    sums = iter(sum_over_mesh(flat, trace.plan.mesh).unbind())
    summed = [Mean(*(next(sums).to(x.dtype) for x in m)) if isinstance(m, Mean) else m for m in leaves]
    return tree.unflatten(treedef, summed)


def batch_sum(x: Tensor, mesh: Mesh) -> Tensor:
    """The sum of `x`, of any shape, over all ranks, which each rank uses further in its own total: the gradient
    of a part is the sum of what the totals of all ranks say of it.
    """
    total = sum_over_mesh(x, mesh)
    if _sums_totals.get() or not (x.requires_grad or functional_transform()):
        return total
    return copy_to_ranks(total, mesh.group(*BASE_AXES), purpose="loss")


def sum_over_mesh(x: Tensor, mesh: Mesh) -> Tensor:
    """The sum of `x` (any shape) over all ranks, equal on each; the gradient of a part is that of the sum."""
    if constant_of(x) is not None:  # the tracer would run a collective of constants at once
        x = x + axis_index("replicate").to(x.dtype) * 0
    return sum_of_parts(x, mesh.group(*BASE_AXES), purpose="loss")
