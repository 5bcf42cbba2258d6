"""The order of the nodes of a graph."""

from collections.abc import Sequence
from itertools import pairwise

from torch import fx


def reorder(order: Sequence[fx.Node]) -> None:
    """Put the nodes, all those of one graph, into this order. Each must come after its inputs, which is not checked."""
    for previous, node in pairwise(order):
        previous.append(node)
