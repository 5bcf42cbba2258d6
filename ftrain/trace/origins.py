"""Which tensors of a trace have numbers that every call brings anew, and which are the same at every call.

A module that keeps `torch.arange(n)` has a cache, which the graph makes anew without harm; one that keeps what it has
computed from the step's arguments, or has drawn, has a state.
"""

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ftrain.graph.torch_private import storage_id


class Origins:
    """Follows the arguments of a step, and its random numbers, through the ops of a trace."""

    def __init__(self) -> None:
        self._nodes: set[fx.Node] = set()
        self._tensors: dict[int, weakref.ref[Tensor]] = {}
        self._written: dict[int, Any] = {}
        """Memory that such numbers were written into, held so that its identity stays one."""

    def note(self, op: Any, nodes: Sequence[fx.Node], out: Any) -> None:
        """An op has left these nodes in the graph, the first first, and returned `out`."""
        random = torch.Tag.nondeterministic_seeded in getattr(op, "tags", ())
        for node in nodes:
            if random or any(n.op == "placeholder" or n in self._nodes for n in node.all_input_nodes):
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
        """True for a tensor whose numbers are the same at every call."""
        found = self._tensors.get(id(tensor))
        return (found is None or found() is not tensor) and storage_id(tensor) not in self._written
