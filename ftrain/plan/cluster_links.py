"""The links of a cluster, for the simulator: one within a node and one over the network.

On a GPU each kind of link has a stream of its own, so an exchange within a node does not wait for a gather over the
network. Messages on one kind of link share it, one after the other.
"""

from dataclasses import dataclass

from torch import fx

from ftrain.analysis.cluster import Cluster
from ftrain.analysis.communication import node_sends
from ftrain.analysis.op_times import OpTimes
from ftrain.analysis.simulate import Costs, Tally, simulate
from ftrain.graph.collectives import COLLECTIVES, axes_of_group
from ftrain.sharding.mesh import Mesh


@dataclass(frozen=True)
class ClusterLinks:
    """The links of a rank on a cluster: a collective costs what the links between the ranks of its group cost.

    While one is under way, compute is slower by `Efficiency.compute_while_sending`. Padding costs nothing.
    """

    mesh: Mesh
    cluster: Cluster
    names: tuple[str, ...] = ("node", "network")

    @property
    def slowdown(self) -> float:
        """The factor by which compute is slower while a message is under way."""
        return self.cluster.efficiency.compute_while_sending

    def message(self, node: fx.Node) -> tuple[str, float]:
        """The kind of link between the ranks of a collective's group, and the microseconds of the collective."""
        span = self.cluster.span(self.mesh, axes_of_group(str(node.args[-1])))
        return self.names[span.nodes > 1], collective_microseconds(node, self.mesh, self.cluster)


def simulate_on_cluster(module: fx.GraphModule, mesh: Mesh, *, times: OpTimes, cluster: Cluster) -> Tally:
    """Simulate the graph `module` of a rank of `mesh` on a cluster, in the order that it has: microseconds of the step,
    of compute and of communication. `times`: of ops.
    """
    return simulate(module, Costs.of(module, times, ClusterLinks(mesh, cluster))).tally


def collective_microseconds(node: fx.Node, mesh: Mesh, cluster: Cluster) -> float:
    """Microseconds of the collective of `node` on the links of `cluster` between the ranks of its group of `mesh`; of a
    batch, the share that is not padding.
    """
    axes = axes_of_group(str(node.args[-1]))
    whole = cluster.microseconds(COLLECTIVES[node.target], node_sends(node, mesh), mesh, axes)
    return node.meta.get("filled", 1.0) * whole


def filled_sends(node: fx.Node, mesh: Mesh) -> float:
    """Bytes that a rank sends in the collective of a node, without padding."""
    return node.meta.get("filled", 1.0) * node_sends(node, mesh)
