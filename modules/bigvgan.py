"""BigVGAN (Lee et al. 2023): from a log-mel spectrogram to a wave, by convolutions that stretch it and periodic
activations that do not alias.

An activation is applied at twice the rate: in between stand low-pass filters, Kaiser's windows of a sinc.

Legend: B clips, C channels, T places in time, M mel bands, K taps, S samples.
"""

import math
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ftrain.modules.spec import Tree
from ftrain.modules.wave_blocks import conv_specs, snake, snake_specs, stretch_specs

_RATIO, _FILTER, _TAPS = 2, 12, 7
_LEAST_DB, _REFERENCE_DB = -115.0, 20.0


@dataclass(frozen=True)
class BigVganConfig:
    """`mels` bands to `channels`, which each factor of `rates` halves, by kernels of `taps`; behind each the mean of
    blocks of kernels of `block_taps`, each with three pairs of convolutions at `dilations`.

    ValueError where these do not belong together.
    """

    mels: int
    channels: int
    rates: tuple[int, ...]
    taps: tuple[int, ...]
    block_taps: tuple[int, ...]
    dilations: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        if len(self.rates) != len(self.taps) or len(self.block_taps) != len(self.dilations):
            raise ValueError(
                f"BigVganConfig: rates={self.rates} and taps={self.taps}, block_taps={self.block_taps} and dilations="
                f"{self.dilations} must be equally many"
            )
        if self.channels % 2 ** len(self.rates) or any(len(own) != 3 for own in self.dilations):
            raise ValueError(
                f"BigVganConfig: channels={self.channels} must halve {len(self.rates)} times, and blocks have three "
                "dilations"
            )


def specs(cfg: BigVganConfig) -> Tree:
    """`first`, `stretch` (one for each rate), `blocks` (for each rate those of its kernels), `snake`, `last`."""
    widths = [cfg.channels // 2**i for i in range(len(cfg.rates) + 1)]
    pairs = zip(widths, widths[1:], cfg.taps, strict=False)
    return {
        "first": conv_specs(cfg.mels, cfg.channels, _TAPS),
        "stretch": [stretch_specs(into, out, taps) for into, out, taps in pairs],
        "blocks": [[_block_specs(width, taps) for taps in cfg.block_taps] for width in widths[1:]],
        "snake": snake_specs(widths[-1]),
        "last": {"weight": conv_specs(widths[-1], 1, _TAPS)["weight"]},
    }


def _block_specs(width: int, taps: int) -> Tree:
    return {
        "wide": [conv_specs(width, width, taps) for _ in range(3)],
        "near": [conv_specs(width, width, taps) for _ in range(3)],
        "snakes": [snake_specs(width) for _ in range(6)],
    }


def apply(params: Tree, mel_BMT: Tensor, cfg: BigVganConfig) -> Tensor:
    """Log-mel spectrograms (natural logarithms of amplitudes) to waves in [-1, 1], `[B, S]`."""
    x_BCT = _same(params["first"], _scaled(mel_BMT))
    for own, blocks, rate, taps in zip(params["stretch"], params["blocks"], cfg.rates, cfg.taps, strict=True):
        x_BCT = F.conv_transpose1d(x_BCT, own["weight"], own["bias"], stride=rate, padding=(taps - rate) // 2)
        found = [_block(block, x_BCT, dilations) for block, dilations in zip(blocks, cfg.dilations, strict=True)]
        x_BCT = torch.stack(found).sum(0) / len(found)
    return _same(params["last"], _smooth_snake(params["snake"], x_BCT))[:, 0].clamp(-1, 1)


def _scaled(mel_BMT: Tensor) -> Tensor:
    """Decibels from -115 to 0, as -1 to 1."""
    least = math.exp(_LEAST_DB / 20 * math.log(10))
    decibels = 20 * mel_BMT.exp().clamp(min=least).log10() - _REFERENCE_DB
    return (2 * (decibels - _LEAST_DB) / -_LEAST_DB - 1).clamp(-1, 1)


def _block(params: Tree, x_BCT: Tensor, dilations: tuple[int, ...]) -> Tensor:
    for i, dilation in enumerate(dilations):
        wide_BCT = _same(params["wide"][i], _smooth_snake(params["snakes"][2 * i], x_BCT), dilation)
        x_BCT = x_BCT + _same(params["near"][i], _smooth_snake(params["snakes"][2 * i + 1], wide_BCT))
    return x_BCT


def _same(params: Tree, x_BCT: Tensor, dilation: int = 1) -> Tensor:
    padding = (params["weight"].shape[-1] - 1) * dilation // 2
    return F.conv1d(x_BCT, params["weight"], params.get("bias"), padding=padding, dilation=dilation)


def _smooth_snake(params: Tree, x_BCT: Tensor) -> Tensor:
    """The Snake of a wave that has twice the places, filtered before and behind."""
    channels, places = x_BCT.shape[1:]
    filter_C1K = torch.tensor(_low_pass(), dtype=x_BCT.dtype, device=x_BCT.device).expand(channels, 1, _FILTER)
    pad = _FILTER // _RATIO - 1
    wide = F.pad(x_BCT, (pad, pad), mode="replicate")
    wide = _RATIO * F.conv_transpose1d(wide, filter_C1K, stride=_RATIO, groups=channels)
    begin = pad * _RATIO + (_FILTER - _RATIO) // 2
    turned = snake(params, wide[..., begin : begin + _RATIO * places])
    turned = F.pad(turned, (_FILTER // 2 - 1, _FILTER // 2), mode="replicate")
    return F.conv1d(turned, filter_C1K, stride=_RATIO, groups=channels)


@cache
def _low_pass() -> tuple[float, ...]:
    """The filter: cut at a quarter of the rate, with a transition of 0.3 of it at either side (Kaiser 1974)."""
    cutoff, half_width, half = 0.5 / _RATIO, 0.6 / _RATIO, _FILTER // 2
    attenuation = 2.285 * (half - 1) * math.pi * 4 * half_width + 7.95
    beta = 0.1102 * (attenuation - 8.7)
    if attenuation <= 50:
        beta = 0.5842 * (attenuation - 21) ** 0.4 + 0.07886 * (attenuation - 21)
    window_K = torch.kaiser_window(_FILTER, beta=beta, periodic=False, dtype=torch.float32)
    time_K = torch.arange(-half, half) + 0.5
    filter_K = 2 * cutoff * window_K * torch.sinc(2 * cutoff * time_K)
    return tuple((filter_K / filter_K.sum()).tolist())
