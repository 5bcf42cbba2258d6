"""Parts of decoders from features to waves: convolutions that look back in time, ones that stretch it, Snake.

Legend: B clips, C channels, T places in time, K taps.
"""

import torch.nn.functional as F
from torch import Tensor

from ftrain.modules.spec import ParamSpec, Tree, fan_in, zeros

EPS = 1e-9
"""What keeps the division in `snake` from zero."""


def conv_specs(into: int, out: int, taps: int, *, groups: int = 1) -> Tree:
    """`weight [out, into / groups, taps]` and `bias`."""
    fan, axis = into // groups * taps, None if groups == into else "conv_in"
    weight = ParamSpec((out, into // groups, taps), ("conv_out", axis, "conv_kernel"), fan_in(fan))
    return {"weight": weight, "bias": ParamSpec((out,), ("conv_out",), zeros())}


def stretch_specs(into: int, out: int, taps: int) -> Tree:
    """The same of a transposed convolution: `weight [into, out, taps]`."""
    weight = ParamSpec((into, out, taps), ("conv_in", "conv_out", "conv_kernel"), fan_in(into * taps))
    return {"weight": weight, "bias": ParamSpec((out,), ("conv_out",), zeros())}


def causal_conv(params: Tree, x_BCT: Tensor, *, dilation: int = 1, groups: int = 1) -> Tensor:
    """A convolution whose taps look back, `dilation` places apart, with zeros before the first place."""
    back = (params["weight"].shape[-1] - 1) * dilation
    padded = F.pad(x_BCT, (back, 0))
    return F.conv1d(padded, params["weight"], params["bias"], dilation=dilation, groups=groups)


def stretched(params: Tree, x_BCT: Tensor, stride: int) -> Tensor:
    """A transposed convolution to `stride` places for each, less `K - stride` that are cut off at both ends.

    So what K taps at a step of `stride` make of T places is `stride * T - (K - stride)` long.
    """
    cut = params["weight"].shape[-1] - stride
    y_BCT = F.conv_transpose1d(x_BCT, params["weight"], params["bias"], stride=stride)
    return y_BCT[..., cut : y_BCT.shape[-1] - cut]


def snake_specs(channels: int) -> Tree:
    """`alpha_C` and `beta_C`, logarithms, zeros."""
    return {name: ParamSpec((channels,), ("channels",), zeros()) for name in ("alpha_C", "beta_C")}


def snake(params: Tree, x_BCT: Tensor) -> Tensor:
    """`x + sin(alpha x)^2 / beta`, the periodic activation of Ziyin et al. 2020 with a strength of its own."""
    alpha_C1, beta_C1 = (params[name].exp()[:, None] for name in ("alpha_C", "beta_C"))
    return x_BCT + (x_BCT * alpha_C1).sin().square() / (beta_C1 + EPS)
