"""A trace for one rank of a mesh: which tensors are pieces of what.

Leaves of the state are found by path: one whose path ends with a parameter's, and whose dims are the parameter's or 1,
lies where the parameter lies (moments, averages). Later tensors are found by what they were computed from: the nearest
such leaf, or gradient, behind them in the graph.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, fx

from ftrain import tree
from ftrain.private import node_of
from kernels.mean import Mean
from sharding.collectives import sum_of_parts
from sharding.mesh import BASE_AXES, Mesh
from sharding.placement import Placement
from sharding.plan import Plan
from sharding.spmd import on_mesh


class Placements:
    """Where the pieces of parameters are, by path, and of every other leaf of a state by its likeness to one."""

    def __init__(self, plan: Plan, known: dict[str, Placement] | None = None) -> None:
        self.plan = plan
        self.known = dict(known or {})

    def parameter(self, path: str) -> str | None:
        """The longest known parameter path that `path` ends with."""
        parts = path.split(".")
        return next((tail for i in range(len(parts)) if (tail := ".".join(parts[i:])) in self.known), None)

    def of_whole(self, path: str, shape: Sequence[int]) -> Placement:
        """Where the pieces of a leaf are whose global shape is `shape`."""
        found = self._alike(path, shape, local=False)
        return found if found is not None else Placement(tuple(shape))

    def of_local(self, path: str, shape: Sequence[int]) -> Placement:
        """The same for a leaf of which a rank holds `shape`."""
        found = self._alike(path, shape, local=True)
        return found if found is not None else Placement(tuple(shape))

    def _alike(self, path: str, shape: Sequence[int], *, local: bool) -> Placement | None:
        name = self.parameter(path)
        if name is None:
            return None
        model = self.known[name]
        sizes = model.local_shape if local else model.shape
        if len(shape) != len(sizes) or any(n not in (1, size) for n, size in zip(shape, sizes, strict=True)):
            return None
        kept = tuple(s for s in model.splits if shape[s.dim] == sizes[s.dim])
        whole = tuple(full if n == size else 1 for n, size, full in zip(shape, sizes, model.shape, strict=True))
        return Placement(whole, kept, model.copies)

    def learn(self, path: str, placement: Placement) -> None:
        """Note where a parameter is; ValueError if another one of that name is elsewhere."""
        before = self.known.setdefault(path, placement)
        if before != placement:
            raise ValueError(
                f"two parameters are called {path!r} and lie differently ({before} and {placement}): put the models "
                "under names of their own in one tree of specs"
            )


class ShardedTrace:
    """What one trace for a rank knows: of which tensors the pieces lie where, and which component they belong to."""

    def __init__(self, placements: Placements) -> None:
        self.placements, self.plan = placements, placements.plan
        self._known: dict[fx.Node, tuple[str, Placement]] = {}
        self._packs: dict[fx.Node, Any] = {}

    def note(self, tensor: Any, path: str, placement: Placement | None = None) -> None:
        """Remember that a tensor of the trace is (a use, or the gradient, of) the leaf at `path`."""
        node = node_of(tensor) if isinstance(tensor, Tensor) else None
        if node is None:
            return
        if placement is None:
            placement = self.placements.of_local(path, tensor.shape)
        self._known.setdefault(node, (path, placement))

    def find_leaf(self, tensor: Tensor) -> tuple[str, Placement] | None:
        """The path and placement of a leaf of the state; None for any other tensor."""
        node = node_of(tensor)
        return None if node is None else self._known.get(node)

    def find(self, tensor: Tensor) -> tuple[str, Placement] | None:
        """The path and placement of the nearest known leaf that `tensor` was computed from, itself included."""
        start = node_of(tensor)
        queue, seen = deque([] if start is None else [start]), {start}
        while queue:
            node = queue.popleft()
            if node in self._known:
                return self._known[node]
            for parent in node.all_input_nodes:
                if parent not in seen:
                    seen.add(parent)
                    queue.append(parent)
        return None

    def component(self, *tensors: Tensor) -> str:
        """The path of the parameter that these tensors come from; empty if from none."""
        found = next((f for f in map(self.find, tensors) if f is not None), None)
        return (self.placements.parameter(found[0]) or found[0]) if found else ""

    def placement(self, leaf: Tensor) -> Placement:
        """Where the pieces of a leaf, or of what was computed from it, are."""
        found = self.find(leaf)
        return found[1] if found is not None else Placement(tuple(leaf.shape))

    def pack(self, segments_T: Tensor, make: Callable[[], Any]) -> Any:
        """What is made once for each tensor of segments: the segments of the whole pack."""
        node = node_of(segments_T)
        if node is None:
            return make()
        if node not in self._packs:
            self._packs[node] = make()
        return self._packs[node]


_current: ContextVar[ShardedTrace | None] = ContextVar("ftrain_sharded_trace", default=None)


def current_sharded() -> ShardedTrace | None:
    """The trace for a rank that is under way, or None."""
    return _current.get()


@contextmanager
def tracing_rank(trace: ShardedTrace, coordinates_3: Tensor) -> Iterator[None]:
    """Within the block `value_and_grad` gathers parameters, and `axis_index` reads these coordinates."""
    token = _current.set(trace)
    try:
        with on_mesh(trace.plan.mesh, coordinates_3):
            yield
    finally:
        _current.reset(token)


def note_gradients(leaves: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    """Remember that the gradient of a leaf that is a piece is a piece of the same place."""
    trace = current_sharded()
    if trace is None:
        return
    for leaf, gradient in zip(leaves, gradients, strict=True):
        found = trace.find_leaf(leaf)
        if found is not None:
            trace.note(gradient, *found)


def reduce_means(result: Any, trace: ShardedTrace) -> Any:
    """Every `Mean` in a step's result summed over the mesh, all in one exchange."""
    leaves, treedef = tree.flatten_until(result, Mean)
    means = [m for m in leaves if isinstance(m, Mean)]
    if not means or trace.plan.mesh.size == 1:
        return result
    dtype = torch.float64 if any(m.total.dtype == torch.float64 for m in means) else torch.float32
    flat = torch.stack([x.detach().to(dtype) for m in means for x in m])
    sums = iter(sum_over_mesh(flat, trace.plan.mesh).unbind())
    summed = [Mean(*(next(sums).to(x.dtype) for x in m)) if isinstance(m, Mean) else m for m in leaves]
    return tree.unflatten(treedef, summed)


def sum_over_mesh(x: Tensor, mesh: Mesh) -> Tensor:
    """The sum over all ranks; the gradient of a part is that of the sum."""
    return sum_of_parts(x, mesh.group(*BASE_AXES), purpose="loss")
