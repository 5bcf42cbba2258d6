"""What is alive at each kind of moment of a graph, in terms that graphs of any depth share."""

import re
from collections.abc import Callable, Iterator, Mapping

from torch import fx

from ftrain.liveness import storages_of
from ftrain.loop import is_loop, loop_body
from ftrain.search.device_ops import device_workspace

Moment = tuple[str, str]
Workspace = Callable[[fx.Node], int]
_BLOCK = 512  # bytes to which CUDA's allocator rounds
_NUMBERED = re.compile(r"(.*?\blayers\.)(\d+)(?=\.|$)")


def alive(
    module: fx.GraphModule, outer: int = 0, *, workspace: Workspace = device_workspace
) -> Iterator[tuple[fx.Node, int]]:
    """Each op, of loops' bodies too, with the bytes alive beyond the arguments while it runs on a GPU.

    The walk of `ftrain.liveness.simulate` with the workspaces of a GPU's kernels, or those that `workspace` tells;
    `outer` is alive throughout.
    """
    nodes = [n for n in module.graph.nodes if n.op != "output"]
    pieces = {n: storages_of(n) for n in nodes}
    position = {n: i for i, n in enumerate(module.graph.nodes)}
    last: dict[int, int] = {}
    held: set[int] = set()
    for node in nodes:
        end = max([position[node], *(position[u] for u in node.users)])
        for storage, _ in pieces[node]:
            last[storage] = max(end, last.get(storage, 0))
            if node.op in ("placeholder", "get_attr"):
                held.add(storage)
    sizes: dict[int, int] = {}
    ends: dict[int, list[int]] = {}
    live = outer
    for node in nodes:
        for storage, size in pieces[node]:
            if storage not in held and storage not in sizes:
                sizes[storage] = -(-size // _BLOCK) * _BLOCK
                ends.setdefault(last[storage], []).append(storage)
                live += sizes[storage]
        if is_loop(node):
            yield from alive(loop_body(node), live, workspace=workspace)
        elif node.op == "call_function":
            yield node, live + workspace(node)
        live -= sum(sizes[s] for s in ends.get(position[node], ()))


def moments_of(module: fx.GraphModule, *, workspace: Workspace = device_workspace) -> dict[Moment, float]:
    """The most bytes alive beyond the arguments at each kind of moment.

    A kind is known in graphs of any depth: the phase, and the stack of the parameter's path with the layer as "first",
    "last" or "inner".
    """
    found: dict[Moment, float] = {}
    last = _last_layers(module)
    for node, live in alive(module, workspace=workspace):
        kind = (node.meta.get("phase") or "", _place(node.meta.get("path") or "", last))
        found[kind] = max(found.get(kind, 0.0), live)
    return found


def _last_layers(module: fx.GraphModule) -> dict[str, int]:
    """The highest number of a layer of each stack, by the path before the number; bodies of loops included."""
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
