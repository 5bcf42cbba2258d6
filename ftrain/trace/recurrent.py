"""Run oneDNN's recurrent layer in training mode.

The layer reads at run time whether gradients are on, and then keeps what its backward needs. A program runs with
gradients off, but contains the backward.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from ftrain.graph.loop import is_loop, loop_body
from ftrain.kernels.opaque import opaque_op

_aten = torch.ops.aten
_LAYER: Callable[..., Any] = _aten.mkldnn_rnn_layer.default
_ARGUMENTS = str(_LAYER._schema).split("(", 1)[1]  # type: ignore[attr-defined]


@opaque_op(f"mkldnn_rnn_layer({_ARGUMENTS}", fake=_LAYER)
def rnn_layer(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    """`aten::mkldnn_rnn_layer` with gradients on; arguments, shapes and results are those of the op."""
    with torch.enable_grad():
        return _LAYER(*args, **kwargs)


def train_recurrent(module: fx.GraphModule) -> None:
    """Replace oneDNN's recurrent layers, in place and in bodies of loops, by `rnn_layer`. No value changes."""
    for node in module.graph.nodes:
        if is_loop(node):
            train_recurrent(loop_body(node))
        elif node.target is _LAYER:
            node.target = rnn_layer
    module.recompile()
