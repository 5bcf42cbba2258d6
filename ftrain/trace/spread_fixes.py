"""Finish reductions over divided dims over the ranks that hold the other pieces."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ftrain.graph.absent_device import absent_device, put_on
from ftrain.graph.torch_private import fake_mode_of, trace_to_graph, value_of
from ftrain.sharding.mesh import Mesh
from ftrain.sharding.placement import Placement, Split
from ftrain.sharding.shards import fill_padding
from ftrain.sharding.spmd import on_mesh
from ftrain.trace.spread import Fix
from ftrain.trace.spread_ops import coordinates_of, norm_order

_aten, _c10d = torch.ops.aten, torch.ops._c10d_functional


def finish_reductions(fixes: list[Fix], mesh: Mesh) -> None:
    """Insert after each of these reductions the collectives that make its result that of the whole array, in place.

    Padding of pieces is first replaced by the neutral element of the reduction (0, 1 or an infinity).
    """
    for fix in fixes:
        uneven = [s for s in fix.over if fix.placement.shape[s.dim] % s.size]
        if uneven:
            _mask(fix, uneven, mesh)
        _finish(fix, mesh)
    for graph in {fix.node.graph for fix in fixes}:
        graph.lint()
        assert graph.owning_module is not None
        graph.owning_module.recompile()


def _mask(fix: Fix, uneven: Sequence[Split], mesh: Mesh) -> None:
    source, place = fix.node.args[0], coordinates_of(fix.node.graph)
    assert isinstance(source, fx.Node)
    assert place is not None
    values = [source.meta["val"], place.meta["val"]]
    neutral = {"max": -math.inf, "min": math.inf, "all": 1.0}.get(fix.how, 0.0)
    absent = absent_device([values[0].device])
    with fake_mode_of(values):
        given = values if absent is None else [torch.empty(v.shape, dtype=v.dtype) for v in values]
        made = trace_to_graph(lambda x, at: _inside(x, at, fix.placement, uneven, mesh, neutral), given)
    if absent is not None:
        put_on(made, absent)
    inputs = dict(zip((n for n in made.graph.nodes if n.op == "placeholder"), (source, place), strict=True))
    before = set(fix.node.graph.nodes)
    with fix.node.graph.inserting_before(fix.node):
        masked = fix.node.graph.graph_copy(made.graph, inputs)
    (masked,) = masked if isinstance(masked, list | tuple) else (masked,)
    for node in fix.node.graph.nodes:
        if node not in before:
            node.meta.update(_provenance(fix.node))
    fix.node.args = (masked, *fix.node.args[1:])


def _inside(
    x: Tensor, coordinates_3: Tensor, placement: Placement, uneven: Sequence[Split], mesh: Mesh, neutral: float
) -> Tensor:
    """The piece `x`, of the placement's local shape, with its padding replaced by `neutral`."""
    with on_mesh(mesh, coordinates_3):
        for split in uneven:
            start = placement.starts()[split.dim]
            x = fill_padding(x, split.dim, start, placement.shape[split.dim], neutral)
    return x


def _finish(fix: Fix, mesh: Mesh) -> None:
    users, at = list(fix.node.users), fix.node

    def then(target: torch._ops.OpOverload, *args: Any) -> fx.Node:
        nonlocal at
        with at.graph.inserting_after(at):
            made = at.graph.call_function(target, args)
        made.meta = {**_provenance(fix.node), "val": None}
        made.meta["val"] = value_of(made)
        at = made
        return made

    how, value = fix.how, fix.node
    order = norm_order(fix.node) if how == "norm" else 1.0
    if how == "mean":
        value = then(_aten.mul.Tensor, value, math.prod(fix.placement.local_shape[d] for d in fix.dims))
    squares = order == 2
    if squares:
        value = then(_aten.mul.Tensor, value, value)
    over = {"max": "max", "min": "min", "all": "min", "any": "max"}.get(how, "max" if order == math.inf else "sum")
    for split in fix.over:
        started = then(_c10d.all_reduce.default, value, over, mesh.group(*split.axes).name)
        started.meta["purpose"] = "reduction"
        value = then(_c10d.wait_tensor.default, started)
    if how == "mean":
        value = then(_aten.div.Tensor, value, math.prod(fix.placement.shape[d] for d in fix.dims))
    if squares:
        value = then(_aten.sqrt.default, value)
    for user in users:
        user.replace_input_with(fix.node, value)


def _provenance(node: fx.Node) -> dict[str, Any]:
    return {k: v for k, v in node.meta.items() if k in ("source", "phase", "seq_nr", "path")}
