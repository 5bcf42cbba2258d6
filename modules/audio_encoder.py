"""An audio encoder: log-mel frames, two strided convolutions, a transformer, neighbouring frames merged to tokens.

The shape is Whisper's (Radford et al. 2022), over clips of any length packed side by side: a clip is an item of
`4 * merge` frames per token, and neither convolutions nor attention cross from one clip to the next.

Legend: S samples, F mel frames of the pack, B frequency bins, M mel bands, D encoder width, n tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ftrain.kernels.documents import every, ids_of
from ftrain.modules import encoder_stack, linear
from ftrain.modules.block import Block
from ftrain.modules.encoder_stack import StackConfig
from ftrain.modules.log_mel import log_mel, require_wave
from ftrain.modules.omni import Encoder, Row
from ftrain.modules.spec import ParamSpec, fan_in, zeros

CONV_STRIDE = 4  # two convolutions of stride 2


@dataclass(frozen=True)
class AudioConfig:
    """`rate` samples a second, windows of `n_fft` samples every `hop`, `mels` bands; `merge` conv frames to one token.

    One token spans `4 * merge * hop / rate` seconds. The encoder is `d_model` wide with `layers` layers of `heads`
    heads and an MLP of `d_hidden` (0: four times `d_model`); its tokens are `d_out` wide, the foundation's width.
    `pattern`: layers of your own (see `StackConfig`).
    """

    d_model: int
    layers: int
    heads: int
    d_out: int
    rate: int = 16_000
    n_fft: int = 400
    hop: int = 160
    mels: int = 80
    merge: int = 2
    d_hidden: int = 0
    pattern: tuple[Block | None, ...] = ()

    @property
    def rows_per_token(self) -> int:
        """Mel frames that become one token."""
        return CONV_STRIDE * self.merge

    @property
    def stack(self) -> StackConfig:
        """The transformer."""
        hidden = self.d_hidden or 4 * self.d_model
        return StackConfig(self.d_model, self.layers, self.heads, hidden, pattern=self.pattern)


def clip_features(wave: np.ndarray | Tensor, *, cfg: AudioConfig) -> dict[str, np.ndarray]:
    """One clip's features: `mel_FM` float32 `[F, M]` of its wave `[S]`, silence filling its last token.

    `wave`: one channel of floating numbers, about -1 to 1, at `cfg.rate` samples per second. F is a multiple of
    `cfg.rows_per_token`. ValueError for several channels, and for numbers that are whole or not finite.

    >>> clip_features(np.zeros(16_000), cfg=AudioConfig(32, layers=1, heads=2, d_out=64))["mel_FM"].shape
    (104, 80)
    """
    require_wave(np.asarray(wave), rate=cfg.rate, wanted=cfg.rate)
    wave_S = torch.as_tensor(np.asarray(wave, np.float32))
    token = cfg.rows_per_token * cfg.hop
    short = -wave_S.shape[-1] % token if wave_S.shape[-1] else token
    padded_S = F.pad(wave_S, (0, short))
    return {"mel_FM": log_mel(padded_S, rate=cfg.rate, n_fft=cfg.n_fft, hop=cfg.hop, mels=cfg.mels).numpy()}


def specs(cfg: AudioConfig) -> dict[str, Any]:
    """`conv1`, `conv2` (`w` over three taps in order of time, `b`), `stack`, and the projector `hidden`, `out`."""
    return {
        "conv1": _conv_specs(cfg.mels, cfg.d_model, "frequency"),
        "conv2": _conv_specs(cfg.d_model, cfg.d_model, "conv_in"),
        "stack": encoder_stack.specs(cfg.stack),
        "hidden": linear.specs(cfg.merge * cfg.d_model, cfg.d_out, ("embed", "mlp"), bias=True),
        "out": linear.specs(cfg.d_out, cfg.d_out, ("mlp", "embed"), bias=True),
    }


def _conv_specs(d_in: int, d_out: int, axis_in: str) -> dict[str, ParamSpec]:
    weight = ParamSpec((3, d_in, d_out), ("conv_kernel", axis_in, "embed"), fan_in(3 * d_in))
    return {"w_3IO": weight, "b_O": ParamSpec((d_out,), ("embed",), zeros())}


def halving_conv(params: Any, x_FI: Tensor, segments_F: Tensor) -> Tensor:
    """A convolution of three taps and stride 2 within each clip of the pack: `[F, I]` to `[F / 2, O]`, in one dtype.

    Equal to `conv1d(kernel_size=3, stride=2, padding=1)` on each clip alone, for clips of even length: output i reads
    frames 2i - 1, 2i and 2i + 1, and only the first can lie in the clip before, where it reads as zero.
    """
    pairs_H2I = x_FI.unflatten(0, (-1, 2))
    before_HI = torch.cat([torch.zeros_like(x_FI[:1]), pairs_H2I[:-1, 1]])
    same_H = torch.cat([torch.zeros_like(segments_F[:1], dtype=torch.bool), segments_F[2::2] == segments_F[1:-1:2]])
    before_HI = torch.where(same_H[:, None], before_HI, 0.0)
    taps_HI3 = torch.cat([before_HI, pairs_H2I.flatten(1)], dim=1)
    return taps_HI3 @ params["w_3IO"].flatten(0, 1) + params["b_O"]


def lm_encode(params: Any, features: Mapping[str, Any], *, cfg: AudioConfig) -> Tensor:
    """Packed `mel_FM` and `segments_N` (a clip's number, `[F]`, or `Documents`) to tokens
    `[F / rows_per_token, d_out]`.

    Computes in the dtype of the parameters.

    Raises:
        ValueError: F is no multiple of `cfg.rows_per_token`.
    """
    mel_FM, segments = features["mel_FM"], features["segments_N"]
    segments_F = ids_of(segments)
    if mel_FM.shape[0] % cfg.rows_per_token:
        raise ValueError(f"{mel_FM.shape[0]} mel frames are not whole tokens of {cfg.rows_per_token}")
    x = F.gelu(halving_conv(params["conv1"], mel_FM.to(params["conv1"]["w_3IO"].dtype), segments_F))
    x = F.gelu(halving_conv(params["conv2"], x, segments_F[::2]))
    segments = every(segments, CONV_STRIDE)
    positions_T = _positions(ids_of(segments))
    x = encoder_stack.apply(params["stack"], x, positions=positions_T, segments_T=segments, cfg=cfg.stack)
    merged_nM = x.unflatten(0, (-1, cfg.merge)).flatten(1)
    return linear.apply(params["out"], F.gelu(linear.apply(params["hidden"], merged_nM)))


def _positions(segments_T: Tensor) -> Tensor:
    """Places counted from the start of each segment, `[T]`."""
    place_T = torch.arange(segments_T.shape[0], device=segments_T.device)
    starts_T = torch.cat([torch.ones_like(segments_T[:1], dtype=torch.bool), segments_T[1:] != segments_T[:-1]])
    return place_T - torch.where(starts_T, place_T, 0).cummax(0).values


def encoder(cfg: AudioConfig, *, begin: int, end: int) -> Encoder:
    """The modality for `OmniModel`; `begin` and `end` are token ids."""
    return Encoder(
        specs=specs(cfg),
        lm_encode=lambda params, features: lm_encode(params, features, cfg=cfg),
        features={"mel_FM": Row((cfg.mels,), "float32")},
        rows_per_token=cfg.rows_per_token,
        begin=begin,
        end=end,
    )
