"""Time (by a roofline) and workspace of a graph's ops on a cluster's GPU, computed from shapes.

The layout search plans for GPUs that this machine need not have (see `ftrain.graph.absent_device`). So these rules
describe the kernels of the GPU, not those of this machine.
"""

from collections.abc import Callable

import torch
from torch import Tensor, fx

from ftrain.analysis.cluster import Cluster
from ftrain.analysis.flops import is_view, node_flops, node_traffic
from ftrain.analysis.op_times import OpTimes, op_key
from ftrain.analysis.pieces import op_workspace
from ftrain.graph.collectives import COLLECTIVES, WAIT
from ftrain.graph.fused import is_fused
from ftrain.graph.loop import is_loop, loop_body
from ftrain.graph.sizes import sized
from ftrain.kernels.attention_cost import Sizes, flash_backward_bytes

_ATTENTION = ("ftrain::attention_", "ftrain::ring_")
_GROUPED = ("ftrain::grouped_mm", "aten::_grouped_mm")


class DeviceTimes(OpTimes):
    """Microseconds of ops on one GPU of a cluster. The time of an op on padded batches is scaled by the filled share.

    `attention_share`: the share of query-key pairs that lie within one document. The FLOP rules count all pairs of a
    rank's tokens, also between packs.
    """

    def __init__(self, cluster: Cluster, *, attention_share: float = 1.0) -> None:
        super().__init__(cluster.speed(), dict(cluster.measured))
        self._cluster, self._share = cluster, attention_share
        self._known: dict[fx.Node, float] = {}

    def microseconds(self, node: fx.Node) -> float:
        """Microseconds of compute of a node. A loop takes all its iterations; a collective and its wait take 0.

        A run of fused ops takes the time to read its inputs and write its outputs.
        """
        if node.op != "call_function" or node.target in COLLECTIVES or node.target is WAIT or is_view(node):
            return 0.0
        if is_loop(node):
            return int(node.args[1]) * sum(map(self.microseconds, loop_body(node).graph.nodes))  # type: ignore[arg-type]
        if not isinstance(node.target, torch._ops.OpOverload) and not is_fused(node):
            return 0.0
        found = self._known.get(node)
        if found is None:
            measured = self.measured.get(op_key(node)) if self.measured else None
            took = self._roofline(node) if measured is None else measured
            found = self._known[node] = node.meta.get("filled", 1.0) * took
        return found

    def _roofline(self, node: fx.Node) -> float:
        name, flops = _op_name(node), float(node_flops(node))
        shares = self._cluster.efficiency
        share = shares.matmul
        if name.startswith(_ATTENTION):
            flops, share = flops * self._share, shares.attention
        elif name.startswith(_GROUPED):
            share = shares.grouped
        compute = flops / (self.speed.flops_of(_product_dtype(node)) * share) if flops else 0.0
        memory = node_traffic(node) / self.speed.bandwidth
        return self.speed.launch + 1e6 * max(compute, memory)


def workspace_on(device_type: str) -> Callable[[fx.Node], int]:
    """The function from a node to its op's workspace in bytes, for `device_type` "cuda" or "cpu"."""
    return op_workspace if device_type == "cpu" else device_workspace


def device_workspace(node: fx.Node) -> int:
    """Bytes that the op of a node allocates on a GPU beyond its outputs while it runs; 0 for a loop.

    The rules are those of the memory plan. Ring attention is assumed to run FlashAttention on its blocks, which
    needs workspace only in the backward.
    """
    name = _op_name(node)
    if not name.startswith("ftrain::ring_"):
        return op_workspace(node)
    if not name.endswith("backward"):
        return 0
    q, kv = (sized(node.args[i]) for i in (1, 2))  # type: ignore[arg-type]
    assert isinstance(q, Tensor)
    assert isinstance(kv, Tensor)
    k, v = kv.split([q.shape[2], kv.shape[2] - q.shape[2]], -1)
    return flash_backward_bytes(Sizes.of(q, k, v), q.element_size(), 1)


def _product_dtype(node: fx.Node) -> torch.dtype:
    """The dtype in which a product computes: the narrowest floating dtype of its matrices."""
    values = [sized(n) for n in node.all_input_nodes]
    wide = [v.dtype for v in values if isinstance(v, Tensor) and v.dim() > 1 and v.dtype.is_floating_point]
    return min(wide, key=lambda dtype: dtype.itemsize, default=torch.float32)


def _op_name(node: fx.Node) -> str:
    return node.target._schema.name if isinstance(node.target, torch._ops.OpOverload) else ""
