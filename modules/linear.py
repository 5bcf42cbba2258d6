"""A linear map: `x @ w`, with or without a bias.

Legend: N rows (any leading dims), I inputs, O outputs.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ftrain.modules.spec import Init, ParamSpec, fan_in, zeros


def specs(
    d_in: int, d_out: int, axes: tuple[str | None, str | None], bias: bool = False, *, init: Init | None = None
) -> dict[str, ParamSpec]:
    """`w [d_in, d_out]` with logical `axes`, and `b [d_out]` where `bias`; `w` starts with deviation `d_in ** -0.5`.

    >>> sorted(specs(4, 3, ("embed", "mlp"), bias=True))
    ['b', 'w']
    """
    weight = ParamSpec((d_in, d_out), axes, init or fan_in(d_in))
    return {"w": weight, "b": ParamSpec((d_out,), axes[1:], zeros())} if bias else {"w": weight}


def apply(params: dict[str, Any], x_NI: Tensor) -> Tensor:
    """`x @ w (+ b)` over the last dim: `[..., d_in]` to `[..., d_out]`.

    >>> import torch
    >>> apply({"w": torch.ones(2, 3), "b": torch.zeros(3)}, torch.tensor([1.0, 2.0])).tolist()
    [3.0, 3.0, 3.0]
    """
    return affine(x_NI, params["w"], params.get("b"))


def affine(x_NI: Tensor, w_IO: Tensor, b_O: Tensor | None = None) -> Tensor:
    """`x @ w (+ b)`, for blocks that name their weights themselves; raises `ValueError` where the widths differ."""
    if x_NI.shape[-1] != w_IO.shape[0]:
        raise ValueError(f"the last dim of x {list(x_NI.shape)} must be the first dim of the weight {list(w_IO.shape)}")
    if b_O is None:
        return x_NI @ w_IO
    if x_NI.dtype in (torch.bfloat16, torch.float16):  # the product would be rounded before the bias is added
        return F.linear(x_NI, w_IO.mT, b_O)
    return x_NI @ w_IO + b_O
