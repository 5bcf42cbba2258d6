"""A collective's result and what its wait returns are one piece of memory."""

from torch import fx

from ftrain.graph.collectives import WAIT


def join_waits(module: fx.GraphModule) -> None:
    """Give the start of each collective the value of its wait, so that a memory plan counts its result once.

    A fake wait makes a new tensor, a real one returns its argument.
    """
    for node in module.graph.nodes:
        if node.target is WAIT:
            start = node.args[0]
            if isinstance(start, fx.Node) and start.op == "call_function":
                start.meta["val"] = node.meta["val"]
