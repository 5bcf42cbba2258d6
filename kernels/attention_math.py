"""Attention of a few equal documents in plain arithmetic, with its gradient written out: runs on any device and dtype.

The query heads that read one key head are rows of one product, so no key is repeated. Whoever calls cuts documents so
that the scores are few.

B documents, H query heads, G key/value heads, R = H / G, L queries and M keys of a document, N = R * L rows, K head
dim, V value dim.
"""

import torch
from torch import Tensor

from ftrain.kernels.dtypes import accumulate_dtype


def _rows(x_BHLK: Tensor, G: int, dtype: torch.dtype) -> Tensor:
    """`[B, G, N, K]` in `dtype`."""
    return x_BHLK.unflatten(1, (G, -1)).flatten(2, 3).to(dtype)


def _scores(
    q_BHLK: Tensor, k_BGMK: Tensor, causal: bool, mask_LM: Tensor | None, scale: float, softcap: float | None
) -> Tensor:
    """`[B, G, N, M]` in the accumulation dtype."""
    dtype, L, M = accumulate_dtype(q_BHLK.dtype), q_BHLK.shape[2], k_BGMK.shape[2]
    s_BGNM = _rows(q_BHLK, k_BGMK.shape[1], dtype) @ k_BGMK.to(dtype).mT
    if softcap is None:
        s_BGNM.mul_(scale)
    else:
        s_BGNM.mul_(scale / softcap).tanh_().mul_(softcap)
    s_BGRLM = s_BGNM.unflatten(2, (-1, L))
    if causal:
        s_BGRLM.masked_fill_(torch.ones(L, M, dtype=torch.bool, device=q_BHLK.device).triu_(1), -torch.inf)
    if mask_LM is not None:
        s_BGRLM.add_(mask_LM)
    return s_BGNM


def _probabilities(s_BGNM: Tensor, lse_BGN: Tensor) -> Tensor:
    """In place. A query that sees nothing has -inf everywhere and attends to nothing."""
    return s_BGNM.sub_(lse_BGN.clamp(min=torch.finfo(lse_BGN.dtype).min)[..., None]).exp_()


def _slopes(s_BGNM: Tensor, softcap: float) -> Tensor:
    """Of the capped scores in the scores, in place of the former: `1 - tanh ** 2`, and 0 where a score is hidden."""
    return s_BGNM.div_(softcap).clamp_(min=-1).square_().neg_().add_(1)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    mask: Tensor | None,
    scale: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Output `[B, H, L, V]` in the dtype of the queries and the scores' log-sum-exp `[B, H, L]`.

    - `q`, `k`, `v`: `[B, H, L, K]`, `[B, G, M, K]`, `[B, G, M, V]`, one floating dtype.
    - `causal`: query i sees keys 0 .. i. `mask`: `[L, M]`, added to the scores; -inf hides. `scale`: of the scores.
    - `softcap`: scores become `softcap * tanh(scores / softcap)` before they are hidden; None leaves them.

    The arithmetic and the log-sum-exp are float32 (float64 for float64). A query that sees nothing gives zeros.
    """
    L = q.shape[2]
    s_BGNM = _scores(q, k, causal, mask, scale, softcap)
    lse_BGN = s_BGNM.logsumexp(-1)
    p_BGNM = _probabilities(s_BGNM, lse_BGN)
    out_BGNV = p_BGNM @ v.to(p_BGNM.dtype)
    out_BHLV, lse_BHL = (x.unflatten(2, (-1, L)).flatten(1, 2) for x in (out_BGNV, lse_BGN))
    return out_BHLV.to(q.dtype), lse_BHL


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    mask: Tensor | None,
    scale: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `q`, `k`, `v`, of their shapes and dtypes.

    - `grad`, `out`: `[B, H, L, V]`. `lse`: `[B, H, L]`, from `forward` over all keys, of which these may be a part.
    - `q`, `k`, `v`, `causal`, `mask`, `scale`, `softcap`: as in `forward`.
    """
    dtype, G, L = lse.dtype, k.shape[1], q.shape[2]
    grad_BGNV = _rows(grad, G, dtype)
    delta_BGN = (grad_BGNV * _rows(out, G, dtype)).sum(-1)
    s_BGNM = _scores(q, k, causal, mask, scale, softcap)
    p_BGNM = _probabilities(s_BGNM if softcap is None else s_BGNM.clone(), lse.unflatten(1, (G, -1)).flatten(2))
    dv_BGMV = p_BGNM.mT @ grad_BGNV
    through_BGNM = p_BGNM if softcap is None else _slopes(s_BGNM, softcap).mul_(p_BGNM)
    del s_BGNM, p_BGNM  # or the scores live on while their gradient is made
    ds_BGNM = grad_BGNV @ v.to(dtype).mT
    ds_BGNM.sub_(delta_BGN[..., None]).mul_(through_BGNM).mul_(scale)
    del through_BGNM
    dq_BGNK = ds_BGNM @ k.to(dtype)
    dk_BGMK = ds_BGNM.mT @ _rows(q, G, dtype)
    return dq_BGNK.unflatten(2, (-1, L)).flatten(1, 2).to(q.dtype), dk_BGMK.to(k.dtype), dv_BGMV.to(v.dtype)
