"""DoRA (Liu et al., arXiv 2402.09353): a weight's directions get the delta, and each output a magnitude of its own.

The norms of the changed weight are constants for the gradient, as in section 4.3 there. They are computed from the
parts: `|w + s a b|^2 = |w|^2 + 2 s (a' w) . b + s^2 b' (a' a) b` for each output, without the product `a b`.

Legend: I inputs, O outputs, r rank.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ftrain.lora.blocks import Blocks
from ftrain.lora.targets import Target
from ftrain.lora.trees import SUFFIX, leaf, replaced
from ftrain.modules.spec import Tree


def gain(magnitude_O: Tensor, base: Tensor | Blocks, a_Ir: Tensor, b_rO: Tensor, target: Target) -> Tensor:
    """The factor of each output, `[1, O]` for weights with inputs first, else `[O, 1]`."""
    with torch.no_grad():
        norm_O = norms(base, target, a_Ir, b_rO)
    factor_O = magnitude_O / norm_O.to(magnitude_O.dtype)
    return factor_O[None, :] if target.inputs_first else factor_O[:, None]


def norms(base: Tensor | Blocks, target: Target, a_Ir: Tensor | None = None, b_rO: Tensor | None = None) -> Tensor:
    """The norm of each output's weights, `[O]`, with the delta where its factors are given; float32 or wider."""
    whole = base.decoded() if isinstance(base, Blocks) else base
    flat = whole.reshape(-1, target.outputs) if target.inputs_first else whole.reshape(target.outputs, -1).mT
    w_IO = flat.to(torch.promote_types(whole.dtype, torch.float32))
    if a_Ir is None or b_rO is None:
        return torch.linalg.vector_norm(w_IO, dim=0)
    a_Ir, b_rO = a_Ir.to(w_IO.dtype), b_rO.to(w_IO.dtype)
    squares_O = torch.linalg.vector_norm(w_IO, dim=0).square()
    mixed_O = ((a_Ir.mT @ w_IO) * b_rO).sum(0)
    own_O = ((a_Ir.mT @ a_Ir) @ b_rO * b_rO).sum(0)
    return (squares_O + 2 * target.scale * mixed_O + target.scale**2 * own_O).clamp(min=0).sqrt()


def with_magnitudes(delta: Tree, base: Tree, targets: Sequence[Target]) -> Tree:
    """The deltas with the norms of the model's weights as magnitudes: where a training begins. ValueError for a base
    without one of the targets.
    """
    new: dict[str, Any] = {}
    for target in targets:
        found = leaf(base, target.path)
        if isinstance(found, Mapping):
            raise ValueError(f"lora: measure {target.path!r} for DoRA before it is quantized: give init(base=...) that")
        old = leaf(delta, f"{target.path}{SUFFIX}.magnitude")
        new[f"{target.path}{SUFFIX}.magnitude"] = norms(found, target).to(old)
    return replaced(delta, new)
