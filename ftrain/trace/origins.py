"""Tells tensors of a trace that depend on the arguments or on random numbers from those that every call repeats.

A module that keeps `torch.arange(n)` has a cache, which the graph can compute again. A module that keeps a value
computed from the step's arguments, or drawn at random, has a state.
"""

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ftrain.graph.op_effects import draws
from ftrain.graph.torch_memory import storage_id


class Origins:
    """Tracks, through the ops of a trace, the tensors that depend on the step's arguments or on random numbers."""

    def __init__(self) -> None:
        self._nodes: set[fx.Node] = set()
        self._tensors: dict[int, weakref.ref[Tensor]] = {}
        self._written: dict[int, Any] = {}
        """By identity, storages into which such values were written; held so that the identity is not reused."""

    def note(self, op: Any, nodes: Sequence[fx.Node], out: Any) -> None:
        """Record that `op` has created these nodes, in this order, and returned `out`."""
        for node in nodes:
            if draws(node) or any(n.op == "placeholder" or n in self._nodes for n in node.all_input_nodes):
                self._nodes.add(node)
        if nodes[-1] not in self._nodes:
            return
        mutable = isinstance(op, torch._ops.OpOverload) and op._schema.is_mutable
        for tensor in out if isinstance(out, list | tuple) else (out,):
            if isinstance(tensor, Tensor):
                self._tensors[id(tensor)] = weakref.ref(tensor)
                if mutable:
                    self._written[storage_id(tensor)] = tensor.untyped_storage()

    def is_fixed(self, tensor: Tensor) -> bool:
        """True for a tensor, of any shape, whose values are the same at every call."""
        found = self._tensors.get(id(tensor))
        return (found is None or found() is not tensor) and storage_id(tensor) not in self._written
