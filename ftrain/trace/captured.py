"""Tensors that a step reads though they are not among its arguments: what the user calls them, and what is refused.

A closure, a global, the weights of a module that was not given to `functional_call`. They are constants of the graph:
read at every call, alive as long as the step, never written and never trained.
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType, MethodType
from typing import Any

from torch import Tensor, fx, nn

from ftrain.graph.loop import is_loop, loop_body
from ftrain.graph.torch_private import FakeTensor
from ftrain.tree import typed_shape

_DEPTH = 5


def captured_tensors(module: fx.GraphModule) -> dict[str, Tensor]:
    """The constants of a graph and of the bodies of its loops, each once, by the name of its first node."""
    found: dict[int, tuple[str, Tensor]] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr":
            value = getattr(module, str(node.target), None)
            if isinstance(value, Tensor) and not isinstance(value, FakeTensor):
                found.setdefault(id(value), (node.name, value))
        elif is_loop(node):
            for name, value in captured_tensors(loop_body(node)).items():
                found.setdefault(id(value), (f"{node.name}.{name}", value))
    return dict(found.values())


def captured_name(function: Callable, tensor: Tensor) -> str:
    """What the user calls a tensor that a function reaches: `model.1.running_mean`; else its type and shape."""
    name = next((name for name, value in _reachable(function, "", _DEPTH, set()) if value is tensor), "")
    return f"{name!r} ({typed_shape(tensor)})" if name else f"a tensor ({typed_shape(tensor)})"


def _reachable(value: Any, name: str, depth: int, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    """Tensors reached from a value through closures, globals, modules, attributes and containers, with their names."""
    if isinstance(value, Tensor):
        yield name, value
        return
    if depth < 0 or id(value) in seen:
        return
    seen.add(id(value))
    for part, inner in _parts(value):
        part = "" if isinstance(inner, FunctionType) else part  # what it captures has names of its own
        yield from _reachable(inner, f"{name}.{part}" if name and part else name or part, depth - 1, seen)


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, nn.Module):
        yield from value.named_parameters()
        yield from value.named_buffers()
        yield from ((k, v) for k, v in vars(value).items() if not k.startswith("_"))
    elif isinstance(value, functools.partial):
        yield from [("", value.func), *(("", a) for a in value.args), *value.keywords.items()]
    elif isinstance(value, MethodType):
        yield from [("", value.__self__), ("", value.__func__)]
    elif isinstance(value, FunctionType):
        yield from _parts_of_function(value)
    elif isinstance(value, dict):
        yield from ((str(k), v) for k, v in value.items())
    elif isinstance(value, list | tuple):
        yield from ((str(i), v) for i, v in enumerate(value))
    elif callable(value) and hasattr(value, "__wrapped__"):
        yield "", value.__wrapped__
    elif hasattr(value, "__dict__") and not inspect.ismodule(value) and not isinstance(value, type):
        yield from ((k, v) for k, v in vars(value).items())


def _parts_of_function(function: FunctionType) -> Iterator[tuple[str, Any]]:
    if hasattr(function, "__wrapped__"):
        yield "", function.__wrapped__
    names = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=False))
    for name, cell in names.items():
        try:
            yield name, cell.cell_contents
        except ValueError:  # not assigned yet
            continue
    for name in _global_names(function.__code__):
        if name in function.__globals__:
            yield name, function.__globals__[name]
    yield from ((str(i), v) for i, v in enumerate(function.__defaults__ or ()))


def _global_names(code: CodeType) -> list[str]:
    inner = [name for const in code.co_consts if isinstance(const, CodeType) for name in _global_names(const)]
    return [*code.co_names, *inner]


def require_untrained(function: Callable, trained: list[Tensor]) -> None:
    """ValueError for tensors outside the arguments into which the gradient of a loss would have flowed.

    `trained`: the leaves that autograd found behind the loss beside the parameters it was asked for.
    """
    for tensor in trained:
        if not isinstance(tensor, FakeTensor):
            raise ValueError(
                f"the loss reads {captured_name(function, tensor)}, which wants a gradient and is not among the "
                "arguments that are differentiated: it would stay as it is. To train it keep it in the parameters (of "
                "a module: torch.func.functional_call); a teacher or a frozen part has .requires_grad_(False), or is "
                "run under torch.no_grad()"
            )
