"""Wan's causal video autoencoder: from frames to latents and back, of Wan 2.1 and (`residual`) of Wan 2.2's 5B.

One frame becomes one latent frame, and each further `time_factor` frames another. Leaves are called as diffusers calls
them. Source: Wan team, arXiv 2503.20314.

Legend: B videos, C channels, T frames, H and W rows and columns, Z channels of latents, F latent frames.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor

from ftrain.modules.families import wan_vae_blocks as blocks
from ftrain.modules.families.wan_vae_blocks import Seen
from ftrain.modules.hf_fields import Config, flag, require_understood, size
from ftrain.modules.spec import Tree

_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip


@dataclass(frozen=True)
class WanVaeConfig:
    """`width`, `decoder_width`: channels at full size, of encoder and decoder; `widths`: by what they are multiplied at
    each further level. `blocks`: residual blocks of a level.

    - `halve_time`: for each level but the last, whether the encoder halves frames there (it always halves rows and
      columns).
    - `channels_in`, `channels_out`: of frames, with their patches. `patch`: pixels along each side that are made
      channels first. `mean`, `std`: of latents, one for each of their channels, by which they are normed.
    - `residual`: levels have shortcuts of means and repeats, as in Wan 2.2's 5B.

    Raises:
        ValueError: there is not one `halve_time` for each level but the last, or one mean and deviation for each
            channel.
    """

    width: int = 96
    decoder_width: int = 96
    latent_channels: int = 16
    widths: tuple[int, ...] = (1, 2, 4, 4)
    blocks: int = 2
    halve_time: tuple[bool, ...] = (False, True, True)
    channels_in: int = 3
    channels_out: int = 3
    patch: int = 1
    mean: tuple[float, ...] = _MEAN
    std: tuple[float, ...] = _STD
    residual: bool = False

    def __post_init__(self) -> None:
        if len(self.halve_time) != len(self.widths) - 1:
            raise ValueError(f"WanVaeConfig: {len(self.widths)} levels need {len(self.widths) - 1} of halve_time")
        if not len(self.mean) == len(self.std) == self.latent_channels:
            raise ValueError(
                f"WanVaeConfig: {self.latent_channels} channels of latents need as many means and deviations, not "
                f"{len(self.mean)} and {len(self.std)}"
            )

    @property
    def time_factor(self) -> int:
        """Frames of a latent frame but the first."""
        return 2 ** sum(self.halve_time)

    @property
    def space_factor(self) -> int:
        """Pixels of a latent along each side."""
        return self.patch * 2 ** len(self.halve_time)


_READ = (
    "attn_scales", "base_dim", "decoder_base_dim", "dim_mult", "dropout", "in_channels", "is_residual", "latents_mean",
    "latents_std", "num_res_blocks", "out_channels", "patch_size", "scale_factor_spatial", "scale_factor_temporal",
    "temperal_downsample", "z_dim",
)  # fmt: skip


def config(config: Config) -> WanVaeConfig:
    """The autoencoder that a `config.json` of diffusers (`AutoencoderKLWan`) describes. ValueError names an entry that
    it cannot follow.

    >>> config({}).space_factor, config({}).time_factor
    (8, 4)
    """
    require_understood(config, _READ)
    for name in ("attn_scales", "dropout"):
        if config.get(name):
            raise ValueError(f"config.json: {name}={config[name]!r}, which our autoencoder does not have")
    width = size(config, "base_dim", 96)
    made = WanVaeConfig(
        width,
        size(config, "decoder_base_dim", width),
        size(config, "z_dim", 16),
        tuple(config.get("dim_mult", (1, 2, 4, 4))),
        size(config, "num_res_blocks", 2),
        tuple(config.get("temperal_downsample", (False, True, True))),
        size(config, "in_channels", 3),
        size(config, "out_channels", 3),
        size(config, "patch_size", 1),
        tuple(config.get("latents_mean", _MEAN)),
        tuple(config.get("latents_std", _STD)),
        flag(config, "is_residual"),
    )
    for name, own in {"scale_factor_spatial": made.space_factor, "scale_factor_temporal": made.time_factor}.items():
        if config.get(name, own) not in (own, None):
            raise ValueError(f"config.json: {name}={config[name]!r}, and its levels give {own}")
    return made


def specs(cfg: WanVaeConfig) -> dict[str, Any]:
    """`encoder`, `quant_conv`, `post_quant_conv`, `decoder`.

    >>> from ftrain.modules import spec
    >>> spec.count(specs(WanVaeConfig()))
    126892531
    """
    z = cfg.latent_channels
    return {
        "encoder": _encoder_specs(cfg),
        "quant_conv": blocks.conv_specs(2 * z, 2 * z, 1, 1, 1),
        "post_quant_conv": blocks.conv_specs(z, z, 1, 1, 1),
        "decoder": _decoder_specs(cfg),
    }


def _encoder_specs(cfg: WanVaeConfig) -> Tree:
    widths = [cfg.width * n for n in (1, *cfg.widths)]
    levels: list[Tree] = []
    for level, (into, out) in enumerate(pairwise(widths)):
        rest = [blocks.residual_specs(into if i == 0 else out, out) for i in range(cfg.blocks)]
        last = level == len(cfg.widths) - 1
        smaller = None if last else blocks.down_specs(out, time=cfg.halve_time[level])
        if cfg.residual:
            levels.append({"resnets": rest} if smaller is None else {"resnets": rest, "downsampler": smaller})
        else:
            levels += rest if smaller is None else [*rest, smaller]
    return {
        "conv_in": blocks.conv_specs(cfg.channels_in, widths[0], 3, 3, 3),
        "down_blocks": levels,
        **_end_specs(widths[-1], 2 * cfg.latent_channels),
    }


def _decoder_specs(cfg: WanVaeConfig) -> Tree:
    widths = [cfg.decoder_width * n for n in (cfg.widths[-1], *cfg.widths[::-1])]
    levels: list[Tree] = []
    for level, (into, out) in enumerate(pairwise(widths)):
        into = into // 2 if level and not cfg.residual else into
        tree: Tree = {"resnets": [blocks.residual_specs(into if i == 0 else out, out) for i in range(cfg.blocks + 1)]}
        if level < len(cfg.widths) - 1:
            time = cfg.halve_time[::-1][level]
            larger = blocks.up_specs(out, out if cfg.residual else out // 2, time=time)
            tree |= {"upsampler": larger} if cfg.residual else {"upsamplers": [larger]}
        levels.append(tree)
    return {
        "conv_in": blocks.conv_specs(cfg.latent_channels, widths[0], 3, 3, 3),
        "up_blocks": levels,
        **_end_specs(widths[-1], cfg.channels_out, middle=widths[0]),
    }


def _end_specs(width: int, out: int, *, middle: int | None = None) -> Tree:
    return {
        "mid_block": blocks.middle_specs(middle or width),
        "norm_out": blocks.norm_specs(width),
        "conv_out": blocks.conv_specs(width, out, 3, 3, 3),
    }


def encode(params: Tree, video_BCTHW: Tensor, cfg: WanVaeConfig, *, frames: int | None = None) -> tuple[Tensor, Tensor]:
    """Frames `[B, C, T, H, W]` in [-1, 1] to the mean and the logarithm of the variance of latents, `[B, Z, F, h, w]`.

    `frames`: latent frames that are made at a time, to save memory; None for all. Latents of a diffusion model are
    `scaled` means. ValueError for frames that are no multiple of `time_factor` and one, and sizes that do not divide.
    """
    _, channels, t, h, w = video_BCTHW.shape
    step, side = cfg.time_factor, cfg.space_factor
    if (t - 1) % step or h % side or w % side:
        raise ValueError(
            f"a video of {t} frames of {h} x {w}: Wan's autoencoder takes {step} k + 1 frames and multiples of {side} "
            f"rows and columns; cut it to {(t - 1) // step * step + 1} frames of {h // side * side} x "
            f"{w // side * side}"
        )
    if channels * cfg.patch**2 != cfg.channels_in:
        raise ValueError(f"a video of {channels} channels, and the autoencoder takes {cfg.channels_in // cfg.patch**2}")
    x = _folded(video_BCTHW, cfg.patch)
    sizes = [t] if frames is None else _pieces((t - 1) // step + 1, frames, step)
    moments = _by_pieces(lambda piece, seen: _encoder(params["encoder"], piece, seen, cfg), x, sizes)
    mean, log_variance = blocks.causal_conv(params["quant_conv"], moments, Seen()).chunk(2, 1)
    return mean, log_variance.clamp(-30.0, 20.0)


def decode(params: Tree, latents_BZFHW: Tensor, cfg: WanVaeConfig, *, frames: int | None = None) -> Tensor:
    """Latents `[B, Z, F, h, w]` (not `scaled`) to frames `[B, C, T, H, W]`, of which those beyond [-1, 1] are to be
    clamped by who shows them.

    `frames`: latent frames that are decoded at a time, to save memory; None for all. ValueError for latents of another
    autoencoder.
    """
    if latents_BZFHW.shape[1] != cfg.latent_channels:
        raise ValueError(
            f"latents of {latents_BZFHW.shape[1]} channels, and the autoencoder has {cfg.latent_channels}: take the "
            "model's own"
        )
    x = blocks.causal_conv(params["post_quant_conv"], latents_BZFHW, Seen())
    sizes = [x.shape[2]] if frames is None else _pieces(x.shape[2], frames, 1)
    found = _by_pieces(lambda piece, seen: _decoder(params["decoder"], piece, seen, cfg), x, sizes)
    return _unfolded(found, cfg.patch)


def scaled(latents_BZFHW: Tensor, cfg: WanVaeConfig) -> Tensor:
    """Latents, of the same shape, less their mean and over their deviation: what the transformer is trained on.

    >>> cfg = WanVaeConfig(latent_channels=1, mean=(1.0,), std=(2.0,))
    >>> scaled(torch.full((1, 1, 1, 1, 1), 5.0), cfg).item()
    2.0
    """
    mean, std = _statistics(latents_BZFHW, cfg)
    return (latents_BZFHW - mean) / std


def unscaled(latents_BZFHW: Tensor, cfg: WanVaeConfig) -> Tensor:
    """The inverse of `scaled`, of the same shape."""
    mean, std = _statistics(latents_BZFHW, cfg)
    return latents_BZFHW * std + mean


def _statistics(like: Tensor, cfg: WanVaeConfig) -> tuple[Tensor, Tensor]:
    mean, std = (torch.tensor(x, dtype=like.dtype, device=like.device) for x in (cfg.mean, cfg.std))
    return mean.view(-1, 1, 1, 1), std.view(-1, 1, 1, 1)


def _pieces(latent_frames: int, at_once: int, step: int) -> list[int]:
    """Frames of each piece: the first latent frame is of one frame, others are of `step`."""
    if at_once < 1:
        raise ValueError(f"frames={at_once} at a time must be at least 1")
    counts = [min(at_once, latent_frames - i) for i in range(0, latent_frames, at_once)]
    return [n * step - (step - 1 if i == 0 else 0) for i, n in enumerate(counts)]


def _by_pieces(run: Callable[[Tensor, Seen], Tensor], x: Tensor, sizes: list[int]) -> Tensor:
    seen, found = Seen(), list[Tensor]()
    for piece in x.split(sizes, 2):
        found.append(run(piece, seen))
        seen = seen.next()
    return torch.cat(found, 2)


def _encoder(params: Tree, x: Tensor, seen: Seen, cfg: WanVaeConfig) -> Tensor:
    x = blocks.causal_conv(params["conv_in"], x, seen)
    for level, tree in enumerate(params["down_blocks"]):
        x = _smaller(tree, x, seen, cfg, level) if cfg.residual else _block(tree, x, seen)
    return _end(params, blocks.middle(params["mid_block"], x, seen), seen)


def _block(tree: Tree, x: Tensor, seen: Seen) -> Tensor:
    return blocks.down(tree, x, seen) if "resample" in tree else blocks.residual(tree, x, seen)


def _smaller(tree: Tree, x: Tensor, seen: Seen, cfg: WanVaeConfig, level: int) -> Tensor:
    """A level with a shortcut of means beside it."""
    has = "downsampler" in tree
    time, space = (2 if has and cfg.halve_time[level] else 1), (2 if has else 1)
    beside = blocks.folded_down(x, cfg.width * cfg.widths[level], time=time, space=space)
    for inner in tree["resnets"]:
        x = blocks.residual(inner, x, seen)
    return (blocks.down(tree["downsampler"], x, seen) if has else x) + beside


def _decoder(params: Tree, x: Tensor, seen: Seen, cfg: WanVaeConfig) -> Tensor:
    x = blocks.middle(params["mid_block"], blocks.causal_conv(params["conv_in"], x, seen), seen)
    for level, tree in enumerate(params["up_blocks"]):
        before = x
        for inner in tree["resnets"]:
            x = blocks.residual(inner, x, seen)
        if "upsamplers" in tree:
            x = blocks.up(tree["upsamplers"][0], x, seen)
        if "upsampler" in tree:
            time, out = 1 + cfg.halve_time[::-1][level], cfg.decoder_width * cfg.widths[::-1][level]
            beside = blocks.folded_up(before, out, time=time, space=2, first=seen.is_first)
            x = blocks.up(tree["upsampler"], x, seen) + beside
    return _end(params, x, seen)


def _end(params: Tree, x: Tensor, seen: Seen) -> Tensor:
    return blocks.causal_conv(params["conv_out"], nnf.silu(blocks.normed(params["norm_out"], x)), seen)


def _folded(x: Tensor, patch: int) -> Tensor:
    """Pixels of a patch as channels: column within the patch first, then row."""
    if patch == 1:
        return x
    b, c, t, h, w = x.shape
    split = x.reshape(b, c, t, h // patch, patch, w // patch, patch)
    return split.permute(0, 1, 6, 4, 2, 3, 5).reshape(b, -1, t, h // patch, w // patch)


def _unfolded(x: Tensor, patch: int) -> Tensor:
    if patch == 1:
        return x
    b, _, t, h, w = x.shape
    return x.reshape(b, -1, patch, patch, t, h, w).permute(0, 1, 4, 5, 3, 6, 2).reshape(b, -1, t, h * patch, w * patch)
