"""Which node of a graph an error came from: the generated code has a line for each."""

import linecache
from collections.abc import Iterator
from types import TracebackType

from torch import fx


def failing_node(module: fx.GraphModule, trace: TracebackType | None, *, inside: bool = True) -> fx.Node | None:
    """The innermost node that an error came from, by its line in the generated code; None if it came from elsewhere.

    The graph, the bodies of its loops and its fused runs are looked at; without `inside` the graph alone. `trace`: the
    error's `__traceback__`.
    """
    graphs = {type(g).forward.__code__.co_filename: g for g in (_graphs(module) if inside else [module])}
    found = None
    while trace is not None:
        code = trace.tb_frame.f_code
        if code.co_name == "forward" and code.co_filename in graphs:
            line = linecache.getline(code.co_filename, trace.tb_lineno)
            name = line.strip().split(" = ")[0]
            found = next((n for n in graphs[code.co_filename].graph.nodes if n.name == name), found)
        trace = trace.tb_next
    return found


def _graphs(module: fx.GraphModule) -> Iterator[fx.GraphModule]:
    """The module, and the graphs that it holds."""
    return (m for m in module.modules() if isinstance(m, fx.GraphModule))
