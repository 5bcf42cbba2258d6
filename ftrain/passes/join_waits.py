"""Make the memory plan count the result of a collective once: the wait returns the same memory."""

from torch import fx

from ftrain.graph.collectives import WAIT


def join_waits(module: fx.GraphModule) -> None:
    """Set the fake value of each collective to that of its wait, in place.

    A fake wait returns a new tensor, but a real wait returns its argument.
    """
    for node in module.graph.nodes:
        if node.target is WAIT:
            start = node.args[0]
            if isinstance(start, fx.Node) and start.op == "call_function":
                start.meta["val"] = node.meta["val"]
