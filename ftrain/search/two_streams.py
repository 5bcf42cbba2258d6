"""A rank's program run on paper on a cluster: a stream of compute, and one of messages on each kind of link.

Groups of ranks have streams of their own on a GPU, so that an exchange within a node does not wait for a gather over
the network; messages on one kind of link share it, one after the other.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import fx

from ftrain.communication import node_sends
from ftrain.lockstep import COLLECTIVES, axes_of_group
from ftrain.loop import is_loop, loop_body
from ftrain.op_times import OpTimes
from ftrain.passes.waits import WAIT
from ftrain.search.cluster import Cluster
from sharding.mesh import Mesh


@dataclass(frozen=True)
class Tally:
    """Microseconds of a step: from first to last op, of compute, of communication, of the part of it during which
    compute stands still, and of communication by kind of link: a step is as long as each of them is busy.
    """

    step: float
    compute: float
    communication: float
    exposed: float
    links: Mapping[str, float] = field(default_factory=dict)


def run_on_paper(module: fx.GraphModule, mesh: Mesh, *, times: OpTimes, cluster: Cluster) -> Tally:
    """Run the graph in the order that it has; a loop runs its rounds one after the other.

    Unlike `ftrain.schedule.simulate_schedule`, which has one link for all, a collective costs what the links between
    its group's ranks cost. While one is under way compute is slower by `Efficiency.compute_while_sending`.
    """
    clock = compute = exposed = 0.0
    busy = {"node": 0.0, "network": 0.0}
    free = {"node": 0.0, "network": 0.0}  # when each kind of link is done with what was sent so far
    ends: dict[fx.Node, float] = {}
    slower = cluster.efficiency.compute_while_sending
    for node in module.graph.nodes:
        if node.target in COLLECTIVES:
            took = collective_microseconds(node, mesh, cluster)
            link = "node" if cluster.span(mesh, axes_of_group(str(node.args[-1]))).nodes == 1 else "network"
            free[link] = ends[node] = max(clock, free[link]) + took
            busy[link] += took
        elif node.target is WAIT:
            stall = max(0.0, ends.get(node.args[0], 0.0) - clock)
            clock += stall
            exposed += stall
        elif is_loop(node):
            rounds = int(node.args[1])
            inner = run_on_paper(loop_body(node), mesh, times=times, cluster=cluster)
            clock = max(clock, *free.values()) + rounds * inner.step
            compute, exposed = compute + rounds * inner.compute, exposed + rounds * inner.exposed
            for kind, microseconds in inner.links.items():
                busy[kind] += rounds * microseconds
        else:
            took = times.microseconds(node)
            under = min(took, max(0.0, max(free.values()) - clock) / slower)
            clock += took + under * (slower - 1)
            compute += took
    end = max(clock, *free.values())
    return Tally(end, compute, sum(busy.values()), exposed + end - clock, busy)


def collective_microseconds(node: fx.Node, mesh: Mesh, cluster: Cluster) -> float:
    """How long the collective of a node takes on the links of its group; of a batch, the share that is not padding."""
    axes = axes_of_group(str(node.args[-1]))
    whole = cluster.microseconds(COLLECTIVES[node.target], node_sends(node, mesh), mesh, axes)
    return node.meta.get("filled", 1.0) * whole


def filled_sends(node: fx.Node, mesh: Mesh) -> float:
    """Bytes that a rank sends in the collective of a node, but for padding."""
    return node.meta.get("filled", 1.0) * node_sends(node, mesh)
