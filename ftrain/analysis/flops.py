"""FLOPs and bytes moved, by node and for a whole graph."""

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from ftrain.analysis.op_rules import FLOPS
from ftrain.graph.loop import is_loop, loop_body
from ftrain.graph.sizes import sized, unknown_sizes

# A word of a product's name: mm, bmm, addmm, conv2d, _scaled_dot_product_attention, _grouped_mm, linear, ...
_PRODUCT = re.compile(
    r"b?mm|add(b?mm|mv)|baddbmm|sspaddmm|matmul|mv|v?dot|conv(olution|\d.*)?|attention|linear|einsum|trilinear|rnn"
)


def _attention(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **options: Any) -> int:
    return sdpa_flop_count(q.shape, k.shape, v.shape)


def _attention_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any, **options: Any) -> int:
    return sdpa_backward_flop_count(grad.shape, q.shape, k.shape, v.shape)


def _recurrent(x: Tensor, w_in: Tensor, w_hidden: Tensor, *_: Any, **__: Any) -> int:
    """Of one layer in one direction: each step multiplies by both matrices."""
    return 2 * x.numel() // x.shape[-1] * (w_in.numel() + w_hidden.numel())


# FLOPs of ATen's ops that torch's registry leaves out, and of our ops that replace them.
_ATEN: dict[str, Callable[..., int]] = {
    "aten::mv": lambda a, x, **_: 2 * a.numel(),
    "aten::addmv": lambda bias, a, x, **_: 2 * a.numel(),
    "aten::dot": lambda x, y, **_: 2 * x.numel(),
    "aten::vdot": lambda x, y, **_: 2 * x.numel(),
    "aten::addbmm": lambda bias, a, b, **_: 2 * a.numel() * b.shape[2],
    "aten::_addmm_activation": lambda bias, a, b, **_: 2 * a.numel() * b.shape[1],
    "aten::_scaled_mm_v2": lambda a, b, *_, **__: 2 * a.numel() * b.shape[1],
    "aten::_int_mm": lambda a, b, **_: 2 * a.numel() * b.shape[1],
    "aten::mkldnn_rnn_layer": _recurrent,
    "ftrain::mkldnn_rnn_layer": _recurrent,
    "aten::mkldnn_rnn_layer_backward": lambda *args, **_: 2 * _recurrent(*args),
    "aten::_scaled_dot_product_flash_attention_for_cpu": _attention,
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward,
}


class NodeCost(NamedTuple):
    """The cost of one node in one run of the graph; the node of a loop's body counts for all iterations.

    `name`, `op`: the node's name and its target. `phase`: "forward", "backward" or "step". `path`: the parameter's.
    `flops`: a multiply-add is two. `bytes`: read and written. `recomputed`: the node is a copy for the backward.
    """

    name: str
    op: str
    phase: str
    path: str
    flops: int
    bytes: int
    recomputed: bool = False


@dataclass(frozen=True)
class Cost:
    """The cost of one run of a graph.

    - `flops`, `bytes`: sums over all nodes. `by_phase`: FLOPs of "forward", "backward" and "step".
    - `nodes`: the cost of each node, in the order of the graph.
    - `unpriced`: ops whose name says that they compute products and that have no FLOP rule. Their FLOPs are missing
      in the sums.
    - `unknown`: sizes that depend on data; each counts with its largest possible value.
    """

    flops: int
    bytes: int
    by_phase: dict[str, int]
    nodes: list[NodeCost]
    unpriced: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()

    @property
    def model_flops(self) -> int:
        """FLOPs of forward and backward, without recompute and without the optimizer.

        The numerator of model FLOPs utilization, which falls where recompute takes time (Chowdhery et al. 2022, "PaLM",
        appendix B).
        """
        return sum(n.flops for n in self.nodes if n.phase in ("forward", "backward") and not n.recomputed)


def graph_cost(module: fx.GraphModule) -> Cost:
    """The cost of one run of a graph. The body of a loop counts once for each iteration."""
    nodes = list(_node_costs(module, 1))
    by_phase: dict[str, int] = {}
    for node in nodes:
        by_phase[node.phase] = by_phase.get(node.phase, 0) + node.flops
    flops, moved = sum(n.flops for n in nodes), sum(n.bytes for n in nodes)
    return Cost(flops, moved, by_phase, nodes, tuple(sorted(_unpriced(module))), unknown_sizes(module))


def _unpriced(module: fx.GraphModule) -> set[str]:
    """Names of the graph's ops that `is_product` and not `has_flops`, bodies of loops included."""
    found: set[str] = set()
    for node in module.graph.nodes:
        if is_loop(node):
            found |= _unpriced(loop_body(node))
        elif isinstance(node.target, torch._ops.OpOverload) and is_product(node.target) and not has_flops(node.target):
            found.add(node.target._schema.name)
    return found


def is_product(op: torch._ops.OpOverload) -> bool:
    """True if an op's name says that it multiplies matrices: a product, a convolution, attention, a recurrent layer."""
    return any(_PRODUCT.fullmatch(word) for word in op._schema.name.split("::")[1].split("_"))


def has_flops(op: torch._ops.OpOverload) -> bool:
    """True if an op has a FLOP rule."""
    name = op._schema.name
    return name in FLOPS or name in _ATEN or op.overloadpacket in flop_registry


def _node_costs(module: fx.GraphModule, times: int) -> list[NodeCost]:
    costs: list[NodeCost] = []
    for node in module.graph.nodes:
        if node.op != "call_function" or node.target is operator.getitem:
            continue
        if is_loop(node):
            costs += _node_costs(loop_body(node), times * int(node.args[1]))
            continue
        meta = node.meta
        name, moved = str(node.target), node_traffic(node)
        costs.append(
            NodeCost(
                node.name,
                name,
                meta.get("phase", ""),
                meta.get("path") or "",
                times * node_flops(node),
                times * moved,
                "recomputed" in meta,
            )
        )
    return costs


def node_traffic(node: fx.Node) -> int:
    """Bytes that a node reads and writes: all its inputs and outputs, and 0 for a view."""
    return 0 if is_view(node) else sum(_bytes(sized(n)) for n in [node, *node.all_input_nodes])


def is_view(node: fx.Node) -> bool:
    """True for an op whose result shares its argument's memory, and for `getitem` of a tuple."""
    target = node.target
    return target in (torch.ops.aten._unsafe_view.default, operator.getitem) or (
        isinstance(target, torch._ops.OpOverload) and target.is_view
    )


def node_flops(node: fx.Node) -> int:
    """FLOPs of a product, convolution, attention or recurrent layer; 0 for elementwise ops and for loops."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return 0
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), sized)
    name = target._schema.name
    own = FLOPS.get(name) or _ATEN.get(name)
    if own is not None:
        return int(own(*args, **kwargs))
    rule = flop_registry.get(target.overloadpacket)
    return int(rule(*args, **kwargs, out_val=sized(node))) if rule is not None else 0


def _bytes(value: Any) -> int:
    if isinstance(value, list | tuple):
        return sum(_bytes(v) for v in value)
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0
