"""Numbers in tensors that every call of a step repeats: `torch.ones(4).any().item()` is True, whatever the arguments.

A traced step has no numbers of tensors, so a branch on one is refused. But where nothing in it comes from an argument,
a captured tensor or a draw, the trace can compute the number itself.
"""

from typing import Any

import torch
from torch import Tensor, fx

from ftrain.graph.op_effects import argument_reader, draws, hidden_writes, is_pure
from ftrain.graph.torch_memory import storage_id
from ftrain.graph.torch_private import FakeTensor, computed_really, node_of

READ = torch.ops.aten._local_scalar_dense.default
"""The op of `x.item()`, `bool(x)`, `int(x)`."""
_LIFTS = (torch.ops.aten.lift_fresh_copy.default, torch.ops.aten.lift_fresh.default)
_MOST = 2**24
"""Elements of the tensors that a number may be computed from."""


class FixedNumbers:
    """Computes such numbers within one trace."""

    def __init__(self) -> None:
        self._writers: dict[int, tuple[Any, list[fx.Node]]] = {}
        """By identity, storages that the trace writes into, held so that the identity is not reused; and by what."""

    def note(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], node: fx.Node) -> None:
        """Record what `op`, of which this node is made, has written into."""
        if not isinstance(op, torch._ops.OpOverload):
            return
        written: list[Any] = hidden_writes(op, args, kwargs)
        if op._schema.is_mutable:
            value = argument_reader(op, args, kwargs)
            written += [value(declared.name) for declared in op._schema.arguments if declared.is_write]
        for held in written:
            for tensor in held if isinstance(held, list | tuple) else (held,):
                if isinstance(tensor, Tensor):
                    self._writers.setdefault(storage_id(tensor), (tensor.untyped_storage(), []))[1].append(node)

    def find(self, tensor: Tensor) -> float | None:
        """The number in an integer or boolean tensor, of one element and any shape; None where calls may differ."""
        node = node_of(tensor)
        if node is None or tensor.is_floating_point() or tensor.is_complex():
            return None
        needed = self._needed(node)
        return None if needed is None else computed_really(needed)[node].item()

    def _needed(self, last: fx.Node) -> list[fx.Node] | None:
        """The nodes that `last` is computed from or that write into their memory, and itself, in their order; None if
        one may differ among calls.
        """
        found, left = {last}, [last]
        while left:
            node = left.pop()
            if not _is_fixed(node):
                return None
            _, writers = self._writers.get(storage_id(node.meta["val"]), (None, []))
            fresh = [n for n in (*node.all_input_nodes, *writers) if n not in found]
            found.update(fresh)
            left += fresh
        return [node for node in last.graph.nodes if node in found]


def _is_fixed(node: fx.Node) -> bool:
    """Whether a node makes the same of the same at every call, or writes the same, and tells so."""
    op, made = node.target, node.meta.get("val")
    if node.op == "get_attr":  # of Python's numbers, as in `x[0] = 1` and `torch.tensor([1, 2])`; others are captured
        return all(user.target in _LIFTS for user in node.users)
    if not isinstance(op, torch._ops.OpOverload) or op.namespace != "aten" or "empty" in op._schema.name:
        return False
    if not isinstance(made, FakeTensor) or any(type(n) is not int for n in made.shape) or made.numel() > _MOST:
        return False
    return not draws(node) if op._schema.is_mutable else is_pure(node)
