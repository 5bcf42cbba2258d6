"""Records where a step's Python code reads the memory layout of a tensor: `x.stride()`, `x.is_contiguous()`.

A trace assumes contiguous leaves. If the user's code branches on the layout of a leaf that is not contiguous, the trace
may take another branch than eager code. So each query is recorded with its line and answer, and
`ftrain.trace.leaf_layouts` repeats it for leaves that are not contiguous.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode

from ftrain.graph.source import is_users
from ftrain.graph.torch_private import node_of, tracing_graph

MADE_CONTIGUOUS = "made_contiguous"
"""The key of `node.meta` that is set for results of the user's `x.contiguous()`, which a trace returns as it is."""


@dataclass(frozen=True)
class LayoutRead:
    """A query of a tensor's layout on a line of the user's code.

    - `ask`: repeats the query on another tensor. `answer`: its result in the trace.
    - `what`: the user's line and the method, for messages.
    - `node`: the node of the tensor; None for a tensor inside of a loop.
    """

    ask: Callable[[Tensor], Any]
    answer: Any
    what: str
    node: fx.Node | None


class LayoutReads(TorchFunctionMode):
    """A mode that records, within its block, the layout queries of the user's code.

    `found`: the queries. `graph`: after `settle`, a copy of the part of the graph that computes the queried tensors.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[LayoutRead] = []
        self.graph: fx.Graph | None = None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Run the function, and record it if it is a layout query."""
        answer = func(*args, **(kwargs or {}))
        if func is Tensor.contiguous and answer is args[0] and _means_rows(args, kwargs or {}):
            return _made_contiguous(answer)
        if func in _QUESTIONS and args:
            frame = sys._getframe(1)
            if is_users(frame.f_code.co_filename):
                ask = partial(_ask, func, tuple(args[1:]), dict(kwargs or {}))
                where = f"{frame.f_code.co_filename}:{frame.f_lineno} ({frame.f_code.co_name})"
                self.found.append(LayoutRead(ask, answer, f"{where}: {func.__name__}()", node_of(args[0])))
        return answer

    def settle(self) -> None:
        """Copy the part of the current graph that computes the queried tensors. To be called when the step has run."""
        graph = tracing_graph()
        nodes = [r.node for r in self.found if r.node is not None and r.node.graph is graph]
        if not nodes or graph is None:
            self.found = [LayoutRead(r.ask, r.answer, r.what, None) for r in self.found]
            return
        self.graph, new = part_of(graph, nodes)
        self.found = [LayoutRead(r.ask, r.answer, r.what, new.get(r.node) if r.node else None) for r in self.found]


def is_made_contiguous(node: fx.Node) -> bool:
    """True for a node that stands for a result of the user's `x.contiguous()`: it is contiguous, however `x` lies."""
    return bool(node.meta.get(MADE_CONTIGUOUS))


def _means_rows(args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    formats = [*args[1:], *kwargs.values()]
    return all(each is torch.contiguous_format for each in formats)


def _made_contiguous(tensor: Tensor) -> Tensor:
    """An alias of a contiguous tensor of the trace, whose node is marked; a tensor of no trace itself."""
    if node_of(tensor) is None:
        return tensor
    made = torch.ops.aten.alias.default(tensor)
    node = node_of(made)
    if node is not None:
        node.meta[MADE_CONTIGUOUS] = True
    return made


_QUESTIONS: set[Callable[..., Any]] = {Tensor.stride, Tensor.is_contiguous}


def _ask(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], tensor: Tensor) -> Any:
    return func(tensor, *args, **kwargs)


def part_of(graph: fx.Graph, nodes: Sequence[fx.Node]) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    """A copy of the part of a graph that computes these nodes, with all placeholders of the graph.

    Returned with it: the copy of each copied node.
    """
    wanted, left = set(nodes), list(nodes)
    while left:
        fresh = [n for n in left.pop().all_input_nodes if n not in wanted]
        wanted.update(fresh)
        left += fresh
    copy, new = fx.Graph(owning_module=graph.owning_module), dict[fx.Node, fx.Node]()
    for node in graph.nodes:
        if node in wanted or node.op == "placeholder":
            new[node] = copy.node_copy(node, new.__getitem__)
    return copy, new
