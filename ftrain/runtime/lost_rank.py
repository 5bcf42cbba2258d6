"""A run that lost a rank: which rank, and at which collective the others stand."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

import torch.distributed as dist
from torch import fx

from ftrain.graph.collectives import COLLECTIVES, WAIT, axes_of_group
from ftrain.graph.failing_node import failing_node
from ftrain.graph.text import short_source
from ftrain.sharding.heartbeat import Heartbeat


@contextmanager
def naming_lost_ranks(running: Callable[[], fx.GraphModule], heartbeat: Heartbeat | None) -> Iterator[None]:
    """Within the block an error of torch.distributed at a collective becomes a RuntimeError that names the collective,
    the ranks that no longer answer, and the cause.

    `running`: returns the graph whose program runs in the block. `heartbeat`: tells which ranks answer. Other errors
    pass unchanged.
    """
    try:
        yield
    except RuntimeError as error:
        node = failing_collective(running(), error.__traceback__)
        if node is None:
            raise
        silent = [] if heartbeat is None else heartbeat.silent()
        lost = ", ".join(map(str, silent))
        who = f"rank {lost} no longer answers" if silent else "all ranks still answer (a timeout)"
        raise RuntimeError(
            f"rank {dist.get_rank()} stopped: {who}; it stood at {describe(node)}. Cause: {error}"
        ) from error


def failing_collective(graph: fx.GraphModule, trace: TracebackType | None) -> fx.Node | None:
    """The collective of `graph` at which an error with this traceback was raised; None if it was none."""
    found = failing_node(graph, trace)
    if found is not None and found.target is WAIT:
        found = found.all_input_nodes[0]
    return found if found is not None and found.target in COLLECTIVES else None


def describe(node: fx.Node) -> str:
    """A collective in words: kind, purpose, axes, parameter path, source line."""
    meta = node.meta
    axes = " x ".join(axes_of_group(str(node.args[-1])))
    parts = [COLLECTIVES[node.target], f"({meta.get('purpose') or 'no purpose'})", f"over {axes}"]
    if meta.get("path"):
        parts.append(f"for {meta['path']}")
    return " ".join([*parts, f"[{short_source(meta.get('source'))}]"])
