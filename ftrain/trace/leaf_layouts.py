"""Refuses leaves that are not contiguous where the results of a step depend on their memory layout.

A trace assumes contiguous leaves, and the program gets contiguous copies of the others. Their values are the same, but
some ops depend on the layout: `x.as_strided` reads other elements, and `torch.rand_like(x)` or dropout of `x` (or of
values computed elementwise from `x`) give elements other random numbers. So for leaves that are not contiguous, the
layouts in the graph are computed again on fake tensors. A call is refused if such an op would get another layout than
in the trace, or if the user's Python code would read another layout (`ftrain.trace.layout_reads`).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ftrain.graph.layouts import lies_as
from ftrain.graph.loop import is_loop, loop_body
from ftrain.graph.op_effects import draws
from ftrain.graph.sizes import has_static_layout
from ftrain.graph.torch_private import fake_mode_of, paused_trace
from ftrain.trace.layout_reads import LayoutReads, is_made_contiguous, part_of

_aten = torch.ops.aten
_BY_STRIDES = (_aten.as_strided.default, _aten.as_strided_copy.default, _aten.as_strided_scatter.default)
_Strides = tuple[tuple[int, ...] | None, ...]  # of each leaf; None for a contiguous one
_VIEWS = (_aten.view.default, _aten._unsafe_view.default)


class LeafLayouts:
    """Checks leaves against the ops of one graph, and the user's code, that depend on memory layouts."""

    def __init__(self, module: fx.GraphModule, paths: Sequence[str], reads: LayoutReads) -> None:
        """`module`: a functional graph; `paths`: of its placeholders; `reads`: the layout queries of the trace."""
        self._paths, self._reads = list(paths), reads
        nodes = [n for n in module.graph.nodes if _depends_on_layout(n)]
        self._graph = part_of(module.graph, nodes)[0] if nodes else None
        self._judged: set[_Strides] = set()

    def require_same_results(self, leaves: Sequence[Tensor]) -> None:
        """ValueError, with leaf and line, for leaves with which the step would compute other values in eager code.

        `leaves`: one tensor per placeholder, of its shape. Each combination of strides is checked once.
        """
        if self._graph is None and not self._reads.found:
            return
        strides = tuple(None if leaf.is_contiguous() else leaf.stride() for leaf in leaves)
        if strides in self._judged:
            return
        if self._graph is not None:
            self._judge(self._graph, strides)
        self._repeat_reads(strides)
        self._judged.add(strides)

    def _repeat_reads(self, strides: _Strides) -> None:
        """ValueError if the user's code would read other layouts with leaves of these strides."""
        found = {} if self._reads.graph is None else self._judge(self._reads.graph, strides, refuse=False)
        for read in self._reads.found:
            value = found.get(read.node) if read.node is not None else None
            if any(strides) and (read.node is None or (value is not None and read.ask(value) != read.answer)):
                at = next(i for i, stride in enumerate(strides) if stride is not None)
                if read.node is not None and self._reads.graph is not None:
                    slots = [n for n in self._reads.graph.nodes if n.op == "placeholder"]
                    at = slots.index(next(n for n in (read.node, *_ancestors(read.node, found)) if n in slots))
                raise ValueError(
                    f"{read.what} reads the memory layout of a tensor, which depends on leaf {self._paths[at]!r} with "
                    f"strides {strides[at]}, while the step is traced for contiguous leaves, so that it could take "
                    "another branch: pass leaf.contiguous()"
                )

    def _judge(self, graph: fx.Graph, strides: _Strides, *, refuse: bool = True) -> dict[fx.Node, Any]:
        """The values whose layout differs from the trace. `refuse`: ValueError for an op that depends on it."""
        slots = [n for n in graph.nodes if n.op == "placeholder"]
        found: dict[fx.Node, Any] = {}
        for node, stride in zip(slots, strides, strict=True):
            if stride is not None and has_static_layout(node.meta["val"]):
                found[node] = node.meta["val"].new_empty_strided(node.meta["val"].shape, stride)
        with paused_trace(), fake_mode_of([n.meta["val"] for n in slots]):
            for node in graph.nodes:
                if node.op != "call_function" or not any(n in found for n in node.all_input_nodes):
                    continue
                if is_made_contiguous(node):
                    continue
                value = _recomputed(node, found)
                if value is not None and not _same_layout(value, node.meta["val"]):
                    found[node] = value
                culprit = _first_that_depends(node, node, found) if refuse else None
                if culprit is not None:
                    self._refuse(node, culprit, found)
        return found

    def _refuse(self, node: fx.Node, culprit: fx.Node, found: dict[fx.Node, Any]) -> None:
        slots = [n for n in node.graph.nodes if n.op == "placeholder"]
        leaf = next(n for n in _ancestors(node, found) if n.op == "placeholder")
        raise ValueError(
            f"{culprit.meta.get('source')}: {culprit.target} depends on the memory layout of its argument, and so on "
            f"leaf {self._paths[slots.index(leaf)]!r} with strides {tuple(found[leaf].stride())}, while the step is "
            "traced for contiguous leaves, so that its numbers would differ: pass leaf.contiguous(), or use an op that "
            "takes a shape, e.g. torch.rand(x.shape)"
        )


