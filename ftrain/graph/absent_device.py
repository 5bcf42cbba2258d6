"""Programs for a device that this torch does not have: a plan for an H100 made on a laptop.

Fake CUDA tensors with an autograd leaf abort a process whose torch has no CUDA. So the trace runs on fake CPU tensors,
while kernels choose what they run on CUDA (`ftrain.kernels.backend.lowering_for`), and the values of the finished graph
are then said to be on the device. Passes, prices and memory plans read it there, and see what they see on a machine
with a card.

What torch itself chooses by device inside a composite op (`scaled_dot_product_attention`, `dropout`, `lstm`) is traced
as the CPU's, and copies between the host and the device leave no node.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import fx

from ftrain.graph.loop import is_loop, loop_body
from ftrain.graph.torch_private import FakeTensor, move_fake
from ftrain.kernels.backend import lowering_for


def absent_device(devices: Iterable[torch.device]) -> torch.device | None:
    """The first CUDA device of these on a torch that sees no card; None where all devices are present."""
    found = next((d for d in devices if d.type == "cuda"), None)
    if found is None or torch.cuda.is_available():
        return None
    return torch.device("cuda", found.index or 0)


def traceable(device: torch.device) -> torch.device:
    """The device of a trace's fake tensors for tensors on `device`: the CPU if it is absent or "meta"."""
    return torch.device("cpu") if device.type == "meta" or absent_device([device]) is not None else device


def choosing_for(absent: torch.device | None) -> AbstractContextManager[None]:
    """Within the block kernels choose what they run on the absent device, if there is one."""
    return nullcontext() if absent is None else lowering_for(absent.type)


def put_on(module: fx.GraphModule, device: torch.device) -> None:
    """Declare all values of a graph, and of the bodies of its loops, to be on `device`: fake values and device
    arguments.
    """
    for node in module.graph.nodes:
        value = node.meta.get("val")
        for part in value if isinstance(value, list | tuple) else [value]:
            if isinstance(part, FakeTensor):
                move_fake(part, device)
        node.args, node.kwargs = fx.node.map_aggregate((node.args, node.kwargs), lambda a: _moved(a, device))
        if is_loop(node):
            put_on(loop_body(node), device)


def _moved(argument: Any, device: torch.device) -> Any:
    return device if isinstance(argument, torch.device) and argument.type == "cpu" else argument
