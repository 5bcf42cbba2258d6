"""What a CUDA graph cannot hold: it replays the work of the device, and nothing that the host did."""

from collections.abc import Iterator

import torch
from torch import Tensor, fx

from ftrain.graph.loop import is_loop, loop_body
from ftrain.graph.text import op_name, short_source
from ftrain.graph.writes import written_inputs

_ADVICE = "take backend='inductor'"


def require_recordable(module: fx.GraphModule) -> None:
    """ValueError for the first node that makes the host wait for the device or copies between them; checked before
    anything runs.

    Opaque ops may wait all the same; the capture finds these.
    """
    given = [n for n in module.graph.nodes if n.op == "placeholder"]
    for slot in sorted(written_inputs(module)):
        if _device(given[slot]) == "cpu":
            raise ValueError(
                f"backend='cudagraph': leaf {given[slot].meta.get('path', given[slot].name)!r} is on the CPU and the "
                f"step writes its new value over it, which a replay would not do: move it to the GPU, or {_ADVICE}"
            )
    for node in _all_nodes(module):
        reason = _reason(node)
        if reason:
            raise ValueError(f"backend='cudagraph': {described(node)} {reason}; change that line, or {_ADVICE}")


def described(node: fx.Node) -> str:
    """A node's op, parameter path and source line, those that are known."""
    path, source = node.meta.get("path"), short_source(node.meta.get("source"))
    return f"{op_name(node) or node.op} ({node.name}{f', {path}' if path else ''}){f' at {source}' if source else ''}"


def _all_nodes(module: fx.GraphModule) -> Iterator[fx.Node]:
    for node in module.graph.nodes:
        yield node
        if is_loop(node):
            yield from _all_nodes(loop_body(node))


def _reason(node: fx.Node) -> str:
    if node.op != "call_function":
        return ""
    given = {_device(n) for n in node.all_input_nodes}
    if node.target is torch.ops.aten._local_scalar_dense.default and given != {"cpu"}:
        return "makes the host wait for a number from the GPU"
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return ""
    if any(not isinstance(size, int) for size in value.shape):
        return f"has a size that depends on data ({tuple(value.shape)}), for which the host waits"
    if value.device.type == "cpu" and "cuda" in given:
        return "copies from the GPU to the CPU"
    if value.device.type == "cuda" and node.target is torch.ops.aten._to_copy.default and given == {"cpu"}:
        return "copies from the CPU to the GPU: give the step a tensor that is on the GPU"
    return ""


def _device(node: fx.Node) -> str:
    value = node.meta.get("val")
    return value.device.type if isinstance(value, Tensor) else ""
