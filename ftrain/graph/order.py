"""Another order of the nodes of a graph."""

from collections.abc import Sequence
from itertools import pairwise

from torch import fx


def reorder(order: Sequence[fx.Node]) -> None:
    """Let the nodes, all those of one graph, stand in this order."""
    for previous, node in pairwise(order):
        previous.append(node)
