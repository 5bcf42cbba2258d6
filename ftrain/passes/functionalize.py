"""Replace in-place ops by pure ones."""

from typing import Any

import torch
from torch import fx

from ftrain.private import fake_mode_of, trace_to_graph, tracing_graph


def mutating_nodes(module: fx.GraphModule) -> list[fx.Node]:
    """The nodes whose op writes into one of its arguments."""
    return [
        n
        for n in module.graph.nodes
        if n.op == "call_function" and isinstance(n.target, torch._ops.OpOverload) and n.target._schema.is_mutable
    ]


def functionalize(module: fx.GraphModule, input_paths: list[str]) -> fx.GraphModule:
    """The same graph without in-place ops: writes into temporaries become values, at no change of any bit.

    A write that reaches an argument of the step is a ValueError that names the leaf and the line: steps are pure.
    A graph without in-place ops is returned as it is.
    """
    culprits = mutating_nodes(module)
    if not culprits:
        return module
    placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
    fakes = [n.meta["val"] for n in placeholders]
    marker = _KeepMeta(module)
    with fake_mode_of(fakes):
        pure = trace_to_graph(torch.func.functionalize(marker.run_flat, remove="mutations"), fakes)
    for node in mutating_nodes(pure):
        written = node.args[0]
        path = input_paths[[n.name for n in pure.graph.nodes if n.op == "placeholder"].index(written.name)]  # type: ignore[union-attr]
        lines = sorted({str(n.meta.get("site")) for n in culprits})
        raise ValueError(
            f"the step writes into its input {path!r} (in-place ops at {'; '.join(lines)}): a step is pure, so make a "
            "new value, e.g. x = x + y, and return it"
        )
    return pure


class _KeepMeta(fx.Interpreter):
    """Run a graph under another trace and hand each node's provenance to the nodes it leaves there."""

    def run_flat(self, *args: Any) -> Any:
        return self.run(*args)

    def run_node(self, n: fx.Node) -> Any:
        graph = tracing_graph()
        before = len(graph.nodes) if graph is not None else 0
        out = super().run_node(n)
        if graph is not None:
            for _, node in zip(range(len(graph.nodes) - before), reversed(graph.nodes), strict=False):
                for key in ("site", "phase"):
                    if key in n.meta:
                        node.meta.setdefault(key, n.meta[key])
        return out
