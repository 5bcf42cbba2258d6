"""Norms over the last dim: RMS norm, the same with a weight that is kept less 1, and layer norm.

`apply` tells them apart by their leaves: only a layer norm has a bias, and a centred RMS norm has `offset_D`.

Legend: N rows (any leading dims), D width.
"""

from typing import Any, Literal

from torch import Tensor

from ftrain.kernels.layer_norm import layer_norm
from ftrain.kernels.rms_norm import rms_norm
from ftrain.modules.spec import ParamSpec, ones, zeros

Kind = Literal["rms", "centred", "layer"]


def specs(d: int, *, kind: Kind = "rms", axis: str | None = "embed") -> dict[str, ParamSpec]:
    """`weight_D [d]`, ones, and for a layer norm `bias_D [d]`, zeros; for a centred one `offset_D [d]`, zeros.

    ValueError for another kind.

    >>> sorted(specs(4, kind="layer"))
    ['bias_D', 'weight_D']
    """
    if kind == "centred":
        return {"offset_D": ParamSpec((d,), (axis,), zeros())}
    weight = ParamSpec((d,), (axis,), ones())
    if kind == "rms":
        return {"weight_D": weight}
    if kind == "layer":
        return {"weight_D": weight, "bias_D": ParamSpec((d,), (axis,), zeros())}
    raise ValueError(f"norm kind {kind!r} is not one of 'rms', 'centred', 'layer'")


def apply(params: dict[str, Any], x_ND: Tensor, *, eps: float = 1e-6) -> Tensor:
    """The layer norm where the parameters hold a bias, else the RMS norm (Zhang & Sennrich 2019); same shape as `x`.

    With `offset_D` the weight is `1 + offset_D` (Qwen3-Next), so that decay of weights pulls it to 1.

    >>> import torch
    >>> apply({"weight_D": torch.ones(2)}, torch.tensor([[3.0, 4.0]]), eps=0.0).square().mean().item()
    1.0
    """
    if "bias_D" in params:
        return layer_norm(x_ND, params["weight_D"], params["bias_D"], eps=eps)
    if "offset_D" in params:
        return rms_norm(x_ND, 1 + params["offset_D"], eps=eps)
    return rms_norm(x_ND, params["weight_D"], eps=eps)
