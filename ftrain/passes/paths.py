"""The parameter that each node belongs to, as a path: for reports, recompute policies and layers."""

from torch import fx

from ftrain.graph.loop import is_loop, loop_body


def assign_paths(module: fx.GraphModule, first_argument: str) -> None:
    """Set `meta["path"]` of every node to the path of the parameter that it belongs to, in place.

    `first_argument`: the name of the step's first argument, whose leaves are its state or parameters.

    - A node that reads leaves of the first argument gets the path of the last such leaf.
    - A backward node gets the path of its forward op.
    - Any other node gets the path of its latest input that has one; paths in the first argument win over others.

    Bodies of loops are treated in the same way, with the paths of the loop's inputs.
    """
    order = {node: i for i, node in enumerate(module.graph.nodes)}
    forward: dict[int, str] = {}
    prefix = first_argument + "."
    for node in module.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        known = [n for n in node.all_input_nodes if n.meta.get("path")]
        state = [n for n in known if n.meta["path"].startswith(prefix)]
        leaves = [n for n in state if n.op == "placeholder"]
        best = leaves or state or known
        path = max(best, key=order.__getitem__).meta["path"] if best else ""
        seq_nr = node.meta.get("seq_nr")
        if node.meta.get("phase") == "forward":
            forward.setdefault(seq_nr, path)
        elif node.meta.get("phase") == "backward":
            path = forward.get(seq_nr) or path
        if path:
            node.meta["path"] = path
        if is_loop(node):
            _spread_into(node, first_argument)


def _spread_into(node: fx.Node, first_argument: str) -> None:
    body = loop_body(node)
    placeholders = [n for n in body.graph.nodes if n.op == "placeholder"]
    flat = [n for group in node.args[2:] for n in group]  # type: ignore[union-attr]
    for inner, outer in zip(placeholders, flat, strict=True):
        if isinstance(outer, fx.Node) and outer.meta.get("path"):
            inner.meta["path"] = outer.meta["path"]
    assign_paths(body, first_argument)
