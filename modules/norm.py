"""Norms over the last dim: RMS norm and layer norm; only a layer norm has a bias, by which `apply` tells them apart.

Legend: N rows (any leading dims), D width.
"""

from typing import Any, Literal

from torch import Tensor

from ftrain.kernels.layer_norm import layer_norm
from ftrain.kernels.rms_norm import rms_norm
from ftrain.modules.spec import ParamSpec, ones, zeros

Kind = Literal["rms", "layer"]


def specs(d: int, *, kind: Kind = "rms", axis: str | None = "embed") -> dict[str, ParamSpec]:
    """`weight_D [d]`, ones, and for a layer norm `bias_D [d]`, zeros.

    ValueError for another kind.

    >>> sorted(specs(4, kind="layer"))
    ['bias_D', 'weight_D']
    """
    weight = ParamSpec((d,), (axis,), ones())
    if kind == "rms":
        return {"weight_D": weight}
    if kind == "layer":
        return {"weight_D": weight, "bias_D": ParamSpec((d,), (axis,), zeros())}
    raise ValueError(f"norm kind {kind!r} is not one of 'rms', 'layer'")


def apply(params: dict[str, Any], x_ND: Tensor, *, eps: float = 1e-6) -> Tensor:
    """The layer norm where the parameters hold a bias, else the RMS norm (Zhang & Sennrich 2019); same shape as `x`.

    >>> import torch
    >>> apply({"weight_D": torch.ones(2)}, torch.tensor([[3.0, 4.0]]), eps=0.0).square().mean().item()
    1.0
    """
    if "bias_D" in params:
        return layer_norm(x_ND, params["weight_D"], params["bias_D"], eps=eps)
    return rms_norm(x_ND, params["weight_D"], eps=eps)
