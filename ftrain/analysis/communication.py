"""The bytes that one rank sends: by collective and by purpose."""

import math
from collections.abc import Callable

from torch import Tensor, fx

from ftrain.graph.collectives import COLLECTIVES, axes_of_group
from ftrain.graph.loop import is_loop, loop_body
from ftrain.graph.sizes import sized
from ftrain.sharding.link import sent_bytes
from ftrain.sharding.mesh import Mesh


def node_sends(node: fx.Node, mesh: Mesh) -> int:
    """Bytes that one rank of `mesh` sends in the collective of a node.

    Sizes that depend on data count with their expected value (`ftrain.graph.sizes`).
    """
    value = sized(node.args[0])  # type: ignore[arg-type]
    assert isinstance(value, Tensor)
    ranks = math.prod(mesh.axis_size(a) for a in axes_of_group(str(node.args[-1])))
    return sent_bytes(COLLECTIVES[node.target], value.numel() * value.element_size(), ranks)


def bytes_moved(
    module: fx.GraphModule, mesh: Mesh, *, count: Callable[[fx.Node, Mesh], float] = node_sends
) -> dict[str, int]:
    """Bytes that one rank sends in one run of the graph, by the purpose of the collective, sorted by purpose.

    The body of a loop counts once for each iteration. `count`: bytes of one collective, by default `node_sends`.
    """
    found: dict[str, float] = {}
    for node in module.graph.nodes:
        if node.target in COLLECTIVES:
            purpose = node.meta.get("purpose", "")
            found[purpose] = found.get(purpose, 0) + count(node, mesh)
        elif is_loop(node):
            for purpose, sent in bytes_moved(loop_body(node), mesh, count=count).items():
                found[purpose] = found.get(purpose, 0) + int(node.args[1]) * sent
    return {purpose: round(sent) for purpose, sent in sorted(found.items())}
