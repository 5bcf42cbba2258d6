"""Which parameter each node is about: the paths that reports, policies of recompute and layers go by."""

from torch import fx

from ftrain.graph.loop import is_loop, loop_body


def spread_paths(module: fx.GraphModule, first_argument: str) -> None:
    """Give every node the path of the parameter that it is about.

    A node that reads leaves of the step's first argument (its state or parameters) has the last such leaf's path; a
    backward node has its forward op's; any other inherits from the latest of its inputs that has one, which is where
    the computation stands. Leaves of other arguments only name nodes that know nothing better.
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
    spread_paths(body, first_argument)
