"""Which node of a graph an error came from: the generated code has a line for each."""

import linecache
from types import TracebackType

from torch import fx


def failing_node(module: fx.GraphModule, trace: TracebackType | None) -> fx.Node | None:
    """The node whose line in the generated code the error went through; None if it came from elsewhere."""
    nodes = {n.name: n for n in module.graph.nodes}
    found = None
    while trace is not None:
        code = trace.tb_frame.f_code
        if code.co_name == "forward" and code.co_filename.startswith("<eval_with_key>"):
            line = linecache.getline(code.co_filename, trace.tb_lineno)
            found = nodes.get(line.strip().split(" = ")[0], found)
        trace = trace.tb_next
    return found
