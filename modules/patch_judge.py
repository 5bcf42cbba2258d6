"""A judge of pictures by patches (PatchGAN, Isola et al. 2017), and the hinge losses of it and of what it judges.

Pure functions: the judge's parameters are a tree of their own with an optimizer of their own. Norms are of groups of
channels within a picture, so that no picture changes what is said of another.

Legend: B pictures, C channels, H and W rows and columns, h and w those of the judge's scores, one for each patch.
"""

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ftrain.kernels.mean import Mean
from ftrain.modules.spec import Constant, Normal, ParamSpec, Tree, zeros


@dataclass(frozen=True)
class JudgeConfig:
    """`layers` convolutions of stride 2 behind each other, from `width` channels up to eight times that.

    `channels`: of pictures; `groups` of the norms. ValueError where `groups` does not divide `width`, or there is no
    layer.
    """

    channels: int = 3
    width: int = 64
    layers: int = 3
    groups: int = 8

    def __post_init__(self) -> None:
        if self.width % self.groups or self.layers < 1:
            raise ValueError(
                f"JudgeConfig: groups={self.groups} must divide width={self.width}, and layers be 1 or more"
            )

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels behind each convolution but the last."""
        return tuple(self.width * min(2**i, 8) for i in range(self.layers + 1))


def specs(cfg: JudgeConfig) -> dict[str, Tree]:
    """`convs` and the `norms` behind all but the first and the last."""
    into, out = (cfg.channels, *cfg.widths), (*cfg.widths, 1)
    axes, init = ("conv_out", "conv_in", "conv_kernel", "conv_kernel"), Normal(0.02)
    convs = [
        {"w_OIhw": ParamSpec((o, i, 4, 4), axes, init), "b_O": ParamSpec((o,), ("channels",), zeros())}
        for i, o in zip(into, out, strict=True)
    ]
    norms = [
        {
            "weight_C": ParamSpec((width,), ("channels",), Constant(1.0)),
            "bias_C": ParamSpec((width,), ("channels",), zeros()),
        }
        for width in cfg.widths[1:]
    ]
    return {"convs": convs, "norms": norms}


def apply(params: Any, pictures_BCHW: Tensor, cfg: JudgeConfig) -> Tensor:
    """How real each patch looks, `[B, h, w]`, in the dtype of the parameters; ValueError for pictures too small for it.

    >>> import torch
    >>> from ftrain.kernels import random
    >>> from ftrain.modules import spec
    >>> cfg = JudgeConfig(width=8, layers=2)
    >>> list(apply(spec.init(specs(cfg), random.key(0)), torch.zeros(2, 3, 32, 32), cfg).shape)
    [2, 6, 6]
    """
    if min(pictures_BCHW.shape[-2:]) < 2 ** (cfg.layers + 2):
        raise ValueError(
            f"pictures {list(pictures_BCHW.shape)}: a judge of {cfg.layers} layers needs sides of at least "
            f"{2 ** (cfg.layers + 2)} pixels; give it fewer layers"
        )
    x_BCHW, last = pictures_BCHW.to(params["convs"][0]["w_OIhw"].dtype), len(params["convs"]) - 1
    for i, layer in enumerate(params["convs"]):
        x_BCHW = F.conv2d(x_BCHW, layer["w_OIhw"], layer["b_O"], stride=2 if i < cfg.layers else 1, padding=1)
        if 0 < i < last:
            norm = params["norms"][i - 1]
            x_BCHW = F.group_norm(x_BCHW, cfg.groups, norm["weight_C"], norm["bias_C"])
        if i < last:
            x_BCHW = F.leaky_relu(x_BCHW, 0.2)
    return x_BCHW[:, 0]


def judge_loss(params: Any, real_BCHW: Tensor, made_BCHW: Tensor, cfg: JudgeConfig) -> Mean:
    """The judge's: scores of real patches should be above 1, those of made ones below -1; no gradient reaches pictures.

    ValueError where there are not as many made pictures as real ones.
    """
    if real_BCHW.shape != made_BCHW.shape:
        raise ValueError(f"pictures {list(made_BCHW.shape)} were made, and real ones are {list(real_BCHW.shape)}")
    real, made = (apply(params, x.detach(), cfg) for x in (real_BCHW, made_BCHW))
    return Mean.of((F.relu(1 - real) + F.relu(1 + made)) / 2)


def fool_loss(params: Any, made_BCHW: Tensor, cfg: JudgeConfig) -> Mean:
    """What is added to the loss of that which makes pictures: their scores should be high."""
    return Mean.of(-apply(params, made_BCHW, cfg))
