"""A rank's program run on paper on a cluster: a stream of compute, and one of messages on each kind of link.

Groups of ranks have streams of their own on a GPU, so that an exchange within a node does not wait for a gather over
the network; messages on one kind of link share it, one after the other.
"""

from dataclasses import dataclass

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
    """Microseconds of a step: from first to last op, of compute, of communication, and of the part of it during which
    compute stands still.
    """

    step: float
    compute: float
    communication: float
    exposed: float


def run_on_paper(module: fx.GraphModule, mesh: Mesh, *, times: OpTimes, cluster: Cluster) -> Tally:
    """Run the graph in the order that it has; a loop runs its rounds one after the other.

    Unlike `ftrain.schedule.simulate_schedule`, which has one link for all, a collective costs what the links between
    its group's ranks cost. While one is under way compute is slower by `Efficiency.compute_while_sending`.
    """
    clock = compute = busy = exposed = 0.0
    free = {"node": 0.0, "network": 0.0}  # when each kind of link is done with what was sent so far
    ends: dict[fx.Node, float] = {}
    slower = cluster.efficiency.compute_while_sending
    for node in module.graph.nodes:
        if node.target in COLLECTIVES:
            took = collective_microseconds(node, mesh, cluster)
            link = "node" if cluster.span(mesh, axes_of_group(str(node.args[-1]))).nodes == 1 else "network"
            free[link] = ends[node] = max(clock, free[link]) + took
            busy += took
        elif node.target is WAIT:
            stall = max(0.0, ends.get(node.args[0], 0.0) - clock)
            clock += stall
            exposed += stall
        elif is_loop(node):
            rounds = int(node.args[1])
            inner = run_on_paper(loop_body(node), mesh, times=times, cluster=cluster)
            clock = max(clock, *free.values()) + rounds * inner.step
            compute, busy = compute + rounds * inner.compute, busy + rounds * inner.communication
            exposed += rounds * inner.exposed
        else:
            took = times.microseconds(node)
            under = min(took, max(0.0, max(free.values()) - clock) / slower)
            clock += took + under * (slower - 1)
            compute += took
    end = max(clock, *free.values())
    return Tally(end, compute, busy, exposed + end - clock)


def collective_microseconds(node: fx.Node, mesh: Mesh, cluster: Cluster) -> float:
    """How long the collective of a node takes on the links of its group."""
    axes = axes_of_group(str(node.args[-1]))
    return cluster.microseconds(COLLECTIVES[node.target], node_sends(node, mesh), mesh, axes)
