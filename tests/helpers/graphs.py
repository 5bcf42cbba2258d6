"""What tests of passes share: graphs of plain functions."""

from collections.abc import Callable

import torch
from torch import Tensor, fx

from ftrain.graph.torch_private import new_fake_mode, trace_to_graph


def graph_of(function: Callable, *examples: Tensor) -> fx.GraphModule:
    """The traced graph of a function of tensors that returns a list, before any pass; ops are of phase "step"."""
    with new_fake_mode():
        fakes = [torch.empty(t.shape, dtype=t.dtype) for t in examples]
        module = trace_to_graph(function, fakes)
    for node in module.graph.nodes:
        node.meta["phase"] = "input" if node.op == "placeholder" else "step"
    return module


def inputs_of(module: fx.GraphModule) -> list[str]:
    """Names of the placeholders."""
    return [n.name for n in module.graph.nodes if n.op == "placeholder"]


def ops_of(module: fx.GraphModule) -> list[str]:
    """Names of the ops, in order."""
    return [n.name for n in module.graph.nodes if n.op == "call_function"]
