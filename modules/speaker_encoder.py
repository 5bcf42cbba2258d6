"""What a voice sounds like, as one row, from a log-mel spectrogram of it (ECAPA-TDNN, Desplanques et al. 2020).

Convolutions over frames with reflected ends, whose channels read each other's group by group, weighed by what the whole
recording is like; then means and deviations of frames that are weighed too.

Legend: B recordings, T frames, M mel bands, C channels, A channels of attention, V width of a voice.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ftrain.modules.spec import Tree
from ftrain.modules.wave_blocks import conv_specs

_LEAST = 1e-12
"""The least variance of which a root is taken."""


@dataclass(frozen=True)
class SpeakerConfig:
    """`mels` bands to voices `d_out` wide. `channels`, `taps` and `dilations` of the first convolution, of each block,
    and of the one over all blocks; blocks have `scale` groups and are weighed through `squeezed` channels, frames
    through `d_attention`.

    ValueError where these are not equally many, groups do not divide a block, or the last is not as wide as the blocks
    together.
    """

    mels: int
    d_out: int
    channels: tuple[int, ...]
    taps: tuple[int, ...]
    dilations: tuple[int, ...]
    d_attention: int
    scale: int
    squeezed: int

    def __post_init__(self) -> None:
        inner, sizes = self.channels[1:-1], {len(self.channels), len(self.taps), len(self.dilations)}
        if len(sizes) > 1 or len(self.channels) < 3:
            raise ValueError(
                f"SpeakerConfig: {self.channels}, {self.taps}, {self.dilations} must be equally many, >= 3"
            )
        if any(c % self.scale for c in inner) or sum(inner) != self.channels[-1]:
            raise ValueError(
                f"SpeakerConfig: blocks of {inner} channels must divide into {self.scale} groups, and sum to the last, "
                f"{self.channels[-1]}"
            )
        if any(c != self.channels[0] for c in inner):
            raise ValueError(f"SpeakerConfig: blocks of {inner} channels are added to {self.channels[0]} before them")


def specs(cfg: SpeakerConfig) -> Tree:
    """`first`, `blocks` (`into`, `groups`, `out`, `squeeze`, `spread`), `all`, `attend`, `weigh`, `voice`."""
    last, c = cfg.channels[-1], cfg.channels
    return {
        "first": conv_specs(cfg.mels, c[0], cfg.taps[0]),
        "blocks": [_block_specs(cfg, c[i - 1], c[i], cfg.taps[i]) for i in range(1, len(c) - 1)],
        "all": conv_specs(last, last, cfg.taps[-1]),
        "attend": conv_specs(3 * last, cfg.d_attention, 1),
        "weigh": conv_specs(cfg.d_attention, last, 1),
        "voice": conv_specs(2 * last, cfg.d_out, 1),
    }


def _block_specs(cfg: SpeakerConfig, into: int, out: int, taps: int) -> Tree:
    each = out // cfg.scale
    return {
        "into": conv_specs(into, out, 1),
        "groups": [conv_specs(each, each, taps) for _ in range(cfg.scale - 1)],
        "out": conv_specs(out, out, 1),
        "squeeze": conv_specs(out, cfg.squeezed, 1),
        "spread": conv_specs(cfg.squeezed, out, 1),
    }


def apply(params: Tree, mel_BTM: Tensor, cfg: SpeakerConfig) -> Tensor:
    """Recordings of equal length to voices, `[B, V]`."""
    x_BCT, seen = _conv(params["first"], mel_BTM.mT, cfg.dilations[0]).relu(), list[Tensor]()
    for own, dilation in zip(params["blocks"], cfg.dilations[1:-1], strict=True):
        x_BCT = _block(own, x_BCT, cfg.scale, dilation)
        seen.append(x_BCT)
    x_BCT = _conv(params["all"], torch.cat(seen, 1), cfg.dilations[-1]).relu()
    even_BCT = torch.full_like(x_BCT, 1 / x_BCT.shape[-1])
    whole = [part.expand_as(x_BCT) for part in _statistics(x_BCT, even_BCT)]
    heard_BAT = _conv(params["attend"], torch.cat([x_BCT, *whole], 1)).relu().tanh()
    weight_BCT = _conv(params["weigh"], heard_BAT).softmax(-1)
    return _conv(params["voice"], torch.cat(_statistics(x_BCT, weight_BCT), 1))[..., 0]


def _statistics(x_BCT: Tensor, weight_BCT: Tensor) -> list[Tensor]:
    """The weighed mean and deviation over frames, `[B, C, 1]` each."""
    mean_BC1 = (weight_BCT * x_BCT).sum(-1, keepdim=True)
    variance_BC1 = (weight_BCT * (x_BCT - mean_BC1).square()).sum(-1, keepdim=True)
    return [mean_BC1, variance_BC1.clamp(min=_LEAST).sqrt()]


def _block(params: Tree, x_BCT: Tensor, scale: int, dilation: int) -> Tensor:
    groups = _conv(params["into"], x_BCT).relu().chunk(scale, 1)
    made = [groups[0]]
    for i, own in enumerate(params["groups"], 1):
        made.append(_conv(own, groups[i] if i == 1 else groups[i] + made[-1], dilation).relu())
    y_BCT = _conv(params["out"], torch.cat(made, 1)).relu()
    squeezed_BC1 = _conv(params["squeeze"], y_BCT.mean(-1, keepdim=True)).relu()
    return x_BCT + y_BCT * _conv(params["spread"], squeezed_BC1).sigmoid()


def _conv(params: Tree, x_BCT: Tensor, dilation: int = 1) -> Tensor:
    """As many frames as there were, ends reflected."""
    beyond = (params["weight"].shape[-1] - 1) * dilation
    padded = F.pad(x_BCT, (beyond // 2, beyond - beyond // 2), mode="reflect") if beyond else x_BCT
    return F.conv1d(padded, params["weight"], params["bias"], dilation=dilation)
