"""Batch norms whose schemas hide that they write their statistics: make these writes explicit in the graph.

`ftrain.graph.op_effects.HIDDEN_WRITES` lists them. Functionalization can then replace the writes by values.
"""

import operator
from typing import Any

import torch
from torch import Tensor, fx

from ftrain.graph.op_effects import argument_reader, hidden_writes
from ftrain.kernels.opaque import opaque_op

_aten = torch.ops.aten
_ARGUMENTS = (
    "(Tensor x, Tensor weight, Tensor? bias, Tensor mean, Tensor var, bool training, float momentum, float eps)"
)


def _fake_cudnn(x: Tensor, *others: Any) -> tuple[Tensor, ...]:
    return (*_aten.cudnn_batch_norm.default(x, *others), torch.empty_like(others[2]), torch.empty_like(others[3]))


@opaque_op(
    f"batch_norm_cudnn{_ARGUMENTS} -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_cudnn,
)
def batch_norm_cudnn(x: Tensor, weight: Any, bias: Any, mean: Tensor, var: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """cuDNN's batch norm without writes; the new statistics are its last two results.

    `x`: `[N, C, *space]`; `weight`, `bias`, `mean`, `var`: `[C]`.
    """
    new = mean.clone(), var.clone()
    return (*_aten.cudnn_batch_norm.default(x, weight, bias, *new, *rest), *new)


def _fake_miopen(x: Tensor, *others: Any) -> tuple[Tensor, ...]:
    return (*_aten.miopen_batch_norm.default(x, *others), torch.empty_like(others[2]), torch.empty_like(others[3]))


@opaque_op(
    f"batch_norm_miopen{_ARGUMENTS} -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_miopen,
)
def batch_norm_miopen(x: Tensor, weight: Any, bias: Any, mean: Tensor, var: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """MIOpen's batch norm without writes; the new statistics are its last two results.

    `x`: `[N, C, *space]`; `weight`, `bias`, `mean`, `var`: `[C]`.
    """
    new = mean.clone(), var.clone()
    return (*_aten.miopen_batch_norm.default(x, weight, bias, *new, *rest), *new)


_OPEN = {"aten::native_batch_norm": _aten._native_batch_norm_legit.default}
_PURE = {"aten::cudnn_batch_norm": (batch_norm_cudnn, 4), "aten::miopen_batch_norm": (batch_norm_miopen, 3)}


def open_writes(module: fx.GraphModule) -> None:
    """Replace ops with hidden writes by ops with explicit writes, in place. No value changes."""
    for node in list(module.graph.nodes):
        if not isinstance(node.target, torch._ops.OpOverload):
            continue
        if node.target is _aten._efficientzerotensor.default:
            node.target = _aten.zeros.default  # zeros without memory, of forward derivatives, cannot be written over
            continue
        written = hidden_writes(node.target, node.args, node.kwargs)
        if not written:
            continue
        name = node.target._schema.name
        if name in _OPEN:
            node.target = _OPEN[name]
            continue
        value = argument_reader(node.target, node.args, node.kwargs)
        names = [a.name for a in node.target._schema.arguments]
        node.target, results = _PURE[name]
        node.args, node.kwargs = tuple(map(value, names)), {}
        node.meta["val"] = (*node.meta["val"], *(w.meta["val"].clone() for w in written))
        for i, old in enumerate(reversed(written), start=1):
            with module.graph.inserting_after(node):
                new = module.graph.call_function(operator.getitem, (node, results + len(written) - i))
            with module.graph.inserting_after(new):
                copy = module.graph.call_function(_aten.copy_.default, (old, new))
            new.meta.update(node.meta, val=old.meta["val"])
            copy.meta.update(node.meta, val=old.meta["val"])
    module.graph.lint()
    module.recompile()
