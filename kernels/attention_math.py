"""Attention of a few equal documents in plain arithmetic, with its gradient written out: runs on any device and dtype.

B documents, H query heads, G key/value heads, R = H / G, L queries and M keys of a document, K head dim, V value dim.
"""

import torch
from torch import Tensor

from ftrain.kernels.dtypes import accumulate_dtype


def _scores(q_BHLK: Tensor, k_BGMK: Tensor, causal: bool, mask_LM: Tensor | None, scale: float) -> Tensor:
    """`[B, G, R, L, M]` in the accumulation dtype."""
    dtype, G = accumulate_dtype(q_BHLK.dtype), k_BGMK.shape[1]
    q_BGRLK = q_BHLK.unflatten(1, (G, -1)).to(dtype)
    s_BGRLM = (q_BGRLK @ k_BGMK.to(dtype).mT[:, :, None]).mul_(scale)
    if causal:
        L, M = s_BGRLM.shape[-2:]
        s_BGRLM.masked_fill_(torch.ones(L, M, dtype=torch.bool, device=q_BHLK.device).triu_(1), -torch.inf)
    return s_BGRLM if mask_LM is None else s_BGRLM.add_(mask_LM)


def _probabilities(s_BGRLM: Tensor, lse_BGRL: Tensor) -> Tensor:
    """A query that sees nothing has -inf everywhere and attends to nothing."""
    return s_BGRLM.sub_(lse_BGRL.clamp(min=torch.finfo(lse_BGRL.dtype).min)[..., None]).exp_()


def forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Output `[B, H, L, V]` in the dtype of the queries and the scores' log-sum-exp `[B, H, L]`.

    - `q`, `k`, `v`: `[B, H, L, K]`, `[B, G, M, K]`, `[B, G, M, V]`, one floating dtype.
    - `causal`: query i sees keys 0 .. i. `mask`: `[L, M]`, added to the scores; -inf hides. `scale`: of the scores.

    The arithmetic and the log-sum-exp are float32 (float64 for float64). A query that sees nothing gives zeros.
    """
    s_BGRLM = _scores(q, k, causal, mask, scale)
    lse_BGRL = s_BGRLM.logsumexp(-1)
    p_BGRLM = _probabilities(s_BGRLM, lse_BGRL)
    out_BGRLV = p_BGRLM @ v.to(p_BGRLM.dtype)[:, :, None]
    return out_BGRLV.flatten(1, 2).to(q.dtype), lse_BGRL.flatten(1, 2)


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
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `q`, `k`, `v`, of their shapes and dtypes.

    - `grad`, `out`: `[B, H, L, V]`. `lse`: `[B, H, L]`, from `forward` over all keys, of which these may be a part.
    - `q`, `k`, `v`, `causal`, `mask`, `scale`: as in `forward`.
    """
    dtype, G = lse.dtype, k.shape[1]
    q_BGRLK, grad_BGRLV, out_BGRLV = (x.unflatten(1, (G, -1)).to(dtype) for x in (q, grad, out))
    p_BGRLM = _probabilities(_scores(q, k, causal, mask, scale), lse.unflatten(1, (G, -1)))
    dv_BGMV = (p_BGRLM.mT @ grad_BGRLV).sum(2)
    ds_BGRLM = grad_BGRLV @ v.to(dtype).mT[:, :, None]
    ds_BGRLM.sub_((grad_BGRLV * out_BGRLV).sum(-1, keepdim=True)).mul_(p_BGRLM).mul_(scale)
    dq_BGRLK = ds_BGRLM @ k.to(dtype)[:, :, None]
    dk_BGMK = (ds_BGRLM.mT @ q_BGRLK).sum(2)
    return dq_BGRLK.flatten(1, 2).to(q.dtype), dk_BGMK.to(k.dtype), dv_BGMV.to(v.dtype)
