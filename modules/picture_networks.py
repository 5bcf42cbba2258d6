"""Convolutional networks from pictures to grids of latents and back: VQGAN's (Esser et al. 2021) and its kin.

Residual blocks of group norm, SiLU and 3x3 convolutions, halved by strided convolutions, doubled by nearest neighbours.
VQGAN has attention at the lowest resolutions and in the middle. In MoVQGAN (Zheng et al. 2022) the codes' entries
scale and shift every norm of the decoder.

Legend: B pictures, C channels, H height, W width, Z channels of latents or of codes' entries.
"""

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ftrain.modules.spec import Constant, ParamSpec, Tree, fan_in, zeros


@dataclass(frozen=True)
class NetworkConfig:
    """Networks of `widths` channels, full resolution first, with `blocks` residual blocks at each.

    `channels`: of pictures; `latent`: between the networks; `groups` of every group norm. `middle`: two blocks with
    attention between them at the lowest resolution, convolutions that halve look right and down alone, and the decoder
    has a block more at each resolution, all as in VQGAN. `attention`: the resolutions, numbered from 0, where attention
    follows each block. `guide`: channels of the codes' entries that the decoder's norms read, MoVQGAN's; 0: none do.

    ValueError where there is no width, a size is below 1, `groups` does not divide a width, or `attention` names a
    resolution that is not there.
    """

    channels: int
    widths: tuple[int, ...]
    blocks: int
    latent: int
    groups: int = 8
    middle: bool = False
    attention: tuple[int, ...] = ()
    guide: int = 0

    def __post_init__(self) -> None:
        if not self.widths:
            raise ValueError("NetworkConfig: widths is empty: give the channels at each resolution")
        if min(self.channels, self.blocks, self.groups, *self.widths) < 1:
            sizes = f"channels={self.channels}, blocks={self.blocks}, groups={self.groups} and widths={self.widths}"
            raise ValueError(f"{sizes} must be at least 1")
        if any(width % self.groups for width in self.widths):
            raise ValueError(f"groups={self.groups} does not divide every one of widths={self.widths}")
        strange = [i for i in self.attention if not 0 <= i < len(self.widths)]
        if strange:
            raise ValueError(f"attention names resolution {strange[0]} of {len(self.widths)}")


def encoder_specs(cfg: NetworkConfig) -> dict[str, Tree]:
    """`conv_in`, `stages` (a list of blocks at each resolution), `down`, as configured `middle`, `norm_out`,
    `conv_out`.
    """
    widths = cfg.widths
    return {
        "conv_in": conv_specs(cfg.channels, widths[0]),
        "stages": [_stage_specs(cfg, i, widths[max(i - 1, 0)], widths[i], cfg.blocks) for i in range(len(widths))],
        "down": [conv_specs(width, width) for width in widths[:-1]],
        **({"middle": _middle_specs(cfg, 0)} if cfg.middle else {}),
        "norm_out": _norm_specs(widths[-1]),
        "conv_out": conv_specs(widths[-1], cfg.latent),
    }


def decoder_specs(cfg: NetworkConfig) -> dict[str, Tree]:
    """As `encoder_specs`, the lowest resolution first, with `up` for `down`."""
    widths, last = cfg.widths[::-1], len(cfg.widths) - 1
    blocks = cfg.blocks + cfg.middle
    return {
        "conv_in": conv_specs(cfg.latent, widths[0]),
        **({"middle": _middle_specs(cfg, cfg.guide)} if cfg.middle else {}),
        "stages": [
            _stage_specs(cfg, last - i, widths[max(i - 1, 0)], widths[i], blocks, guide=cfg.guide)
            for i in range(len(widths))
        ],
        "up": [conv_specs(width, width) for width in widths[:-1]],
        "norm_out": _norm_specs(widths[-1], cfg.guide),
        "conv_out": conv_specs(widths[-1], cfg.channels),
    }


def conv_specs(d_in: int, d_out: int, kernel: int = 3, *, gain: float = 1.0) -> dict[str, ParamSpec]:
    """`w_OIhw [d_out, d_in, kernel, kernel]` and `b_O`."""
    axes = ("conv_out", "conv_in", "conv_kernel", "conv_kernel")
    weight = ParamSpec((d_out, d_in, kernel, kernel), axes, fan_in(d_in * kernel**2, gain=gain))
    return {"w_OIhw": weight, "b_O": ParamSpec((d_out,), ("channels",), zeros())}


def _norm_specs(width: int, guide: int = 0) -> dict[str, Tree]:
    tree: dict[str, Tree] = {
        "weight_C": ParamSpec((width,), ("channels",), Constant(1.0)),
        "bias_C": ParamSpec((width,), ("channels",), zeros()),
    }
    return {**tree, "scale": conv_specs(guide, width, 1), "shift": conv_specs(guide, width, 1)} if guide else tree


def _block_specs(d_in: int, d_out: int, guide: int = 0) -> dict[str, Tree]:
    tree = {
        "norm1": _norm_specs(d_in, guide),
        "conv1": conv_specs(d_in, d_out, gain=2**0.5),
        "norm2": _norm_specs(d_out, guide),
        "conv2": conv_specs(d_out, d_out, gain=0.5),
    }
    return tree | ({"skip": conv_specs(d_in, d_out, 1)} if d_in != d_out else {})


