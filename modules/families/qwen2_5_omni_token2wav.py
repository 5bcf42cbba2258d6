"""Qwen2.5-Omni's Token2Wav: from codes of speech to a log-mel spectrogram, in a voice, by a flow; and from that to a
wave by BigVGAN (`ftrain.modules.bigvgan`).

The flow's field is a diffusion transformer over frames, each of which sees its own block of them and in some layers one
more. Source: Qwen team, Qwen2.5-Omni (arXiv 2503.20215).

Legend: B clips, N codes, T frames, R frames of a reference, M mel bands, V width of a voice, D width, H heads, K head
dim.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ftrain.kernels.embedding import embedding
from ftrain.kernels.mean import Mean
from ftrain.kernels.rope import rope, rope_table
from ftrain.modules import bigvgan, linear, speaker_encoder
from ftrain.modules.bigvgan import BigVganConfig
from ftrain.modules.speaker_encoder import SpeakerConfig
from ftrain.modules.spec import Normal, ParamSpec, Tree, zeros

EPS, TIMES = 1e-6, 256
"""Of all norms; features of a time."""


@dataclass(frozen=True)
class FieldConfig:
    """The field: `layers` layers of `heads` heads of `head_dim`, `d_model` wide, with MLPs of `d_hidden`, over frames
    of `speaker.mels` bands; `codes` codes, embedded in `d_code`, each of which is `repeats` frames; voices `d_voice`
    wide. A frame sees its block of `block` frames; in layers of `ahead` the block behind too, of `back` that before.
    """

    d_model: int
    layers: int
    heads: int
    head_dim: int
    d_hidden: int
    codes: int
    d_code: int
    d_voice: int
    repeats: int
    block: int
    ahead: tuple[int, ...]
    back: tuple[int, ...]
    speaker: SpeakerConfig
    rope_base: float = 10_000.0


@dataclass(frozen=True)
class Token2WavConfig:
    """The `field` and the `vocoder`. ValueError where they are of another number of mel bands."""

    field: FieldConfig
    vocoder: BigVganConfig

    def __post_init__(self) -> None:
        if self.field.speaker.mels != self.vocoder.mels:
            raise ValueError(f"{self.field.speaker.mels} mel bands for a vocoder of {self.vocoder.mels}")


def _map(into: int, out: int, *, axes: tuple[str, str] = ("embed", "mlp"), still: bool = False) -> Tree:
    return linear.specs(into, out, axes, bias=True, init=zeros() if still else None)


def specs(cfg: Token2WavConfig) -> Tree:
    """`field` and `vocoder` (`bigvgan.specs`)."""
    return {"field": field_specs(cfg.field), "vocoder": bigvgan.specs(cfg.vocoder)}


def field_specs(cfg: FieldConfig) -> Tree:
    """`table_VD` (of codes), `speaker`, `into`, `time` (two maps), `layers`, `shift` and `out`; gates start at zero."""
    d, hk, speaker = cfg.d_model, cfg.heads * cfg.head_dim, cfg.speaker
    layer = {
        "gates": _map(d, 6 * d, still=True),
        **{name: _map(d, hk, axes=("embed", "heads")) for name in ("q", "k", "v")},
        "o": _map(hk, d, axes=("heads", "embed")),
        "up": _map(d, cfg.d_hidden),
        "down": _map(cfg.d_hidden, d, axes=("mlp", "embed")),
    }
    return {
        "table_VD": ParamSpec((cfg.codes + 1, cfg.d_code), ("vocab", "embed"), Normal(0.02)),
        "speaker": speaker_encoder.specs(speaker),
        "into": _map(speaker.mels + speaker.d_out + cfg.d_code + cfg.d_voice, d),
        "time": [_map(TIMES, d), _map(d, d)],
        "layers": [layer for _ in range(cfg.layers)],
        "shift": _map(d, 2 * d, still=True),
        "out": _map(d, speaker.mels, still=True),
    }


def velocity(params: Tree, x_BTM: Tensor, time_B: Tensor, told: Mapping[str, Tensor], cfg: FieldConfig) -> Tensor:
    """Where frames go at a time from 0 (noise) to 1 (speech), `[B, T, M]`.

    `told`: "codes" `[B, N]`, "reference" `[B, R, M]` (frames of the voice) and "voice" `[B, V]`. ValueError where T is
    not `N * cfg.repeats`.
    """
    codes_BN, frames = told["codes"], x_BTM.shape[1]
    if frames != codes_BN.shape[1] * cfg.repeats:
        raise ValueError(f"{frames} frames of {codes_BN.shape[1]} codes: each code is {cfg.repeats} frames")
    coded_BTD = embedding(codes_BN, params["table_VD"]).repeat_interleave(cfg.repeats, 1)
    heard_BV = speaker_encoder.apply(params["speaker"], told["reference"], cfg.speaker)
    rows = [heard_BV[:, None].expand(-1, frames, -1), coded_BTD, told["voice"][:, None].expand(-1, frames, -1)]
    x_BTD = linear.apply(params["into"], torch.cat([x_BTM, *rows], -1))
    first, second = params["time"]
    time_BD = linear.apply(second, F.silu(linear.apply(first, _features(time_B))))
    at = _Frames(x_BTD, cfg)
    for i, layer in enumerate(params["layers"]):
        x_BTD = _layer(layer, x_BTD, F.silu(time_BD), at, i)
    scale_B1D, shift_B1D = linear.apply(params["shift"], F.silu(time_BD))[:, None].chunk(2, -1)
    return linear.apply(params["out"], _normed(x_BTD) * (1 + scale_B1D) + shift_B1D)


def loss(params: Tree, batch: Mapping[str, Tensor], cfg: FieldConfig) -> Mean:
    """The squared error of the velocity on the straight way from "noise" to "mel", both `[B, T, M]`, at "time" `[B]`.

    `batch`: also what `velocity` is told. (Liu et al. 2022; Lipman et al. 2023.)
    """
    mel, noise, time_B = batch["mel"], batch["noise"], batch["time"]
    x_BTM = torch.lerp(noise, mel, time_B[:, None, None])
    return Mean.of((velocity(params, x_BTM, time_B, batch, cfg) - (mel - noise)).square())


class _Frames:
    """What all layers know of frames: rotations, and which frames each sees."""

    def __init__(self, x_BTD: Tensor, cfg: FieldConfig) -> None:
        self.cfg = cfg
        place_T = torch.arange(x_BTD.shape[1], device=x_BTD.device)
        self.table = rope_table(place_T.repeat(len(x_BTD)), head_dim=cfg.head_dim, base=cfg.rope_base)
        block_T = place_T // cfg.block
        self.apart_TT = block_T - block_T[:, None]

    def seen(self, layer: int) -> Tensor:
        """Which frames each frame sees, bool `[T, T]`."""
        back, ahead = layer in self.cfg.back, layer in self.cfg.ahead
        return (self.apart_TT >= -int(back)) & (self.apart_TT <= int(ahead))

    def rotated(self, x_BTHK: Tensor) -> Tensor:
        """The first head alone turns, pairs of neighbours."""
        turned = rope(x_BTHK[:, :, :1].flatten(0, 1), *self.table, layout="interleaved")
        return torch.cat([turned.unflatten(0, x_BTHK.shape[:2]), x_BTHK[:, :, 1:]], 2)


def _layer(params: Tree, x_BTD: Tensor, time_BD: Tensor, at: _Frames, layer: int) -> Tensor:
    shift, scale, gate, shift_2, scale_2, gate_2 = linear.apply(params["gates"], time_BD)[:, None].chunk(6, -1)
    normed_BTD = _normed(x_BTD) * (1 + scale) + shift
    heads = (at.cfg.heads, at.cfg.head_dim)
    q, k, v = (linear.apply(params[name], normed_BTD).unflatten(-1, heads) for name in ("q", "k", "v"))
    q, k, v = (x.transpose(1, 2) for x in (at.rotated(q), at.rotated(k), v))
    read = F.scaled_dot_product_attention(q, k, v, attn_mask=at.seen(layer))
    x_BTD = x_BTD + gate * linear.apply(params["o"], read.transpose(1, 2).flatten(2))
    normed_BTD = _normed(x_BTD) * (1 + scale_2) + shift_2
    hidden = F.gelu(linear.apply(params["up"], normed_BTD), approximate="tanh")
    return x_BTD + gate_2 * linear.apply(params["down"], hidden)


def _normed(x_BTD: Tensor) -> Tensor:
    return F.layer_norm(x_BTD, x_BTD.shape[-1:], eps=EPS)


def _features(time_B: Tensor) -> Tensor:
    half = TIMES // 2
    rate_F = torch.exp(torch.arange(half, device=time_B.device).float() * (-math.log(10_000) / (half - 1)))
    angle_BF = 1000 * time_B[:, None] * rate_F
    return torch.cat([angle_BF.sin(), angle_BF.cos()], -1).to(time_B.dtype)


@torch.no_grad()
def decode(
    params: Tree,
    told: Mapping[str, Tensor],
    noise_BTM: Tensor,
    cfg: Token2WavConfig,
    *,
    steps: int = 10,
    guidance: float = 0.5,
    sway: float = -1.0,
) -> Tensor:
    """Waves `[B, S]` of codes in a voice, from noise.

    `told`: as of `velocity`. `steps`: times at which the flow is looked at, the ends included; `sway` moves them to the
    beginning where below 0. `guidance`: how far the velocity goes beyond that without codes and voice. ValueError for
    codes that are none, and fewer than two steps.
    """
    codes_BN = told["codes"]
    if not codes_BN.numel() or not 0 <= int(codes_BN.min()) <= int(codes_BN.max()) < cfg.field.codes or steps < 2:
        raise ValueError(
            f"codes {list(codes_BN.shape)} in {steps} steps: give codes from 0 to {cfg.field.codes - 1}, and two steps "
            "or more"
        )
    nothing = {name: torch.zeros_like(leaf) for name, leaf in told.items()}
    both = {name: torch.cat([leaf, nothing[name]]) for name, leaf in told.items()}

    def field(time: Tensor, x_BTM: Tensor) -> Tensor:
        time_B = time.expand(2 * len(x_BTM))
        with_BTM, without_BTM = velocity(params["field"], x_BTM.repeat(2, 1, 1), time_B, both, cfg.field).chunk(2)
        return with_BTM + (with_BTM - without_BTM) * guidance

    time_S = torch.linspace(0, 1, steps, device=noise_BTM.device, dtype=noise_BTM.dtype)
    time_S = time_S + sway * (torch.cos(torch.pi / 2 * time_S) - 1 + time_S)
    x_BTM = noise_BTM
    for start, end in pairwise(time_S.unbind()):
        x_BTM = x_BTM + _step(field, start, end, x_BTM)
    return bigvgan.apply(params["vocoder"], x_BTM.mT, cfg.vocoder)


def _step(field: Callable[[Tensor, Tensor], Tensor], start: Tensor, end: Tensor, x: Tensor) -> Tensor:
    """A step of Kutta's 3/8 rule."""
    step: Any = end - start
    k1 = field(start, x)
    k2 = field(start + step / 3, x + step * k1 / 3)
    k3 = field(start + step * 2 / 3, x + step * (k2 - k1 / 3))
    k4 = field(end, x + step * (k1 - k2 + k3))
    return (k1 + 3 * (k2 + k3) + k4) * step / 8
