"""Results of a step refuse to be differentiated from outside, so that no gradient is silently left out."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def refusing(results: Sequence[Tensor], name: str) -> list[Tensor]:
    """The same tensors, of any shapes; those of floating dtype require a gradient, and their backward raises a
    ValueError.

    Used where arguments require gradients. Results without a history would be constants for `loss.backward()`, and in a
    sum with another loss nobody would notice. `name`: of the step, for the message.
    """
    # The only history of the results, so that a state which runs through many steps does not accumulate any.
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