def _depends_on_layout(node: fx.Node) -> bool:
    """True for an op whose values depend on the memory layout of its argument."""
    if is_loop(node):
        return any(map(_depends_on_layout, loop_body(node).graph.nodes))
    if node.kwargs.get("memory_format") is torch.contiguous_format:  # the result is contiguous in any case
        return False
    return node.op == "call_function" and (node.target in _BY_STRIDES or draws(node))


def _first_that_depends(op: fx.Node, node: fx.Node, found: dict[fx.Node, Any]) -> fx.Node | None:
    """`op`, or an op in its body if it is a loop, if its values change with the layouts in `found` that `node` reads.

    Random numbers depend only on the order of dims in memory, not on gaps between rows.
    """
    if is_loop(op):
        inner = (_first_that_depends(n, node, found) for n in loop_body(op).graph.nodes)
        return next((n for n in inner if n is not None), None)
    if not _depends_on_layout(op):
        return None
    read = [n for n in (*node.all_input_nodes, node) if n in found]
    pairs = [p for n in read for p in zip(_tensors(found[n]), _tensors(n.meta["val"]), strict=True)]
    return op if op.target in _BY_STRIDES or any(_order(a) != _order(b) for a, b in pairs) else None


def _order(value: Tensor) -> list[int] | None:
    """The dims from the slowest to the fastest in memory; None where elements share memory."""
    strides = value.stride()
    dims = [d for d in range(value.dim()) if value.shape[d] > 1]
    if any(strides[d] == 0 for d in dims):
        return None
    return sorted(dims, key=lambda d: -strides[d])


def _ancestors(node: fx.Node, among: dict[fx.Node, Any]) -> list[fx.Node]:
    found, left = list[fx.Node](), [node]
    while left:
        fresh = [n for n in left.pop().all_input_nodes if n in among and n not in found]
        found += fresh
        left += fresh
    return found


def _recomputed(node: fx.Node, found: dict[fx.Node, Any]) -> Any:
    """The fake value of a node with the layouts in `found`; None if its layout does not follow from theirs."""
    if is_loop(node) or not all(map(has_static_layout, _tensors(node.meta["val"]))):
        return None
    target = _aten.reshape.default if node.target in _VIEWS else node.target
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: found.get(n, n.meta["val"]))
    return target(*args, **kwargs)  # type: ignore[operator]


def _same_layout(value: Any, traced: Any) -> bool:
    return all(lies_as(a, b) for a, b in zip(_tensors(value), _tensors(traced), strict=True))


def _tensors(value: Any) -> list[Tensor]:
    parts = value if isinstance(value, list | tuple) else [value]
    return [x for x in parts if isinstance(x, Tensor)]
