"""Classes of ops by how they treat pieces of arrays: elementwise, reductions, ops along one dim, matrix products.

The tables are by op. The functions read the arguments of a node.
"""

from typing import Any

import torch
from torch import Tensor, fx

from ftrain.graph.op_effects import argument_reader
from ftrain.sharding.collectives import exchange_rows, gather_ranks, shift_ranks

_aten, _c10d = torch.ops.aten, torch.ops._c10d_functional
REDUCTIONS: dict[Any, str] = {
    _aten.sum.default: "sum", _aten.sum.dim_IntList: "sum", _aten.mean.default: "mean", _aten.mean.dim: "mean",
    _aten.amax.default: "max", _aten.amin.default: "min", _aten.max.default: "max", _aten.min.default: "min",
    _aten.all.default: "all", _aten.all.dim: "all", _aten.all.dims: "all", _aten.any.default: "any",
    _aten.any.dim: "any", _aten.any.dims: "any",
    _aten.linalg_vector_norm.default: "norm", _aten.norm.Scalar: "norm", _aten.norm.ScalarOpt_dim: "norm",
}  # fmt: skip
"""Reductions, and how their results on pieces combine."""
ALONG: dict[Any, int] = {
    _aten._softmax.default: 1, _aten._log_softmax.default: 1, _aten.cumsum.default: 1, _aten.cumprod.default: 1,
    _aten.sort.default: 1, _aten.sort.stable: 2, _aten.topk.default: 2, _aten.flip.default: 1,
}  # fmt: skip
"""Ops that work along one dim, and the position of this dim among the arguments."""
SCATTERS = {_aten.select_scatter.default, _aten.slice_scatter.default}
"""Ops that write into a part of a dim of their first argument."""
_ROWS, _BATCHES = ({0: 0}, {1: 1}), ({0: 0, 1: 1}, {0: 0, 2: 2})
PRODUCTS: dict[Any, tuple[int, tuple[dict[int, int], dict[int, int]]]] = {
    _aten.mm.default: (0, _ROWS), _aten.addmm.default: (1, _ROWS),
    _aten.bmm.default: (0, _BATCHES), _aten.baddbmm.default: (1, _BATCHES),
}  # fmt: skip
"""Products: the position of the first factor, and for each factor which of its dims are which dims of the result."""
CONSTANTS = {
    _aten.full.default, _aten.full_like.default, _aten.zeros_like.default, _aten.ones_like.default, _aten.zeros.default,
    _aten.ones.default, _aten.new_zeros.default, _aten.new_ones.default, _aten.new_full.default,
    _aten.zero.default, _aten.empty.memory_format, _aten.empty_like.default, _aten.new_empty.default,
    _aten.scalar_tensor.default,
}  # fmt: skip
"""Ops that fill a tensor with one number."""
_ELEMENTWISE = {
    _aten._to_copy.default, _aten.clone.default, _aten.copy_.default, _aten.copy.default, _aten.lift_fresh_copy.default,
    _aten.detach.default, _aten.alias.default, _aten.contiguous.default, _aten.to.dtype, _aten.fill_.Scalar,
    _aten.zero_.default, _aten.fill.Scalar, _aten.fill.Tensor, _aten.polar.default, _aten.hardswish.default,
    _aten.rsub.Tensor, _aten.rsub.Scalar, _aten.floor_divide.default, _aten.complex.default, _aten._conj.default,
    _aten._neg_view.default, _aten.isin.Tensor_Scalar,
    _aten._prelu_kernel.default, _aten.masked_fill.Scalar, _aten.masked_fill.Tensor,
}  # fmt: skip
_OURS_ELEMENTWISE = ("ftrain::adamw", "ftrain::offload", "ftrain::nf4_numbers")


def coordinates_of(graph: fx.Graph) -> fx.Node | None:
    """The placeholder of the rank's mesh coordinates; None in the body of a loop."""
    return next((n for n in graph.nodes if n.op == "placeholder" and n.meta.get("coordinates")), None)


def is_elementwise(target: Any) -> bool:
    """True for an op that computes each element of its result from the same element of its (broadcast) inputs."""
    if target in _ELEMENTWISE or torch.Tag.pointwise in getattr(target, "tags", ()):
        return True
    schema = getattr(target, "_schema", None)
    if schema is None:
        return False
    return schema.name.startswith(_OURS_ELEMENTWISE) or (schema.name.endswith("_") and is_elementwise(_pure(target)))


def _pure(target: Any) -> Any:
    """The op that returns what this one (`masked_fill_`) writes."""
    packet = getattr(torch.ops.aten, target._schema.name.split("::")[-1][:-1], None)
    return getattr(packet, target._overloadname, None)


def is_view(target: Any) -> bool:
    """True for a view, and for `cat` and `stack`, which also only move elements."""
    joins = (_aten.cat.default, _aten.stack.default, _aten._unsafe_view.default)
    return target in joins or bool(getattr(target, "is_view", False))


def group_of(node: fx.Node) -> str | None:
    """The name of the group of a collective; None for any other op."""
    known = (
        _c10d.all_reduce.default, _c10d.reduce_scatter_tensor.default, _c10d.all_to_all_single.default, gather_ranks,
        shift_ranks, exchange_rows,
    )  # fmt: skip
    if node.target not in known:
        return None
    return next(str(a) for a in reversed(node.args) if isinstance(a, str) and a.startswith("axis_"))


def tensor_of(node: Any) -> Tensor | None:
    """The fake tensor of a node, or the first of several; None if there is none."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    value = value[0] if isinstance(value, list | tuple) and value else value
    return value if isinstance(value, Tensor) else None


def takes_statistics(node: fx.Node) -> bool:
    """True for a batch norm that computes statistics of its batch, which here is only a rank's share.

    Instance norm is excluded: torch computes it as a batch norm with the channels of all rows in one row.
    """
    name = getattr(getattr(node.target, "_schema", None), "name", "")
    if name not in ("aten::native_batch_norm", "aten::_native_batch_norm_legit", "aten::cudnn_batch_norm",
                    "aten::miopen_batch_norm", "aten::_batch_norm_with_update"):  # fmt: skip
        return False
    source, value = node.args[0].all_input_nodes, tensor_of(node.args[0])  # type: ignore[union-attr]
    before = tensor_of(source[0]) if len(source) == 1 else None
    if before is not None and value is not None and before.dim() == value.dim() > 2:
        folded = (1, before.shape[0] * before.shape[1], *before.shape[2:])
        if is_view(node.args[0].target) and tuple(value.shape) == folded:  # type: ignore[union-attr]
            return False
    training = argument_reader(node.target, node.args, node.kwargs)("training")  # type: ignore[arg-type]
    return training is None or bool(training)


def is_number(node: fx.Node) -> bool:
    """True for a node with a 0-d tensor."""
    value = tensor_of(node)
    return value is not None and value.dim() == 0


def reduced_dims(node: fx.Node, rank: int) -> tuple[set[int], bool]:
    """The dims that a reduction of a tensor with `rank` dims reduces, and whether they stay as dims of size 1."""
    value = argument_reader(node.target, node.args, node.kwargs)  # type: ignore[arg-type]
    dims = value("dim")
    every = dims is None or (isinstance(dims, list | tuple) and not dims)
    listed = range(rank) if every else [dims] if isinstance(dims, int) else dims
    return {d % max(1, rank) for d in listed}, bool(value("keepdim"))


def norm_order(node: fx.Node) -> float:
    """The order p of a p-norm."""
    given = node.args[1] if len(node.args) > 1 else node.kwargs.get("ord", 2)
    return 2 if given is None else float(given)  # type: ignore[arg-type]
