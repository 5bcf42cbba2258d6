"""Nodes, values and sizes in words."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from ftrain.graph.fused import is_fused
from ftrain.graph.loop import is_loop
from ftrain.graph.source import SourceLine
from ftrain.tree import typed_shape


def show_node(node: fx.Node) -> str:
    """A node in words: `name: type = op(arguments)`; for an input `name: type`."""
    typed = f"{node.name}: {show_value(node.meta.get('val'))}"
    if node.op == "placeholder":
        return typed
    if node.op == "get_attr":
        return f"{typed} = constant"
    arguments, options = (node.args[1:], {}) if is_loop(node) or is_fused(node) else (node.args, node.kwargs)
    parts = [show_argument(a) for a in arguments] + [f"{k}={show_argument(v)}" for k, v in options.items()]
    return f"{typed} = {op_name(node)}({', '.join(parts)})"


def node_notes(node: fx.Node) -> list[str]:
    """Phase, parameter path and source line of a node, those that are known."""
    source = short_source(node.meta.get("source"))
    return [note for note in (node.meta.get("phase", ""), node.meta.get("path") or "", source) if note]


def op_name(node: fx.Node) -> str:
    """The op's name: `mm`, `add.out`, `ftrain.attention_forward`, `loop`, `fused`; "" for nodes that are no op."""
    if node.op != "call_function":
        return ""
    if is_loop(node) or is_fused(node):
        return "loop" if is_loop(node) else "fused"
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target).removeprefix("aten.").removesuffix(".default")
    return getattr(node.target, "__name__", str(node.target))


def short_source(source: SourceLine | None) -> str:
    """`file:line` with the file relative to the working directory, or its last two parts if it lies elsewhere."""
    if source is None:
        return ""
    path = Path(source.file)
    here = Path.cwd()
    short = path.relative_to(here) if path.is_relative_to(here) else Path(*path.parts[-2:])
    return f"{short}:{source.line}"


def show_value(value: Any) -> str:
    """`float32[32, 64]` for a tensor, in parentheses for several.

    >>> import torch
    >>> from ftrain.graph.text import show_value
    >>> show_value([torch.zeros(2, 3), torch.zeros(())])
    '(float32[2, 3], float32[])'
    """
    if isinstance(value, list | tuple):
        return f"({', '.join(map(show_value, value))})"
    if isinstance(value, Tensor):
        return typed_shape(value)
    return type(value).__name__ if value is not None else "graph"


def show_argument(value: Any) -> str:
    """An argument of a node: other nodes by name, dtypes and devices in short, lists element by element."""
    if isinstance(value, fx.Node):
        return value.name
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(show_argument, value))}]"
    return repr(value) if isinstance(value, str) else str(value).removeprefix("torch.")


def show_bytes(count: float) -> str:
    """A number of bytes with a binary unit, in about three digits.

    >>> from ftrain.graph.text import show_bytes
    >>> show_bytes(75_500), show_bytes(3 * 2**30)
    ('73.7 KiB', '3 GiB')
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" or abs(count) >= 100 else f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} TiB"
