"""Leaves that do not lie row by row, where a step's numbers depend on how they lie.

A trace takes leaves as contiguous, and the program is given contiguous copies of those that are not. Their numbers are
the same, but not what is read along memory: `x.as_strided` reads other elements, and `torch.rand_like(x)`, dropout of
`x`, or of what is computed from it elementwise, put their random numbers elsewhere. So for leaves that lie otherwise
the layouts of the trace are worked out again, on shapes alone, and a call for which such an op would see another one is
refused, as is one for which the step's Python would read another one (`ftrain.trace.layout_reads`).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ftrain.graph.layouts import lies_as
from ftrain.graph.loop import is_loop, loop_body
from ftrain.graph.op_effects import Effect, effect_of
from ftrain.graph.sizes import has_static_layout
from ftrain.graph.torch_private import fake_mode_of, paused_trace
from ftrain.trace.layout_reads import LayoutReads, part_of

_aten = torch.ops.aten
_BY_STRIDES = (_aten.as_strided.default, _aten.as_strided_copy.default, _aten.as_strided_scatter.default)
_VIEWS = (_aten.view.default, _aten._unsafe_view.default)


class LeafLayouts:
    """Knows which ops of a graph see how its leaves lie in memory."""

    def __init__(self, module: fx.GraphModule, paths: Sequence[str], reads: LayoutReads) -> None:
        """`module`: a functional graph whose placeholders have these paths; `reads`: what Python read in the trace."""
        self._paths, self._reads = list(paths), reads
        nodes = [n for n in module.graph.nodes if _sees_memory(n)]
        self._graph = part_of(module.graph, nodes)[0] if nodes else None
        self._judged: set[tuple] = set()

    def require_alike(self, leaves: Sequence[Tensor]) -> None:
        """ValueError, with leaf and line, for leaves with which a step of eager PyTorch would have other numbers."""
        if self._graph is None and not self._reads.found:
            return
        strides = tuple(None if leaf.is_contiguous() else leaf.stride() for leaf in leaves)
        if strides in self._judged:
            return
        if self._graph is not None:
            self._judge(self._graph, strides)
        self._ask_again(strides)
        self._judged.add(strides)

    def _ask_again(self, strides: tuple) -> None:
        """ValueError where Python would read something else of leaves that lie like this."""
        found = {} if self._reads.graph is None else self._judge(self._reads.graph, strides, refuse=False)
        for read in self._reads.found:
            value = found.get(read.node) if read.node is not None else None
            if any(strides) and (read.node is None or (value is not None and read.ask(value) != read.answer)):
                at = next(i for i, stride in enumerate(strides) if stride is not None)
                if read.node is not None and self._reads.graph is not None:
                    slots = [n for n in self._reads.graph.nodes if n.op == "placeholder"]
                    at = slots.index(next(n for n in (read.node, *_ancestors(read.node, found)) if n in slots))
                raise ValueError(
                    f"{read.what} reads how a tensor lies in memory, which follows leaf {self._paths[at]!r} with "
                    f"strides {strides[at]}, while the step is traced for leaves that lie row by row, so that it would "
                    "go another way: pass leaf.contiguous()"
                )

    def _judge(self, graph: fx.Graph, strides: tuple, *, refuse: bool = True) -> dict[fx.Node, Any]:
        """The values that lie otherwise than in the trace; `refuse`: ValueError for an op that sees it."""
        slots = [n for n in graph.nodes if n.op == "placeholder"]
        found: dict[fx.Node, Any] = {}
        for node, stride in zip(slots, strides, strict=True):
            if stride is not None and has_static_layout(node.meta["val"]):
                found[node] = node.meta["val"].new_empty_strided(node.meta["val"].shape, stride)
        with paused_trace(), fake_mode_of([n.meta["val"] for n in slots]):
            for node in graph.nodes:
                if node.op != "call_function" or not any(n in found for n in node.all_input_nodes):
                    continue
                value = _worked_out(node, found)
                if value is not None and not _alike(value, node.meta["val"]):
                    found[node] = value
                culprit = _first_that_sees(node, node, found) if refuse else None
                if culprit is not None:
                    self._refuse(node, culprit, found)
        return found

    def _refuse(self, node: fx.Node, culprit: fx.Node, found: dict[fx.Node, Any]) -> None:
        slots = [n for n in node.graph.nodes if n.op == "placeholder"]
        leaf = next(n for n in _ancestors(node, found) if n.op == "placeholder")
        raise ValueError(
            f"{culprit.meta.get('source')}: {culprit.target} goes along the memory of its argument, which follows leaf "
            f"{self._paths[slots.index(leaf)]!r} with strides {tuple(found[leaf].stride())}, while the step is traced "
            "for leaves that lie row by row, so that its numbers would be others: pass leaf.contiguous(), or take an "
            "op of a given shape, e.g. torch.rand(x.shape)"
        )


def _sees_memory(node: fx.Node) -> bool:
    """True for an op whose numbers depend on how its argument lies in memory."""
    if is_loop(node):
        return any(map(_sees_memory, loop_body(node).graph.nodes))
    if node.kwargs.get("memory_format") is torch.contiguous_format:  # the numbers go by its rows
        return False
    return node.op == "call_function" and (node.target in _BY_STRIDES or effect_of(node) is Effect.RANDOM)


def _first_that_sees(op: fx.Node, node: fx.Node, found: dict[fx.Node, Any]) -> fx.Node | None:
    """`op`, or an op in it if it is a loop, if its numbers are others as the values found lie that `node` reads.

    Random numbers go by the order of dims in memory: what lies between rows does not count.
    """
    if is_loop(op):
        inner = (_first_that_sees(n, node, found) for n in loop_body(op).graph.nodes)
        return next((n for n in inner if n is not None), None)
    if not _sees_memory(op):
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


def _worked_out(node: fx.Node, found: dict[fx.Node, Any]) -> Any:
    """The value of a node whose inputs lie otherwise; None where its layout does not follow from theirs."""
    if is_loop(node) or not all(map(has_static_layout, _tensors(node.meta["val"]))):
        return None
    target = _aten.reshape.default if node.target in _VIEWS else node.target
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: found.get(n, n.meta["val"]))
    return target(*args, **kwargs)  # type: ignore[operator]


def _alike(value: Any, traced: Any) -> bool:
    return all(lies_as(a, b) for a, b in zip(_tensors(value), _tensors(traced), strict=True))


def _tensors(value: Any) -> list[Tensor]:
    parts = value if isinstance(value, list | tuple) else [value]
    return [x for x in parts if isinstance(x, Tensor)]