def _attention_specs(width: int, guide: int) -> dict[str, Tree]:
    maps = {name: conv_specs(width, width, 1) for name in ("q", "k", "v")}
    return {"norm": _norm_specs(width, guide), **maps, "out": conv_specs(width, width, 1, gain=0.5)}


def _stage_specs(
    cfg: NetworkConfig, resolution: int, d_in: int, d_out: int, blocks: int, *, guide: int = 0
) -> list[Tree]:
    found = [_block_specs(d_in if i == 0 else d_out, d_out, guide) for i in range(blocks)]
    if resolution in cfg.attention:
        return [{**block, "attention": _attention_specs(d_out, guide)} for block in found]
    return found


def _middle_specs(cfg: NetworkConfig, guide: int) -> list[Tree]:
    first, second = (_block_specs(cfg.widths[-1], cfg.widths[-1], guide) for _ in range(2))
    return [{**first, "attention": _attention_specs(cfg.widths[-1], guide)}, second]


def encode(params: Any, pictures_BCHW: Tensor, cfg: NetworkConfig) -> Tensor:
    """Pictures to latents `[B, Z, h, w]`, in the dtype of the parameters."""
    x_BCHW = conv(params["conv_in"], pictures_BCHW.to(params["conv_in"]["w_OIhw"].dtype))
    for i, stage in enumerate(params["stages"]):
        if i:
            x_BCHW = _halved(params["down"][i - 1], x_BCHW, cfg)
        x_BCHW = _through(stage, x_BCHW, cfg)
    x_BCHW = _through(params.get("middle", ()), x_BCHW, cfg)
    return conv(params["conv_out"], F.silu(_normed(params["norm_out"], x_BCHW, cfg)))


def decode(params: Any, latents_BZhw: Tensor, cfg: NetworkConfig, *, guide_BZhw: Tensor | None = None) -> Tensor:
    """Latents to pictures `[B, C, H, W]`; `guide_BZhw`: the codes' entries, where norms read them."""
    x_BCHW = _through(params.get("middle", ()), conv(params["conv_in"], latents_BZhw), cfg, guide_BZhw)
    for i, stage in enumerate(params["stages"]):
        if i:
            x_BCHW = conv(params["up"][i - 1], F.interpolate(x_BCHW, scale_factor=2.0, mode="nearest"))
        x_BCHW = _through(stage, x_BCHW, cfg, guide_BZhw)
    return conv(params["conv_out"], F.silu(_normed(params["norm_out"], x_BCHW, cfg, guide_BZhw)))


def conv(params: Any, x_BCHW: Tensor, *, stride: int = 1) -> Tensor:
    """A convolution that keeps rows and columns, or with `stride` 2 halves them; zeros beyond the edges."""
    w_OIhw = params["w_OIhw"]
    return F.conv2d(x_BCHW, w_OIhw, params["b_O"], stride=stride, padding=w_OIhw.shape[-1] // 2)


def _halved(params: Any, x_BCHW: Tensor, cfg: NetworkConfig) -> Tensor:
    if not cfg.middle:
        return conv(params, x_BCHW, stride=2)
    return F.conv2d(F.pad(x_BCHW, (0, 1, 0, 1)), params["w_OIhw"], params["b_O"], stride=2)


def _normed(params: Any, x_BCHW: Tensor, cfg: NetworkConfig, guide_BZhw: Tensor | None = None) -> Tensor:
    found_BCHW = F.group_norm(x_BCHW, cfg.groups, params["weight_C"], params["bias_C"], eps=1e-6)
    if "scale" not in params:
        return found_BCHW
    assert guide_BZhw is not None
    guide_BZHW = F.interpolate(guide_BZhw, size=x_BCHW.shape[-2:], mode="nearest")
    return found_BCHW * conv(params["scale"], guide_BZHW) + conv(params["shift"], guide_BZHW)


def _through(blocks: Any, x_BCHW: Tensor, cfg: NetworkConfig, guide_BZhw: Tensor | None = None) -> Tensor:
    """Residual blocks, each with the attention behind it."""
    for block in blocks:
        out_BCHW = conv(block["conv1"], F.silu(_normed(block["norm1"], x_BCHW, cfg, guide_BZhw)))
        out_BCHW = conv(block["conv2"], F.silu(_normed(block["norm2"], out_BCHW, cfg, guide_BZhw)))
        x_BCHW = out_BCHW + (conv(block["skip"], x_BCHW) if "skip" in block else x_BCHW)
        if "attention" in block:
            x_BCHW = x_BCHW + _attended(block["attention"], x_BCHW, cfg, guide_BZhw)
    return x_BCHW


def _attended(params: Any, x_BCHW: Tensor, cfg: NetworkConfig, guide_BZhw: Tensor | None) -> Tensor:
    """What each place reads from all places of its picture, with one head."""
    normed_BCHW = _normed(params["norm"], x_BCHW, cfg, guide_BZhw)
    q, k, v = (conv(params[name], normed_BCHW).flatten(2).mT[:, None] for name in ("q", "k", "v"))
    read_BCHW = F.scaled_dot_product_attention(q, k, v)[:, 0].mT.unflatten(-1, x_BCHW.shape[2:])
    return conv(params["out"], read_BCHW)
