"""A graph as text: one line per node, with where it comes from and how many bytes are alive."""

from collections.abc import Iterator

from torch import fx

from ftrain.analysis.liveness import plan_memory
from ftrain.graph.fused import fused_body, is_fused
from ftrain.graph.loop import is_loop, loop_body
from ftrain.graph.sizes import unknown_sizes
from ftrain.graph.text import node_notes, show_argument, show_bytes, show_node


def graph_text(module: fx.GraphModule) -> str:
    """The graph, a line per node, in the order in which it runs.

    `name: dtype[shape] = op(arguments)`, then after `#` the phase, the parameter path, the source line and the bytes
    alive beyond the inputs while the node runs. The body of a loop and of fused ops follows its node, indented.
    """
    unknown = [f"# {line}" for line in unknown_sizes(module)]
    return "\n".join([*unknown, *_lines(module, "")])


def _lines(module: fx.GraphModule, indent: str) -> Iterator[str]:
    alive = dict(plan_memory(module).timeline)
    for node in module.graph.nodes:
        if node.op == "output":
            yield f"{indent}return {show_argument(node.args[0])}"
            continue
        notes = [*node_notes(node), *([f"{show_bytes(alive[node.name])} alive"] if node.name in alive else [])]
        yield f"{indent}{show_node(node)}  # {', '.join(notes)}".rstrip(" #")
        if is_loop(node):
            yield from _lines(loop_body(node), indent + "    ")
        if is_fused(node):
            yield from _lines(fused_body(node), indent + "    ")
