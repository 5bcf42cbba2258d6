"""The cross entropy of every token by itself, for losses that are no sum over tokens (preferences, weights by reward).

T tokens, D model, V vocabulary. The logits of all tokens are never held: the forward keeps one number per token, and
the backward makes the logits of one chunk at a time again, as `linear_cross_entropy` makes them.
"""

from typing import Any

import torch
from torch import Tensor

from ftrain.kernels.backend import choose_backend
from ftrain.kernels.dtypes import accumulate_dtype
from ftrain.kernels.first_order import first_order
from ftrain.kernels.linear_cross_entropy import (
    BACKENDS,
    Options,
    check_arguments,
    default_chunk,
    linear_cross_entropy_grads,
)

__all__ = ["linear_token_losses", "linear_token_losses_reference"]


def linear_token_losses(
    x_TD: Tensor,
    w_DV: Tensor,
    labels_T: Tensor,
    *,
    ignore_index: int = -100,
    softcap: float | None = None,
    transposed: bool = False,
    chunk_tokens: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """`logsumexp(z) - z[label]` of each token with `z = x @ w`: `[T]`, in nats, 0 where a label is ignored.

    The arguments are those of `linear_cross_entropy`, which gives their sum, and so are dtypes and errors. A backward
    costs one product `x @ w` more than that of the sum. Differentiable once; `"auto"` takes the reference under `vmap`,
    `jvp` and nested `grad`.

    >>> import torch
    >>> from ftrain.kernels.linear_token_losses import linear_token_losses
    >>> linear_token_losses(torch.zeros(3, 2), torch.ones(2, 4), torch.tensor([0, 3, -100]))  # log 4
    tensor([1.3863, 1.3863, 0.0000])
    """
    check_arguments(x_TD, w_DV, labels_T, None, softcap, transposed, chunk_tokens)
    if choose_backend(backend, x_TD.device, BACKENDS) == "reference":
        return linear_token_losses_reference(
            x_TD, w_DV, labels_T, ignore_index=ignore_index, softcap=softcap, transposed=transposed
        )
    chunk = chunk_tokens or default_chunk(x_TD.shape[0], w_DV.shape[0 if transposed else 1])
    return _LinearTokenLosses.apply(x_TD, w_DV, labels_T, Options(ignore_index, softcap, transposed, chunk))


def linear_token_losses_reference(
    x_TD: Tensor,
    w_DV: Tensor,
    labels_T: Tensor,
    *,
    ignore_index: int = -100,
    softcap: float | None = None,
    transposed: bool = False,
) -> Tensor:
    """The definition of `linear_token_losses`, with its arguments: `[T]`, in the accumulation dtype.

    All logits `[T, V]` at once; any number of derivatives, any transform. Nothing is checked.
    """
    valid_T = labels_T != ignore_index
    x_TD = torch.where(valid_T[..., None], x_TD, 0)
    z_TV = (x_TD @ (w_DV.mT if transposed else w_DV)).to(accumulate_dtype(x_TD.dtype))
    if softcap is not None:
        z_TV = softcap * torch.tanh(z_TV / softcap)
    label_T = torch.where(valid_T, labels_T, 0)
    loss_T = z_TV.logsumexp(-1) - z_TV.gather(-1, label_T[..., None])[..., 0]
    return torch.where(valid_T, loss_T, 0)


def _gradients(
    grad_T: Tensor, x: Tensor, w: Tensor, labels: Tensor, options: Options, need_x: bool, need_w: bool
) -> tuple[Tensor, Tensor]:
    _, dx, dw, _ = linear_cross_entropy_grads(x, w, labels, grad_T, *options, need_x, need_w)
    return dx, dw


_gradients_once = first_order(_gradients, "linear_token_losses")


class _LinearTokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, w: Tensor, labels: Tensor, options: Options) -> Tensor:
        return linear_cross_entropy_grads(x, w, labels, None, *options, False, False)[3]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, w, labels, ctx.options = inputs
        ctx.save_for_backward(x, w, labels)

    @staticmethod
    def backward(ctx: Any, grad_T: Tensor) -> tuple[Tensor | None, ...]:
        need_x, need_w = ctx.needs_input_grad[:2]
        if not (need_x or need_w):
            return None, None, None, None
        dx, dw = _gradients_once(grad_T.contiguous(), *ctx.saved_tensors, ctx.options, need_x, need_w)
        return dx if need_x else None, dw if need_w else None, None, None
