"""Reductions over divided dims, finished over the ranks that hold the other pieces."""

import math
from typing import Any

import torch
from torch import fx

from ftrain.private import value_of
from ftrain.spread import Fix
from sharding.mesh import Mesh

_aten, _c10d = torch.ops.aten, torch.ops._c10d_functional


def finish_reductions(fixes: list[Fix], mesh: Mesh) -> None:
    """After each of these nodes put what makes a number of one rank's piece that of the whole array; in place."""
    for fix in fixes:
        _finish(fix, mesh)
    for graph in {fix.node.graph for fix in fixes}:
        graph.lint()
        assert graph.owning_module is not None
        graph.owning_module.recompile()


def _finish(fix: Fix, mesh: Mesh) -> None:
    users, at, count = list(fix.node.users), fix.node, math.prod(mesh.group(*g).size for g in fix.groups)

    def then(target: torch._ops.OpOverload, *args: Any) -> fx.Node:
        nonlocal at
        with at.graph.inserting_after(at):
            made = at.graph.call_function(target, args)
        made.meta = {k: v for k, v in fix.node.meta.items() if k in ("site", "phase", "sequence", "path")}
        made.meta["val"] = value_of(made)
        at = made
        return made

    how, order = fix.how, _order(fix)
    squares = how == "norm" and order == 2
    value = then(_aten.mul.Tensor, fix.node, fix.node) if squares else fix.node
    over = {"max": "max", "min": "min"}.get(how, "max" if how == "norm" and order == math.inf else "sum")
    for group in fix.groups:
        started = then(_c10d.all_reduce.default, value, over, mesh.group(*group).name)
        started.meta["purpose"] = "reduction"
        value = then(_c10d.wait_tensor.default, started)
    if how == "mean":
        value = then(_aten.div.Tensor, value, count)
    if squares:
        value = then(_aten.sqrt.default, value)
    for user in users:
        user.replace_input_with(fix.node, value)


def _order(fix: Fix) -> float:
    given = fix.node.args[1] if len(fix.node.args) > 1 else 2
    return 2.0 if given is None or fix.how != "norm" else float(given)  # type: ignore[arg-type]
