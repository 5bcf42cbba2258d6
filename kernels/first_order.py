"""Backwards that can run but not be differentiated again."""

from collections.abc import Callable
from typing import Any

import torch


def first_order(op: Callable[..., Any], kernel: str) -> Callable[..., Any]:
    """Wrap the opaque backward `op` of `kernel`: the same function, but differentiating its result raises
    NotImplementedError naming the kernel.

    An opaque op is a constant to autograd: without this a second derivative through it would silently be zero.
    `torch.autograd.function.once_differentiable` does not suffice: it is silent too under `torch.func`, and where the
    caller allows unused inputs.
    """

    class FirstOrder(torch.autograd.Function):
        @staticmethod
        def forward(*args: Any) -> Any:
            return op(*args)

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            ctx.set_materialize_grads(False)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            raise NotImplementedError(f"{kernel} has no second derivative with this backend; pass backend='reference'")

    return FirstOrder.apply
