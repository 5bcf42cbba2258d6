"""Layer normalisation over the last dim (Ba, Kiros and Hinton, arXiv 1607.06450).

Legend: N rows (every leading dim, flattened), D normalised dim.
"""

import torch
from torch import Tensor

from ftrain.kernels.backend import choose_backend, device_type
from ftrain.kernels.dtypes import accumulate_dtype

# ATen's own layer norm is one node in a trace, one pass over memory on a CPU, and Inductor takes it apart to fuse it.
_BACKENDS = {"cpu": "aten", "cuda": "aten"}


def layer_norm(
    x_ND: Tensor,
    weight_D: Tensor | None = None,
    bias_D: Tensor | None = None,
    *,
    eps: float = 1e-5,
    backend: str = "auto",
) -> Tensor:
    """`(x - mean(x)) / sqrt(var(x) + eps) * weight + bias` over the last dim, in the shape and dtype of x.

    - `x_ND`: floating, any leading dims.
    - `weight_D`, `bias_D`: floating `[D]`, of any width; each may be None.
    - `eps`: added to the variance (which is biased: divided by D).
    - `backend`: "auto", "reference" or "aten" (`torch.nn.functional.layer_norm`).

    Computed in float32 (float64 for float64) and rounded once. ValueError for shapes, dtypes and backends that do not
    fit. Source: Ba, Kiros and Hinton, arXiv 1607.06450.

    >>> import torch
    >>> from ftrain.kernels.layer_norm import layer_norm
    >>> layer_norm(torch.tensor([[1.0, 3.0]]), bias_D=torch.tensor([0.0, 10.0]))
    tensor([[-1.0000, 11.0000]])
    """
    _check(x_ND, weight_D, bias_D)
    if choose_backend(backend, x_ND.device, _BACKENDS) == "reference":
        return layer_norm_reference(x_ND, weight_D, bias_D, eps=eps)
    wide = accumulate_dtype(x_ND.dtype)
    given = {p.dtype for p in (weight_D, bias_D) if p is not None}
    # A CPU sums the gradients of weights by narrow rows in their dtype, row by row: of many rows little would be left.
    if given <= {x_ND.dtype} and (x_ND.dtype == wide or not given or device_type(x_ND) != "cpu"):
        return torch.nn.functional.layer_norm(x_ND, x_ND.shape[-1:], weight_D, bias_D, eps)
    weight_D, bias_D = (None if p is None else p.to(wide) for p in (weight_D, bias_D))
    return torch.nn.functional.layer_norm(x_ND.to(wide), x_ND.shape[-1:], weight_D, bias_D, eps).to(x_ND.dtype)


def layer_norm_reference(
    x_ND: Tensor, weight_D: Tensor | None = None, bias_D: Tensor | None = None, *, eps: float = 1e-5
) -> Tensor:
    """`layer_norm` in plain torch: the shape and dtype of x, differentiable to any order."""
    wide_ND = x_ND.to(accumulate_dtype(x_ND.dtype))
    centred_ND = wide_ND - wide_ND.mean(-1, keepdim=True)
    y_ND = centred_ND * torch.rsqrt(centred_ND.square().mean(-1, keepdim=True) + eps)
    if weight_D is not None:
        y_ND = y_ND * weight_D.to(y_ND.dtype)
    if bias_D is not None:
        y_ND = y_ND + bias_D.to(y_ND.dtype)
    return y_ND.to(x_ND.dtype)


def _check(x_ND: Tensor, weight_D: Tensor | None, bias_D: Tensor | None) -> None:
    if not x_ND.is_floating_point() or x_ND.dim() == 0:
        raise ValueError(f"layer_norm: x must be floating point with a last dim, got {x_ND.dtype} {list(x_ND.shape)}")
    for name, p in (("weight", weight_D), ("bias", bias_D)):
        if p is not None and p.shape != x_ND.shape[-1:]:
            raise ValueError(f"layer_norm: {name} {list(p.shape)} does not match the last dim of {list(x_ND.shape)}")
