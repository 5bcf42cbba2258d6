"""Bytes alive in each region of a graph, where regions are named so that graphs of any depth share them.

A region is a phase and a place: the stack of a parameter path, with its layer as "first", "last" or "inner".
"""

import re
from collections.abc import Iterator, Mapping

from torch import fx

from ftrain.analysis.device_ops import device_workspace
from ftrain.analysis.pieces import Pieces, Workspace
from ftrain.graph.loop import is_loop, loop_body

Region = tuple[str, str]
_BLOCK = 512  # bytes to which CUDA's allocator rounds
_NUMBERED = re.compile(r"(.*?\blayers\.)(\d+)(?=\.|$)")


def live_bytes(module: fx.GraphModule, *, workspace: Workspace = device_workspace) -> Iterator[tuple[fx.Node, int]]:
    """Each op, those of loop bodies too, with the bytes alive beyond the arguments while it runs on a GPU.

    `workspace`: bytes that each op allocates while it runs; default: those of a GPU's kernels.
    """
    return _live_bytes(Pieces.of(module, round_to=_BLOCK, workspace=workspace), 0)


def _live_bytes(pieces: Pieces, outer: int) -> Iterator[tuple[fx.Node, int]]:
    live = (outer + pieces.live).tolist()
    for i, node in enumerate(pieces.nodes):
        if i in pieces.bodies:
            yield from _live_bytes(pieces.bodies[i], live[i])
        elif node.op == "call_function":
            yield node, live[i] + int(pieces.workspace[i])


def peak_by_region(module: fx.GraphModule, *, workspace: Workspace = device_workspace) -> dict[Region, float]:
    """The most bytes alive beyond the arguments in each region: (phase, place). `workspace`: as in `live_bytes`."""
    found: dict[Region, float] = {}
    last = _last_layers(module)
    for node, live in live_bytes(module, workspace=workspace):
        kind = (node.meta.get("phase") or "", _place(node.meta.get("path") or "", last))
        found[kind] = max(found.get(kind, 0.0), live)
    return found


def _last_layers(module: fx.GraphModule) -> dict[str, int]:
    """The highest layer number of each stack, by the path before the number; bodies of loops included."""
    found: dict[str, int] = {}
    for node in module.graph.nodes:
        if is_loop(node):
            for prefix, number in _last_layers(loop_body(node)).items():
                found[prefix] = max(found.get(prefix, 0), number)
        for match in _NUMBERED.finditer(node.meta.get("path") or ""):
            prefix = match.string[: match.start(2)]
            found[prefix] = max(found.get(prefix, 0), int(match.group(2)))
    return found


def _place(path: str, last: Mapping[str, int]) -> str:
    """A path's stack and the place in it; empty outside of stacks."""
    match = _NUMBERED.match(path)
    if match is None:
        return ""
    prefix, number = match.group(1), int(match.group(2))
    return f"{prefix}{'first' if number == 0 else 'last' if number == last.get(prefix, number) else 'inner'}"
