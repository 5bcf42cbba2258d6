"""What the ops of a graph cost on a cluster's GPU, from their shapes: time by a roofline, and bytes of workspace.

A search lowers on abstract CPU tensors, so the rules of `ftrain.op_rules` that tell what CPU kernels allocate do not
apply: here are those of the kernels that run on a GPU.
"""

from collections.abc import Callable

import torch
from torch import Tensor, fx

from ftrain.cost import is_view, node_flops, node_traffic
from ftrain.liveness import workspace_bytes
from ftrain.lockstep import COLLECTIVES
from ftrain.loop import is_loop, loop_body
from ftrain.op_rules import WORKSPACE
from ftrain.op_times import OpTimes, op_key
from ftrain.passes.sizes import sized
from ftrain.passes.waits import WAIT
from ftrain.search.cluster import Cluster

_ATTENTION = ("ftrain::attention_", "ftrain::ring_")
_GROUPED = ("ftrain::grouped_mm", "aten::_grouped_mm")


class DeviceTimes(OpTimes):
    """Microseconds of ops on one GPU of a cluster.

    `attention_share`: of the pairs of a query and a key that the ops are taken to compute, those that meet in one
    document: the rules see whole packs, and a rank that holds several packs sees them as one.
    """

    def __init__(self, cluster: Cluster, *, attention_share: float = 1.0) -> None:
        super().__init__(cluster.speed(), dict(cluster.measured))
        self._cluster, self._share = cluster, attention_share
        self._known: dict[fx.Node, float] = {}

    def microseconds(self, node: fx.Node) -> float:
        """How long a node computes; a loop takes all its rounds, a collective and its wait nothing."""
        if node.op != "call_function" or node.target in COLLECTIVES or node.target is WAIT or is_view(node):
            return 0.0
        if is_loop(node):
            return int(node.args[1]) * sum(map(self.microseconds, loop_body(node).graph.nodes))  # type: ignore[arg-type]
        if not isinstance(node.target, torch._ops.OpOverload):
            return 0.0
        found = self._known.get(node)
        if found is None:
            measured = self.measured.get(op_key(node)) if self.measured else None
            found = self._known[node] = self._roofline(node) if measured is None else measured
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
    """What tells the workspace of an op on a GPU ("cuda") or on a CPU."""
    return workspace_bytes if device_type == "cpu" else device_workspace


def device_workspace(node: fx.Node) -> int:
    """Bytes that the op of a node allocates on a GPU beyond its outputs while it runs; of a loop none of its own."""
    name = _op_name(node)
    if not name.startswith("ftrain::") or name.startswith(_GROUPED):
        return 0
    if name.startswith(_ATTENTION):
        return _flash_workspace(node) if name.endswith("backward") else 0
    rule = WORKSPACE.get(name)
    if rule is None:
        return 0
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), sized)
    return int(rule(*args, **kwargs))


def _flash_workspace(node: fx.Node) -> int:
    """FlashAttention's backward: float32 sums of dq, a number per query, and gradients of keys per query head.

    Arguments are (grad, q, k or joint keys and values, ...); with as many key heads as query heads nothing is expanded.
    """
    q, k = (sized(node.args[i]) for i in (1, 2))  # type: ignore[arg-type]
    T, H, K = q.shape
    expanded = 0 if k.shape[1] == H else 2 * k.shape[0] * H * K * q.element_size()
    return (T + 128) * H * (K + 1) * 4 + expanded


def _product_dtype(node: fx.Node) -> torch.dtype:
    """The dtype that a product computes in: the narrowest of its matrices'."""
    values = [sized(n) for n in node.all_input_nodes]
    wide = [v.dtype for v in values if isinstance(v, Tensor) and v.dim() > 1 and v.dtype.is_floating_point]
    return min(wide, key=lambda dtype: dtype.itemsize, default=torch.float32)


def _op_name(node: fx.Node) -> str:
    return node.target._schema.name if isinstance(node.target, torch._ops.OpOverload) else ""
