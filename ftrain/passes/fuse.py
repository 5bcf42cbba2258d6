"""Fusion: replace each run of neighbouring elementwise ops and reductions by one node; other nodes stay in place.

A compiler that gets the whole graph reorders it: it moves recomputed nodes to where the value was first computed and
keeps the value, so the memory plan no longer holds. A compiler that gets only runs of neighbours can still fuse what is
worth fusing, while the nodes between the runs (products, attention, collectives, in-place updates) keep their order
and every tensor its lifetime. Equal runs, such as those of a model's layers, share one body, which is compiled once.
"""

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from ftrain.graph.aliasing import storage
from ftrain.graph.fused import WRITES, run_fused
from ftrain.graph.op_effects import is_pure
from ftrain.graph.sizes import has_static_layout

_aten = torch.ops.aten
_REDUCTIONS = {
    _aten.sum.default, _aten.sum.dim_IntList, _aten.mean.default, _aten.mean.dim, _aten.amax.default,
    _aten.amin.default, _aten.max.default, _aten.min.default, _aten.var.correction, _aten._softmax.default,
    _aten._log_softmax.default, _aten._softmax_backward_data.default, _aten._log_softmax_backward_data.default,
    _aten.native_layer_norm.default,
}  # fmt: skip
_MADE = {
    _aten.full.default, _aten.full_like.default, _aten.zeros_like.default, _aten.ones_like.default,
    _aten.arange.default, _aten.arange.start, _aten.arange.start_step, _aten._to_copy.default, _aten.clone.default,
    _aten.cat.default, _aten.stack.default, _aten.constant_pad_nd.default,
}  # fmt: skip
VIEWS = {
    _aten.view.default, _aten.t.default, _aten.transpose.int, _aten.permute.default, _aten.expand.default,
    _aten.unsqueeze.default, _aten.squeeze.dim, _aten.squeeze.dims, _aten.squeeze.default, _aten.slice.Tensor,
    _aten.select.int, _aten.alias.default, _aten.detach.default,
}  # fmt: skip
"""Views. A run reads through them; views that other nodes need stay outside of the run."""
_COPY = _aten.copy_.default
_LEAST_BYTES_ON_CPU = 1 << 18


def fuse_runs(module: fx.GraphModule) -> None:
    """Replace each run of fusible ops by one call of `run_fused`, in place. No value changes.

    Two ops are in one run if no other op is between them and one uses the other, directly or through views. Scalars
    are fused only with scalars, because they would join ops that are otherwise unrelated, such as the updates of all
    parameters. A `copy_` to memory that a run reads is part of the run.
    """
    bodies: dict[Any, str] = {}
    for nodes in list(_stretches(list(module.graph.nodes))):
        stretch = set(nodes)
        replaced: set[fx.Node] = set()
        for run in _connected(nodes, stretch):
            if _is_worth_it(run) and _writes_are_plain(run, stretch):
                _replace(module, run, stretch, bodies)
                replaced.update(run)
        _erase(nodes, replaced)
    module.graph.lint()
    module.recompile()


def _stretches(nodes: list[fx.Node]) -> Iterator[list[fx.Node]]:
    """Maximal sequences of neighbours that are fusible or views, all scalars or none."""
    found: list[fx.Node] = []
    scalar = False
    for node in nodes:
        if node.op == "get_attr":
            continue
        fusible = has_static_layout(node.meta.get("val")) and (node.target in VIEWS or _is_compute(node))
        if found and (not fusible or _is_scalar(node) != scalar):
            yield found
            found = []
        if fusible:
            scalar = _is_scalar(node)
            found.append(node)
    if found:
        yield found


def _is_compute(node: fx.Node) -> bool:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return False
    if target is _COPY:
        return not node.users and node.args[0].op == "placeholder"  # type: ignore[union-attr]
    known = torch.Tag.pointwise in target.tags or target in _REDUCTIONS or target in _MADE
    return known and is_pure(node)


def _is_scalar(node: fx.Node) -> bool:
    return node.meta["val"].numel() <= 1


def _connected(nodes: list[fx.Node], stretch: set[fx.Node]) -> list[list[fx.Node]]:
    """The ops of a stretch without its views, in groups that share no value and no memory that is written."""
    leader: dict[Any, Any] = {}

    def find(x: Any) -> Any:
        while leader.setdefault(x, x) != x:
            leader[x] = leader[leader[x]]
            x = leader[x]
        return x

    written = {storage(n.args[0]) for n in nodes if n.target is _COPY}  # type: ignore[arg-type]
    ops = [n for n in nodes if n.target not in VIEWS]
    for node in ops:
        for source in _sources(node, stretch):
            if source in stretch:
                leader[find(source)] = find(node)
            if storage(source) in written:
                leader[find(storage(source))] = find(node)
    groups: dict[Any, list[fx.Node]] = {}
    for node in ops:
        groups.setdefault(find(node), []).append(node)
    return list(groups.values())


