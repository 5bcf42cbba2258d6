"""Attention sinks: a learned score per query head that takes its part of the softmax and has no value.

They are added after attention: with the log-sum-exp of the scores, the sink's part of the denominator is known, and
output and log-sum-exp of attention with it follow. A kernel's backward recomputes probabilities from the log-sum-exp
and needs the sum of gradient times output, so it is right for sinks when it is given the new ones.

T query tokens, H query heads, V value dim.
Source: Xiao et al., "Efficient streaming language models with attention sinks", arXiv 2309.17453; learned ones as in
gpt-oss, arXiv 2508.10925.
"""

import torch
from torch import Tensor


def check_sinks(sinks_H: Tensor | None, q_THK: Tensor, name: str) -> None:
    """ValueError, which begins with `name`, if sinks are not floating `[H]` on the device of the queries."""
    if sinks_H is None:
        return
    H = q_THK.shape[1]
    if sinks_H.shape != (H,) or not sinks_H.is_floating_point() or sinks_H.device != q_THK.device:
        raise ValueError(
            f"{name}: sinks_H must be floating [{H}] on {q_THK.device}, one score for each query head, not "
            f"{sinks_H.dtype} {[*sinks_H.shape]} on {sinks_H.device}"
        )


def add_sinks(out_THV: Tensor, lse_HT: Tensor, sinks_H: Tensor) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of attention with sinks, from those without, of their shapes and dtypes.

    `sinks_H`: finite scores, any floating dtype. A query that sees no key keeps an output of zero.

    >>> import torch
    >>> from ftrain.kernels.attention_sinks import add_sinks
    >>> add_sinks(torch.ones(1, 1, 2), torch.zeros(1, 1), torch.zeros(1))
    (tensor([[[0.5000, 0.5000]]]), tensor([[0.6931]]))
    """
    sinks_H1 = sinks_H.to(lse_HT.dtype)[:, None]
    kept_HT = torch.sigmoid(lse_HT - sinks_H1)
    return (out_THV * kept_HT.mT[..., None]).to(out_THV.dtype), torch.logaddexp(lse_HT, sinks_H1)


def sinks_gradient(grad_THV: Tensor, out_THV: Tensor, lse_HT: Tensor, sinks_H: Tensor) -> Tensor:
    """The gradient of the sinks, `[H]` in their dtype.

    `grad_THV`: of the output. `out_THV`, `lse_HT`: of attention with sinks, from `add_sinks`. The sink's value is zero,
    so a higher sink only lowers all other probabilities.
    """
    delta_TH = (grad_THV.to(lse_HT.dtype) * out_THV).sum(-1)
    part_HT = torch.exp(sinks_H.to(lse_HT.dtype)[:, None] - lse_HT)
    return -(part_HT * delta_TH.mT).sum(1).to(sinks_H.dtype)
