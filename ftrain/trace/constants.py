"""Make the fake values of captured tensors share memory as the real tensors do.

Passes read from the memory of fake values which nodes share memory, so that nothing is written over a captured tensor
or a view of one. But a trace gives each node that reads a captured tensor a fake value with memory of its own.
"""

import operator

import torch
from torch import Tensor, fx

from ftrain.graph.loop import is_loop, loop_body
from ftrain.graph.torch_memory import storage_id
from ftrain.graph.torch_private import FakeTensor, fake_mode_of, value_of


def share_memory_of_constants(module: fx.GraphModule) -> None:
    """Give the fake values of captured tensors, and of their views, the shared memory of the real ones, in place.

    Bodies of loops are treated in the same way. No value changes.
    """
    fakes = [n.meta["val"] for n in module.graph.nodes if isinstance(n.meta.get("val"), FakeTensor)]
    memory: dict[int, Tensor] = {}
    moved: set[fx.Node] = set()
    for node in module.graph.nodes:
        constant = _constant(module, node)
        if constant is not None:
            with fake_mode_of(fakes):
                node.meta["val"] = _fake_of(constant, memory)
            moved.add(node)
        elif is_loop(node):
            share_memory_of_constants(loop_body(node))
        elif _looks_at(node, moved):
            node.meta["val"] = value_of(node)
            moved.add(node)


def _constant(module: fx.GraphModule, node: fx.Node) -> Tensor | None:
    value = None
    if node.op == "get_attr":
        value = operator.attrgetter(str(node.target))(module)
    return value if isinstance(value, Tensor) and not isinstance(value, FakeTensor) else None


def _fake_of(constant: Tensor, memory: dict[int, Tensor]) -> Tensor:
    """A fake tensor with the constant's shape, strides and offset, in the fake memory of the constant's storage; a lazy
    conjugate of a lazy conjugate.
    """
    storage = constant.untyped_storage()
    key = storage_id(constant)
    if key not in memory:
        memory[key] = torch.empty(storage.nbytes(), dtype=torch.uint8, device=constant.device)
    size = constant.element_size()
    typed = memory[key][: storage.nbytes() // size * size].view(constant.dtype)
    found = typed.as_strided(constant.shape, constant.stride(), constant.storage_offset())
    return found.conj() if constant.is_conj() else found


def _looks_at(node: fx.Node, moved: set[fx.Node]) -> bool:
    """True for a view of a node whose fake value was replaced, and for a `getitem` of one."""
    if node.op != "call_function" or not any(n in moved for n in node.all_input_nodes):
        return False
    if node.target is operator.getitem:
        return True
    is_op = isinstance(node.target, torch._ops.OpOverload)
    return is_op and any(r.alias_info is not None for r in node.target._schema.returns)  # type: ignore[union-attr]
