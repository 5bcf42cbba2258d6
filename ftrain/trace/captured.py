"""Captured tensors: tensors that a step reads and that are not among its arguments.

Examples are variables of a closure, globals, and the weights of a module that is called without `functional_call`.
They are constants of the graph: they are read at every call, stay in memory as long as the step, and may not be written
or trained.
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
    """The captured tensors of a graph and of the bodies of its loops, each once, by the name of its first node."""
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


def captured_name(function: Callable[..., Any], tensor: Tensor) -> str:
    """The user's name of a tensor that a function reaches, with its type and shape, for messages.

    Without a name only the type and shape.

    >>> import torch
    >>> from ftrain.trace.captured import captured_name
    >>> w = torch.ones(2, 3)
    >>> captured_name(lambda x: w @ x, w)
    "'w' (float32[2, 3])"
    """
    name = next((name for name, value in _reachable(function, "", _DEPTH, set()) if value is tensor), "")
    return f"{name!r} ({typed_shape(tensor)})" if name else f"a tensor ({typed_shape(tensor)})"


def _reachable(value: Any, name: str, depth: int, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    """The tensors reached from a value through closures, globals, modules, attributes and containers, with names."""
    if isinstance(value, Tensor):
        yield name, value
        return
    if depth < 0 or id(value) in seen:
        return
    seen.add(id(value))
    for part, inner in _parts(value):
        part = "" if isinstance(inner, FunctionType) else part  # its captured variables have names of their own
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


def require_untrained(function: Callable[..., Any], trained: list[Tensor]) -> None:
    """ValueError for captured tensors that require a gradient, because the step would not train them.

    `trained`: the leaves of the loss's autograd graph, of any shape, that are not among the differentiated parameters.
    `function`: the step, to name the tensor.
    """
    for tensor in trained:
        if not isinstance(tensor, FakeTensor):
            raise ValueError(
                f"the loss reads {captured_name(function, tensor)}, which requires a gradient and is not among the "
                "arguments that are differentiated, so it would not be trained. To train it, keep it in the parameters "
                "(of a module: torch.func.functional_call). For a teacher or a frozen part, call "
                ".requires_grad_(False) or use torch.no_grad()"
            )
