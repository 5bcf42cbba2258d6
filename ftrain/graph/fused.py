"""A run of ops as one node: what a compiler may fuse, and nothing else.

Like a loop, the node calls a graph of its own that is held by the module; equal runs share one.
"""

from collections.abc import Callable, Iterable

from torch import Tensor, fx

WRITES = "writes"
"""Metadata of a fused node: which of its arguments' memory it writes over."""


def run_fused(body: Callable[..., Iterable[Tensor]], *inputs: Tensor) -> list[Tensor]:
    """The results of the run of ops on its inputs; memory of those that the node's WRITES lists may be overwritten."""
    return list(body(*inputs))


def is_fused(node: fx.Node) -> bool:
    """True for a node that stands for a run of ops."""
    return node.target is run_fused


def fused_body(node: fx.Node) -> fx.GraphModule:
    """The graph of a fused node's run."""
    name: str = node.args[0].target  # type: ignore[union-attr,assignment]
    assert node.graph.owning_module is not None
    return node.graph.owning_module.get_submodule(name)  # type: ignore[return-value]