def _is_worth_it(run: list[fx.Node]) -> bool:
    """True for several ops; on a CPU, where a call costs as much as a small op, only with enough bytes."""
    ops = [n.meta["val"] for n in run if n.target is not _COPY]
    return len(ops) > 1 and (ops[0].device.type != "cpu" or sum(v.nbytes for v in ops) >= _LEAST_BYTES_ON_CPU)


def _sources(node: fx.Node, stretch: set[fx.Node]) -> Iterator[fx.Node]:
    """The nodes that an op reads; a view of its stretch is replaced by its base."""
    for source in node.all_input_nodes:
        while source in stretch and source.target in VIEWS:
            source = source.all_input_nodes[0]
        yield source


def _writes_are_plain(run: list[fx.Node], stretch: set[fx.Node]) -> bool:
    """True if each written memory is one input of the run, and not also another view of it."""
    members = set(run)
    given: dict[int | None, set[fx.Node]] = {}
    for node in run:
        for source in _sources(node, stretch):
            if source not in members:
                given.setdefault(storage(source), set()).add(source)
    written = [n.args[0] for n in run if n.target is _COPY]
    return all(given[storage(old)] == {old} for old in written)  # type: ignore[arg-type]


def _replace(module: fx.GraphModule, run: list[fx.Node], stretch: set[fx.Node], bodies: dict[Any, str]) -> None:
    """Copy the run into a body, and call the body after the run's last op.

    Users of the run's values then read the results of the call. `_erase` removes the ops of the run.
    """
    graph, members = module.graph, set(run)
    results = [n for n in run if _is_needed(n, members, stretch)]
    body, inputs = _body(run, results, stretch)
    key = _signature(body)
    if key not in bodies:
        bodies[key] = f"fused_{len(bodies)}"
        setattr(module, bodies[key], fx.GraphModule({}, body))
    with graph.inserting_after(run[-1]):
        held = graph.get_attr(bodies[key])
    with graph.inserting_after(held):
        call = graph.call_function(run_fused, (held, *inputs))
    writes = [inputs.index(n.args[0]) + 1 for n in run if n.target is _COPY]  # type: ignore[arg-type]
    call.meta.update(run[-1].meta, val=[n.meta["val"] for n in results], **{WRITES: writes})
    moved: list[fx.Node] = []
    for i, node in enumerate(results):
        with graph.inserting_after(moved[-1] if moved else call):
            moved.append(graph.call_function(operator.getitem, (call, i)))
        moved[-1].meta.update(node.meta)
        node.replace_all_uses_with(moved[-1], delete_user_cb=lambda user: user not in members)
    _move_views(moved, stretch)


def _is_needed(node: fx.Node, members: set[fx.Node], stretch: set[fx.Node]) -> bool:
    """True if a node outside of the run uses this node, directly or through views."""
    for user in node.users:
        if user in stretch and user.target in VIEWS:
            if _is_needed(user, members, stretch):
                return True
        elif user not in members:
            return True
    return False


def _move_views(results: list[fx.Node], stretch: set[fx.Node]) -> None:
    """Move the views of the results, and views of these, to directly after the last result."""
    if not results:
        return
    at, bases = results[-1], list(results)
    while bases:
        for view in [u for u in bases.pop().users if u in stretch and u.target in VIEWS]:
            at.append(view)
            at = view
            bases.append(view)


def _erase(nodes: list[fx.Node], replaced: set[fx.Node]) -> None:
    """Erase the replaced ops of a stretch, and the views that only these used.

    The order is from the last to the first, so that each node is unused when it is erased.
    """
    for node in reversed(nodes):
        if node in replaced or (replaced and node.target in VIEWS and not node.users):
            node.graph.erase_node(node)


def _body(run: list[fx.Node], results: list[fx.Node], stretch: set[fx.Node]) -> tuple[fx.Graph, list[fx.Node]]:
    """The run as a graph of its own, and its inputs; the graph includes the views through which the run reads."""
    body, members = fx.Graph(), set(run)
    env: dict[fx.Node, fx.Node] = {}
    inputs = list(dict.fromkeys(s for node in run for s in _sources(node, stretch) if s not in members))
    for i, node in enumerate(inputs):
        env[node] = body.placeholder(f"x{i}")
        env[node].meta["val"] = node.meta["val"]

    def copy(node: fx.Node) -> fx.Node:
        if node not in env:
            env[node] = body.node_copy(node, copy)
        return env[node]

    for node in run:
        copy(node)
    body.output(tuple(env[n] for n in results))
    return body, inputs


def _signature(body: fx.Graph) -> str:
    """A key that is equal for bodies with equal ops and input layouts."""
    number = {n: f"%{i}" for i, n in enumerate(body.nodes)}

    def described(node: fx.Node) -> Any:
        if node.op == "placeholder":
            value = node.meta["val"]
            return (tuple(value.shape), value.stride(), value.storage_offset(), str(value.dtype), str(value.device))
        return (str(node.target), fx.map_arg((node.args, node.kwargs), lambda n: number[n]))

    return repr([described(n) for n in body.nodes])
