"""Run a graph node by node, bodies of loops included: what the profile and the hunt for NaNs are made of."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from ftrain.loop import is_loop, loop_body
from ftrain.private import below_autograd


class Iteration(NamedTuple):
    """Inside of which loop, and in its how-manieth round (from 0) a node runs."""

    loop: str
    round: int


Visit = Callable[[fx.Node, tuple[Iteration, ...], tuple, dict[str, Any]], Any]


def interpret(module: fx.GraphModule, inputs: Sequence[Tensor], visit: Visit) -> Any:
    """Run the graph; `visit(node, iterations, args, kwargs)` computes the value of every op and returns it.

    `iterations` says which loops the node is inside of, outermost first. Values are dropped after their last use.
    """
    with torch.no_grad(), below_autograd():
        return _Walk(module, visit, ()).run(*inputs)


class _Walk(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, visit: Visit, inside: tuple[Iteration, ...]) -> None:
        super().__init__(module)
        self._visit, self._inside = visit, inside

    def run_node(self, n: fx.Node) -> Any:
        if n.op != "call_function":
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        if is_loop(n):
            return self._run_loop(n, *args[1:])
        return self._visit(n, self._inside, args, kwargs)

    def _run_loop(
        self, node: fx.Node, n: int, carry: list[Tensor], xs: list[Tensor], consts: list[Tensor]
    ) -> list[Tensor]:
        carry = [c.clone() for c in carry]
        body = loop_body(node)
        for i in range(n):
            inside = (*self._inside, Iteration(node.name, i))
            carry = list(_Walk(body, self._visit, inside).run(*carry, *[x[i] for x in xs], *consts))
        return carry
