"""Run each leaf's update as soon as its gradient exists, so that gradients and temporaries are live only briefly."""

from torch import fx

from ftrain.graph.aliasing import readers_by_storage, storage
from ftrain.graph.loop import carried_outputs, is_loop, loop_body
from ftrain.graph.op_effects import is_pure
from ftrain.graph.order import reorder


def update_early(module: fx.GraphModule, donated: dict[str, int]) -> None:
    """Reorder the pure nodes of phase "step" by output; all other nodes keep their order.

    `donated`: by the name of a placeholder, the position of the output that replaces it.

    An optimizer written with tree maps computes all first moments, then all second moments, and so on: whole trees of
    temporaries. This pass emits all nodes of one output together, at the first place where the forward and backward
    nodes that they read are done and the old value of the leaf has been read for the last time. Data dependencies are
    kept, so no value changes. Bodies of loops are treated in the same way.
    """
    graph = module.graph
    nodes = list(graph.nodes)
    for loop in [n for n in nodes if is_loop(n)]:
        body = loop_body(loop)
        update_early(body, carried_outputs(loop))
    position = {node: i for i, node in enumerate(nodes)}
    output = nodes[-1]
    backbone = [n for n in nodes[:-1] if n.meta.get("phase") != "step" or n.op != "call_function" or not is_pure(n)]
    placed = set(backbone)
    old_leaf = {position_out: name for name, position_out in donated.items()}
    readers = readers_by_storage(graph)
    old_readers = {
        n.name: [r for r in readers.get(storage(n), ()) if r in placed] for n in nodes[:-1] if n.name in donated
    }

    ready = _ready(nodes[:-1], placed, position)
    chains = []
    for i, result in enumerate(_results(output)):
        read = max((position[r] for r in old_readers.get(old_leaf.get(i, ""), ())), default=-1)
        chains.append((max(ready[result], read), i, result))
    chains.sort(key=lambda c: c[:2], reverse=True)

    order: list[fx.Node] = []
    done: set[fx.Node] = set()
    for node in backbone:
        while chains and chains[-1][0] < position[node] and node.op not in ("placeholder", "get_attr"):
            _emit([chains.pop()[2]], position, order, done)
        _emit([node], position, order, done)
    while chains:
        _emit([chains.pop()[2]], position, order, done)
    _emit(nodes[:-1], position, order, done)
    reorder(order)
    graph.lint()


def _ready(nodes: list[fx.Node], placed: set[fx.Node], position: dict[fx.Node, int]) -> dict[fx.Node, int]:
    """By node, the last position among the placed nodes that it is computed from; its own if it is placed."""
    ready: dict[fx.Node, int] = {}
    for node in nodes:
        ready[node] = position[node] if node in placed else max((ready[n] for n in node.all_input_nodes), default=-1)
    return ready


def _results(output: fx.Node) -> list[fx.Node]:
    return [n for n in output.args[0] if isinstance(n, fx.Node)]  # type: ignore[union-attr]


def _emit(roots: list[fx.Node], position: dict[fx.Node, int], order: list[fx.Node], done: set[fx.Node]) -> None:
    """Append to `order`, in their old order, those of `roots` and the nodes they need that are not in `done`."""
    found: set[fx.Node] = set()
    stack = list(roots)
    while stack:
        node = stack.pop()
        if node not in found and node not in done:
            found.add(node)
            stack.extend(node.all_input_nodes)
    done |= found
    order.extend(sorted(found, key=position.__getitem__))
