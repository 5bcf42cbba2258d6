"""SEANet's convolutions between a waveform and its frames, as EnCodec and Mimi have them: causal, with residual blocks.

Each output depends on no later input, so what stands behind a recording's end changes nothing before it. Leaves are
called as Mimi's files call them. Source: Tagliasacchi et al., arXiv 2009.02095; Defossez et al., arXiv 2210.13438.

Legend: B recordings, C channels, S samples, F frames, D width of a frame.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch.nn.functional as nnf
from torch import Tensor

from ftrain.modules.spec import ParamSpec, Tree, fan_in, zeros

Padding = Literal["constant", "replicate"]
"""What stands before the first sample: zeros, or the first sample."""


@dataclass(frozen=True)
class SeanetConfig:
    """`channels` of a waveform to frames of `d_out`, and back, `prod(ratios)` samples to a frame.

    `filters`: channels at full rate, doubled at each of `ratios`, which are those of the decoder, in its order (the
    encoder has them in reverse). `blocks` residual blocks at each, of kernels `block_kernel` whose dilation grows by
    `growth`, narrowed by `compress`; `shortcut`: beside them a convolution. `kernel`, `last_kernel`: of the first and
    the last convolution. `trim`: which share of what a transposed convolution has too much is cut at the right.
    """

    channels: int = 1
    d_out: int = 512
    filters: int = 64
    ratios: tuple[int, ...] = (8, 6, 5, 4)
    blocks: int = 1
    kernel: int = 7
    last_kernel: int = 3
    block_kernel: int = 3
    growth: int = 2
    compress: int = 2
    shortcut: bool = False
    padding: Padding = "constant"
    trim: float = 1.0

    @property
    def hop(self) -> int:
        """Samples of a frame."""
        return math.prod(self.ratios)


class _Layer(NamedTuple):
    kind: Literal["conv", "up", "block", "elu"]
    into: int = 0
    out: int = 0
    kernel: int = 1
    stride: int = 1
    dilation: int = 1


def _encoder(cfg: SeanetConfig) -> list[_Layer]:
    width, layers = cfg.filters, [_Layer("conv", cfg.channels, cfg.filters, cfg.kernel)]
    for ratio in cfg.ratios[::-1]:
        layers += [_Layer("block", width, width, dilation=cfg.growth**i) for i in range(cfg.blocks)]
        layers += [_Layer("elu"), _Layer("conv", width, 2 * width, 2 * ratio, ratio)]
        width *= 2
    return [*layers, _Layer("elu"), _Layer("conv", width, cfg.d_out, cfg.last_kernel)]


def _decoder(cfg: SeanetConfig) -> list[_Layer]:
    width = cfg.filters * 2 ** len(cfg.ratios)
    layers = [_Layer("conv", cfg.d_out, width, cfg.kernel)]
    for ratio in cfg.ratios:
        layers += [_Layer("elu"), _Layer("up", width, width // 2, 2 * ratio, ratio)]
        width //= 2
        layers += [_Layer("block", width, width, dilation=cfg.growth**i) for i in range(cfg.blocks)]
    return [*layers, _Layer("elu"), _Layer("conv", width, cfg.channels, cfg.last_kernel)]


def encoder_specs(cfg: SeanetConfig) -> Tree:
    """`layers.<i>`, counted with the activations between them: `conv`, or `block` (and `shortcut`) of a block."""
    return {"layers": {str(i): _specs(layer, cfg) for i, layer in enumerate(_encoder(cfg)) if layer.kind != "elu"}}


def decoder_specs(cfg: SeanetConfig) -> Tree:
    """As `encoder_specs`."""
    return {"layers": {str(i): _specs(layer, cfg) for i, layer in enumerate(_decoder(cfg)) if layer.kind != "elu"}}


def _specs(layer: _Layer, cfg: SeanetConfig) -> Tree:
    if layer.kind != "block":
        return conv_specs(layer.into, layer.out, layer.kernel, up=layer.kind == "up")
    width, inner = layer.into, layer.into // cfg.compress
    tree = {"block": {"1": conv_specs(width, inner, cfg.block_kernel), "3": conv_specs(inner, width, 1)}}
    return {**tree, "shortcut": conv_specs(width, width, 1)} if cfg.shortcut else tree


def conv_specs(into: int, out: int, kernel: int, *, bias: bool = True, up: bool = False, groups: int = 1) -> Tree:
    """`conv.weight` `[out, into, kernel]`, or with `up` `[into, out / groups, kernel]`, and `conv.bias`."""
    shape = (into, out // groups, kernel) if up else (out, into, kernel)
    names = ("conv_in", "conv_out") if up else ("conv_out", "conv_in")
    tree = {"weight": ParamSpec(shape, (*names, "conv_kernel"), fan_in(into // groups * kernel))}
    return {"conv": {**tree, "bias": ParamSpec((out,), ("conv_out",), zeros())} if bias else tree}


def encode(params: Tree, audio_BCS: Tensor, cfg: SeanetConfig) -> Tensor:
    """Samples to frames `[B, D, F]`, one for each begun `hop` of samples; zeros are put behind the last one."""
    return _run(params, audio_BCS, _encoder(cfg), cfg)


def decode(params: Tree, frames_BDF: Tensor, cfg: SeanetConfig) -> Tensor:
    """Frames to samples `[B, C, F * hop]`."""
    return _run(params, frames_BDF, _decoder(cfg), cfg)


def _run(params: Tree, x: Tensor, layers: list[_Layer], cfg: SeanetConfig) -> Tensor:
    for i, layer in enumerate(layers):
        if layer.kind == "elu":
            x = nnf.elu(x)
        elif layer.kind == "up":
            x = conv_up(params["layers"][str(i)], x, stride=layer.stride, trim=cfg.trim)
        elif layer.kind == "conv":
            x = conv(params["layers"][str(i)], x, stride=layer.stride, padding=cfg.padding)
        else:
            x = _block(params["layers"][str(i)], x, layer.dilation, cfg)
    return x


def _block(params: Tree, x: Tensor, dilation: int, cfg: SeanetConfig) -> Tensor:
    beside = conv(params["shortcut"], x, padding=cfg.padding) if "shortcut" in params else x
    x = conv(params["block"]["1"], nnf.elu(x), dilation=dilation, padding=cfg.padding)
    return beside + conv(params["block"]["3"], nnf.elu(x), padding=cfg.padding)


def conv(params: Tree, x: Tensor, *, stride: int = 1, dilation: int = 1, padding: Padding = "constant") -> Tensor:
    """A convolution whose taps look back: `[B, C, S]` to `[B, O, ceil(S / stride)]`."""
    weight = params["conv"]["weight"]
    before = (weight.shape[-1] - 1) * dilation + 1 - stride
    x = nnf.pad(x, (before, -x.shape[-1] % stride), mode=padding)
    return nnf.conv1d(x, weight, params["conv"].get("bias"), stride=stride, dilation=dilation)


def conv_up(params: Tree, x: Tensor, *, stride: int, groups: int = 1, trim: float = 1.0) -> Tensor:
    """A transposed convolution: `[B, C, F]` to `[B, O, F * stride]`; what is too much is cut, `trim` at the right."""
    weight = params["conv"]["weight"]
    x = nnf.conv_transpose1d(x, weight, params["conv"].get("bias"), stride=stride, groups=groups)
    beyond = weight.shape[-1] - stride
    right = math.ceil(beyond * trim)
    return x[..., beyond - right : x.shape[-1] - right]
