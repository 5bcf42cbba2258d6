"""The nodes of a graph that involve other ranks."""

from typing import Any

import torch
from torch import fx

from ftrain.graph.loop import is_loop, loop_body
from ftrain.sharding.collectives import exchange_rows, gather_ranks, shift_ranks

_c10d = torch.ops._c10d_functional

COLLECTIVES: dict[Any, str] = {
    gather_ranks: "all_gather",
    _c10d.reduce_scatter_tensor.default: "reduce_scatter",
    _c10d.all_reduce.default: "all_reduce",
    _c10d.all_to_all_single.default: "all_to_all",
    shift_ranks: "shift_ranks",
    exchange_rows: "exchange_rows",
}
"""The ops of a graph that involve other ranks; the last argument of each is the name of its group."""
WAIT = _c10d.wait_tensor.default
"""Returns its argument when the collective that fills it has ended."""


def axes_of_group(name: str) -> tuple[str, ...]:
    """The axes of a group from its name (see `ftrain.sharding.Mesh.group`).

    >>> from ftrain.graph.collectives import axes_of_group
    >>> axes_of_group("axis_shard+sequence@r1d2s2e1")
    ('shard', 'sequence')
    """
    return tuple(name.removeprefix("axis_").split("@")[0].split("+"))


def groups_of(module: fx.GraphModule) -> list[tuple[str, ...]]:
    """The axes of each group that a graph's collectives run over, bodies of loops included, in order of first use."""
    found: dict[tuple[str, ...], None] = {}
    for node in module.graph.nodes:
        if node.target in COLLECTIVES:
            found.setdefault(axes_of_group(str(node.args[-1])))
        elif is_loop(node):
            found.update(dict.fromkeys(groups_of(loop_body(node))))
    return list(found)
