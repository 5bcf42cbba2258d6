"""Errors inside a graph's program: their message gets the line of the user's code that the op came from."""

import linecache

from torch import fx

from ftrain.graph.failing_node import failing_node
from ftrain.graph.text import op_name


def name_line(error: Exception, module: fx.GraphModule) -> None:
    """Add the op and the user's line to the message of an error from a graph's program.

    The error keeps its class. Nothing is added where the node is not known.
    """
    node = failing_node(module, error.__traceback__)
    source = None if node is None else node.meta.get("source")
    if node is None or source is None:
        return
    text = linecache.getline(source.file, source.line).strip()
    first, *others = error.args or ("",)
    error.args = (f"{first}\nin {op_name(node)}, of {source}: {text}", *others)
