"""Refuses counters of modules that also cache tensors.

A module that cached a tensor of a trace is left as it was before the trace, numbers included, since some of them tell
what is cached (`cached_length`). A counter would be lost with them. A second run of the step's Python tells one from
the other: what describes a cache keeps its value, a counter goes on.
"""

from collections.abc import Callable

from torch import fx

from ftrain.graph.torch_private import tracing_graph
from ftrain.trace.layout_reads import LayoutReads
from ftrain.trace.leaks import Modules
from ftrain.trace.plain_values import comparable


def require_no_lost_counters(modules: Modules, reads: LayoutReads, run: Callable[[], object]) -> None:
    """ValueError, with module and attribute, for a plain value that changes at every call of a module that caches.

    `modules`: the record of the trace under way, and `reads` its layout queries. `run`: runs the step's Python once
    more; it is called only where a module caches a tensor and has changed such a value, and leaves no nodes.
    """
    changed = modules.changed_beside_caches()
    graph = tracing_graph()
    if not changed or graph is None:
        return
    before = [comparable(getattr(module, name, None)) for module, name in changed]
    last, queries = next(iter(reversed(graph.nodes))), len(reads.found)
    run()
    _erase_after(graph, last)
    del reads.found[queries:]
    for (module, name), value in zip(changed, before, strict=True):
        if comparable(getattr(module, name, None)) != value:
            modules.restore()
            raise ValueError(
                f"the step changes {name!r} of a {type(module).__name__} at every call, and the module also keeps a "
                "tensor that it makes: after a trace both are as they were before, so the change would be lost. Pass "
                f"{name!r} as a part of the state and return its new value, or make the tensor before the step"
            )


def _erase_after(graph: fx.Graph, last: fx.Node) -> None:
    for node in reversed(list(graph.nodes)):
        if node is last:
            return
        graph.erase_node(node)
