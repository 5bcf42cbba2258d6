"""Results of a step that cannot be differentiated from outside, and say so instead of leaving a gradient out."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def refusing(results: Sequence[Tensor], name: str) -> list[Tensor]:
    """The same tensors, of which the floating ones want a gradient and whose backward is a ValueError.

    For results of arguments that want gradients: without a history they would be constants to `loss.backward()`, and in
    a sum with another loss nobody would notice.
    """
    # The only thing behind the results, so that a state that goes round in steps drags no history along.
    anchor = torch.zeros((), requires_grad=True)
    return [_Refusing.apply(x, anchor, name) if x.is_floating_point() else x for x in results]


class _Refusing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, name: str) -> Tensor:
        ctx.name = name
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise ValueError(
            f"{ctx.name} is jitted, so its result has no gradient for backward() or torch.autograd.grad: take the "
            "gradient inside (ftrain.jit(ftrain.value_and_grad(loss))), call the plain function, or detach the result"
        )
