"""What a step's Python reads of how tensors lie in memory: `x.stride()`, `x.is_contiguous()`.

A trace takes leaves as contiguous, so that a branch on one that lies otherwise would take another way than eager code.
What was read, and on which line, is remembered, to be asked again for leaves that lie otherwise.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, fx
from torch.overrides import TorchFunctionMode

from ftrain.graph.source import is_users
from ftrain.graph.torch_private import node_of, tracing_graph


@dataclass(frozen=True)
class LayoutRead:
    """A question about a tensor's memory on a line of the user's, and the trace's answer; `node`: the tensor, None for
    one within a loop.
    """

    ask: Callable[[Tensor], Any]
    answer: Any
    what: str
    node: fx.Node | None


class LayoutReads(TorchFunctionMode):
    """Within the block what the user's lines read of layouts is noted. `graph`: what the tensors read are made by."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[LayoutRead] = []
        self.graph: fx.Graph | None = None

    def __torch_function__(self, func: Callable, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        """Run the function; note it if it is one of the questions."""
        answer = func(*args, **(kwargs or {}))
        if func in _QUESTIONS and args:
            frame = sys._getframe(1)
            if is_users(frame.f_code.co_filename):
                ask = partial(_ask, func, tuple(args[1:]), dict(kwargs or {}))
                where = f"{frame.f_code.co_filename}:{frame.f_lineno} ({frame.f_code.co_name})"
                self.found.append(LayoutRead(ask, answer, f"{where}: {func.__name__}()", node_of(args[0])))
        return answer

    def settle(self) -> None:
        """The function has run: keep what the tensors are made by, of the graph under way."""
        graph = tracing_graph()
        nodes = [r.node for r in self.found if r.node is not None and r.node.graph is graph]
        if not nodes or graph is None:
            self.found = [LayoutRead(r.ask, r.answer, r.what, None) for r in self.found]
            return
        self.graph, new = part_of(graph, nodes)
        self.found = [LayoutRead(r.ask, r.answer, r.what, new.get(r.node) if r.node else None) for r in self.found]


_QUESTIONS: set[Callable] = {Tensor.stride, Tensor.is_contiguous}


def _ask(func: Callable, args: tuple, kwargs: dict, tensor: Tensor) -> Any:
    return func(tensor, *args, **kwargs)


def part_of(graph: fx.Graph, nodes: Sequence[fx.Node]) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    """A copy of the part of a graph that these nodes are computed by, with all of its placeholders, and of what each
    node of it is the copy.
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
