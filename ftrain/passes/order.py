"""Run each leaf's update as soon as its gradient exists, so that gradients and temporaries live briefly."""

from collections.abc import Iterable

from torch import fx

from ftrain.loop import is_loop, loop_body
from ftrain.passes.aliasing import readers_by_storage, storage


def update_early(module: fx.GraphModule, donated: dict[str, int]) -> None:
    """Reorder the nodes of phase "step" by the output they serve; forward and backward keep their order.

    `donated` maps the names of placeholders to the positions of the outputs that replace them. An optimizer written
    with tree maps computes all first moments, then all second moments, ...: whole trees of temporaries. Here the chain
    of one output is emitted whole, at the first place where all forward and backward nodes that it reads are done and
    the old value of its leaf has been read for the last time. Data dependences are kept, so no value changes. Bodies of
    loops add to their carry as early.
    """
    graph = module.graph
    nodes = list(graph.nodes)
    for loop in [n for n in nodes if is_loop(n)]:
        body = loop_body(loop)
        carried = [n.name for n in body.graph.nodes if n.op == "placeholder"][: len(loop.args[2])]
        update_early(body, {name: i for i, name in enumerate(carried)})
    position = {node: i for i, node in enumerate(nodes)}
    output = nodes[-1]
    backbone = [n for n in nodes[:-1] if n.meta.get("phase") != "step" or n.op in ("placeholder", "get_attr")]
    placed = set(backbone)
    old_leaf = {position_out: name for name, position_out in donated.items()}
    readers = readers_by_storage(graph)
    old_readers = {
        n.name: [r for r in readers.get(storage(n), ()) if r in placed] for n in nodes[:-1] if n.name in donated
    }

    chains = []
    for i, result in enumerate(_results(output)):
        chain = _ancestors([result], placed)
        needs = [n for c in [*chain, result] for n in c.all_input_nodes if n in placed]
        needs += old_readers.get(old_leaf.get(i, ""), [])
        chains.append((max((position[n] for n in needs), default=-1), i, chain))
    chains.sort(key=lambda c: c[:2])

    order: list[fx.Node] = []
    done: set[fx.Node] = set()
    waiting = iter(chains)
    current = next(waiting, None)
    for node in backbone:
        while current is not None and current[0] < position[node] and node.op not in ("placeholder", "get_attr"):
            _emit(sorted(current[2], key=position.__getitem__), order, done)
            current = next(waiting, None)
        early = _ancestors(node.all_input_nodes, placed)
        _emit([*sorted(early, key=position.__getitem__), node], order, done)
    while current is not None:
        _emit(sorted(current[2], key=position.__getitem__), order, done)
        current = next(waiting, None)
    _emit(nodes[:-1], order, done)
    _apply(graph, order)


def _results(output: fx.Node) -> list[fx.Node]:
    return [n for n in output.args[0] if isinstance(n, fx.Node)]  # type: ignore[union-attr]


def _ancestors(roots: Iterable[fx.Node], stop: set[fx.Node]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    stack = list(roots)
    while stack:
        node = stack.pop()
        if node in found or node in stop:
            continue
        found.add(node)
        stack.extend(node.all_input_nodes)
    return found


def _emit(nodes: list[fx.Node], order: list[fx.Node], done: set[fx.Node]) -> None:
    for node in nodes:
        if node not in done:
            done.add(node)
            order.append(node)


def _apply(graph: fx.Graph, order: list[fx.Node]) -> None:
    previous = None
    for node in order:
        if previous is not None:
            previous.append(node)
        previous = node
    graph.lint()
