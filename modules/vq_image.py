"""A VQ image tokenizer: convolutional encoder, codebook, convolutional decoder (VQ-VAE, van den Oord et al. 2017).

The networks are VQGAN's without attention (Esser et al. 2021): residual blocks of group norm, SiLU and 3x3
convolutions, halved by strided convolutions, doubled by nearest neighbours. The codebook may be compared on the unit
sphere (ViT-VQGAN, Yu et al. 2022), which keeps more of it in use. With a `depth` of several levels each place of the
grid has a code of every level, which quantizes what those before it leave over (RQ-VAE, Lee et al. 2022); the codes of
an image are then level by level, coarse to fine. Codebooks learn by gradient; `revive` re-seats entries that nothing
uses. The loss is squared error: no perceptual or adversarial term.

Legend: B images, C channels, H height, W width; of the grid: h, w; Q levels, N = Q * h * w codes of an image; K entries
of a level's codebook, Z their width, R latent rows (B * h * w).
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ftrain.kernels import random
from ftrain.kernels.mean import Mean
from ftrain.modules.spec import Constant, Normal, ParamSpec, fan_in, zeros


@dataclass(frozen=True)
class VqConfig:
    """Square images of `size` pixels, `channels` channels, to a grid of codes `2 ** (len(widths) - 1)` times smaller.

    `widths`: channels of the networks at each resolution, full resolution first; `blocks` residual blocks at each.
    `codes` entries of width `d_code` for each of `depth` levels; with `normalise`, which goes with one level, compared
    on the unit sphere. `commitment` weighs the pull of the encoder towards its codes; `groups` is the number of groups
    in the group norms, a divisor of every width.

    Raises:
        ValueError: `size` cannot be halved `len(widths) - 1` times, `groups` does not divide a width, there are fewer
            than 2 codes or than 1 level, or several levels with `normalise`.
    """

    size: int
    channels: int = 3
    widths: tuple[int, ...] = (64, 128)
    blocks: int = 1
    codes: int = 256
    d_code: int = 8
    depth: int = 1
    normalise: bool = True
    commitment: float = 0.25
    groups: int = 8

    def __post_init__(self) -> None:
        if not self.widths or self.size % self.factor:
            raise ValueError(f"VqConfig: size={self.size} is not a multiple of {self.factor} (widths={self.widths})")
        if any(width % self.groups for width in self.widths):
            raise ValueError(f"VqConfig: groups={self.groups} does not divide every one of widths={self.widths}")
        if self.codes < 2:
            raise ValueError(f"VqConfig: codes={self.codes} must be at least 2")
        if self.depth < 1 or (self.depth > 1 and self.normalise):
            raise ValueError(
                f"VqConfig: depth={self.depth} with normalise={self.normalise}: need at least one level, and several "
                "only with normalise=False, for what a level leaves over is on no sphere"
            )

    @property
    def factor(self) -> int:
        """How many pixels a side one code spans."""
        return 2 ** (len(self.widths) - 1)

    @property
    def grid(self) -> int:
        """Codes a side."""
        return self.size // self.factor

    @property
    def codes_per_image(self) -> int:
        """N."""
        return self.depth * self.grid**2

    @property
    def vocabulary(self) -> int:
        """Distinct codes: level q's are q * K and on."""
        return self.depth * self.codes


def specs(cfg: VqConfig) -> dict[str, Any]:
    """`encoder`, `codebooks_QKZ`, `decoder`."""
    init, shape = Normal(cfg.d_code**-0.5), (cfg.depth, cfg.codes, cfg.d_code)
    return {
        "encoder": _encoder_specs(cfg),
        "codebooks_QKZ": ParamSpec(shape, (None, "codebook", "code_dim"), init),
        "decoder": _decoder_specs(cfg),
    }


def encode(params: Any, images_BCHW: Tensor, *, cfg: VqConfig) -> Tensor:
    """Images (float, about [-1, 1]) to codes `[B, N]` int64, level by level and row by row; no gradient.

    ValueError for images of another shape than `[B, channels, size, size]`.

    >>> from ftrain.kernels import random
    >>> from ftrain.modules import spec
    >>> cfg = VqConfig(size=8, channels=1, widths=(8, 8), codes=16, d_code=4, groups=4)
    >>> params = spec.init(specs(cfg), random.key(0))
    >>> codes_BN = encode(params, torch.zeros(2, 1, 8, 8), cfg=cfg)
    >>> list(codes_BN.shape), list(decode(params, codes_BN, cfg=cfg).shape)
    ([2, 16], [2, 1, 8, 8])
    """
    with torch.no_grad():
        rows_RZ = _latent_rows(params, images_BCHW, cfg)
        return _by_image(_quantize(rows_RZ, _books(params, cfg)).codes_QR, cfg)


def decode(params: Any, codes_BN: Tensor, *, cfg: VqConfig) -> Tensor:
    """Codes `[B, N]` to images `[B, C, H, W]`, differentiable in the parameters.

    At a place of level q only q's entries stand; a code of another level is read as the entry of the same number.
    ValueError where N is not the number of codes of an image.
    """
    if codes_BN.ndim != 2 or codes_BN.shape[1] != cfg.codes_per_image:
        raise ValueError(f"decode takes codes [B, {cfg.codes_per_image}], got {list(codes_BN.shape)}")
    levels = (codes_BN % cfg.codes).unflatten(1, (cfg.depth, -1)).unbind(1)
    books = _books(params, cfg).unbind(0)
    rows = [book_KZ.index_select(0, codes.flatten()) for book_KZ, codes in zip(books, levels, strict=True)]
    return _decode_grid(params["decoder"], _grid(torch.stack(rows).sum(0), cfg), cfg)


def loss(params: Any, images_BCHW: Tensor, *, cfg: VqConfig) -> tuple[Mean, dict[str, Mean], Tensor]:
    """The training loss (per image), its terms, and the codes `[B, N]` that were used.

    `loss = reconstruction + codebook + commitment * cfg.commitment`; the terms are means over images of squared
    differences, averaged over an image's pixels or latent numbers, the last two summed over levels: of each level's
    entry from what it quantizes, and of the latent from what all levels so far add up to. The decoder's gradient
    reaches the encoder straight through the quantizer.
    """
    latent_RZ = _latent_rows(params, images_BCHW, cfg)
    found = _quantize(latent_RZ.detach(), _books(params, cfg))
    made_RZ = found.entries_QRZ.detach().cumsum(0)
    straight_RZ = latent_RZ + (made_RZ[-1] - latent_RZ).detach()
    images = images_BCHW.shape[0]
    terms = {
        "reconstruction": _per_image(
            _decode_grid(params["decoder"], _grid(straight_RZ, cfg), cfg) - images_BCHW, images
        ),
        "codebook": _per_image(found.entries_QRZ - found.left_QRZ, images, cfg.depth),
        "commitment": _per_image(latent_RZ - made_RZ, images, cfg.depth),
    }
    total = terms["reconstruction"].total + terms["codebook"].total + cfg.commitment * terms["commitment"].total
    return Mean(total, terms["codebook"].count), terms, _by_image(found.codes_QR, cfg)


def _per_image(difference: Tensor, images: int, levels: int = 1) -> Mean:
    """The mean square within an image, summed over images and levels, with the number of images."""
    total = difference.square().sum() * (images * levels / max(difference.numel(), 1))
    return Mean(total, torch.full((), images, dtype=torch.float32, device=difference.device))


class _Quantized(NamedTuple):
    """By level: codes `[Q, R]`, the entries `[Q, R, Z]` that they name, and what these quantize, without gradient."""

    codes_QR: Tensor
    entries_QRZ: Tensor
    left_QRZ: Tensor


def _quantize(rows_RZ: Tensor, books_QKZ: Tensor) -> _Quantized:
    codes, entries, left, left_RZ = [], [], [], rows_RZ
    for level, book_KZ in enumerate(books_QKZ.unbind(0)):
        chosen_R = nearest(left_RZ, book_KZ)
        entries.append(book_KZ.index_select(0, chosen_R))
        codes.append(chosen_R + level * book_KZ.shape[0])
        left.append(left_RZ)
        left_RZ = left_RZ - entries[-1].detach()
    return _Quantized(torch.stack(codes), torch.stack(entries), torch.stack(left))


def nearest(rows_RZ: Tensor, book_KZ: Tensor) -> Tensor:
    """The index of the closest entry for each row, `[R]` int64. No gradient.

    >>> nearest(torch.tensor([[0.9], [0.2]]), torch.tensor([[0.0], [1.0]])).tolist()
    [1, 0]
    """
    rows_RZ, book_KZ = rows_RZ.detach(), book_KZ.detach()
    # |r - b|^2 without |r|^2, which is the same for all entries.
    return (book_KZ.square().sum(1) - 2 * rows_RZ @ book_KZ.T).argmin(1)


def usage(codes: Tensor, cfg: VqConfig) -> Tensor:
    """How often each entry of each level is used, `[Q, K]` float32."""
    ones = torch.ones(codes.numel(), device=codes.device)
    return (
        torch.zeros(cfg.vocabulary, device=codes.device)
        .index_add(0, codes.flatten(), ones)
        .unflatten(0, (cfg.depth, -1))
    )


def latents(params: Any, images_BCHW: Tensor, *, cfg: VqConfig) -> Tensor:
    """What each level quantizes of images `[B, C, H, W]`, as it is compared with the level's codebook: `[Q, R, Z]`.

    R are the places of all images, one image after the other. No gradient. ValueError for images of another size.
    """
    return _quantize(_latent_rows(params, images_BCHW, cfg).detach(), _books(params, cfg)).left_QRZ


def revive(books_QKZ: Tensor, usage_QK: Tensor, rows_QRZ: Tensor, *, key: Tensor, least: float = 1.0) -> Tensor:
    """The codebooks with every entry used less than `least` times re-seated on a row drawn from its level's rows.

    A pure function, to be called now and then between steps with the usage since the last call (Dhariwal et al. 2020,
    Jukebox, "random restarts"). `key`: a random key, int64 `[2]`.
    """
    levels, entries, width = books_QKZ.shape
    drawn_QK = random.randint(key, (levels, entries), low=0, high=rows_QRZ.shape[1])
    seats_QKZ = rows_QRZ.gather(1, drawn_QK[..., None].expand(-1, -1, width)).to(books_QKZ.dtype)
    return torch.where((usage_QK < least)[..., None], seats_QKZ, books_QKZ)


def _check(images_BCHW: Tensor, cfg: VqConfig) -> Tensor:
    expected = (cfg.channels, cfg.size, cfg.size)
    if images_BCHW.ndim != 4 or tuple(images_BCHW.shape[1:]) != expected:
        raise ValueError(f"images must be [B, {', '.join(map(str, expected))}], got {list(images_BCHW.shape)}")
    return images_BCHW


def _books(params: Any, cfg: VqConfig) -> Tensor:
    return F.normalize(params["codebooks_QKZ"], dim=-1) if cfg.normalise else params["codebooks_QKZ"]


def _latent_rows(params: Any, images_BCHW: Tensor, cfg: VqConfig) -> Tensor:
    """The encoder's rows `[R, Z]` as they are compared with the codebooks."""
    rows_RZ = _encode_grid(params["encoder"], _check(images_BCHW, cfg), cfg).permute(0, 2, 3, 1).flatten(0, 2)
    return F.normalize(rows_RZ, dim=-1) if cfg.normalise else rows_RZ


def _by_image(codes_QR: Tensor, cfg: VqConfig) -> Tensor:
    """`[Q, R]` to `[B, N]`."""
    return codes_QR.unflatten(1, (-1, cfg.grid**2)).transpose(0, 1).flatten(1)


def _grid(rows_RZ: Tensor, cfg: VqConfig) -> Tensor:
    return rows_RZ.unflatten(0, (-1, cfg.grid, cfg.grid)).permute(0, 3, 1, 2)


def _conv_specs(d_in: int, d_out: int, kernel: int = 3, *, gain: float = 1.0) -> dict[str, ParamSpec]:
    axes = ("conv_out", "conv_in", "conv_kernel", "conv_kernel")
    weight = ParamSpec((d_out, d_in, kernel, kernel), axes, fan_in(d_in * kernel**2, gain=gain))
    return {"w_OIhw": weight, "b_O": ParamSpec((d_out,), ("channels",), zeros())}


def _norm_specs(width: int) -> dict[str, ParamSpec]:
    return {
        "weight_C": ParamSpec((width,), ("channels",), Constant(1.0)),
        "bias_C": ParamSpec((width,), ("channels",), zeros()),
    }


def _block_specs(d_in: int, d_out: int) -> dict[str, Any]:
    tree = {
        "norm1": _norm_specs(d_in),
        "conv1": _conv_specs(d_in, d_out, gain=2**0.5),
        "norm2": _norm_specs(d_out),
        "conv2": _conv_specs(d_out, d_out, gain=0.5),
    }
    return tree | ({"skip": _conv_specs(d_in, d_out, 1)} if d_in != d_out else {})


def _stage_specs(d_in: int, d_out: int, blocks: int) -> list[Any]:
    return [_block_specs(d_in if i == 0 else d_out, d_out) for i in range(blocks)]


def _encoder_specs(cfg: VqConfig) -> dict[str, Any]:
    widths = cfg.widths
    return {
        "conv_in": _conv_specs(cfg.channels, widths[0]),
        "stages": [_stage_specs(widths[max(i - 1, 0)], widths[i], cfg.blocks) for i in range(len(widths))],
        "down": [_conv_specs(width, width) for width in widths[:-1]],
        "norm_out": _norm_specs(widths[-1]),
        "conv_out": _conv_specs(widths[-1], cfg.d_code),
    }


def _decoder_specs(cfg: VqConfig) -> dict[str, Any]:
    widths = cfg.widths[::-1]
    return {
        "conv_in": _conv_specs(cfg.d_code, widths[0]),
        "stages": [_stage_specs(widths[max(i - 1, 0)], widths[i], cfg.blocks) for i in range(len(widths))],
        "up": [_conv_specs(width, width) for width in widths[:-1]],
        "norm_out": _norm_specs(widths[-1]),
        "conv_out": _conv_specs(widths[-1], cfg.channels),
    }


def _conv(params: Any, x_BCHW: Tensor, *, stride: int = 1) -> Tensor:
    w_OIhw = params["w_OIhw"]
    return F.conv2d(x_BCHW, w_OIhw, params["b_O"], stride=stride, padding=w_OIhw.shape[-1] // 2)


def _norm_silu(params: Any, x_BCHW: Tensor, cfg: VqConfig) -> Tensor:
    return F.silu(F.group_norm(x_BCHW, cfg.groups, params["weight_C"], params["bias_C"], eps=1e-6))


def _block(params: Any, x_BCHW: Tensor, cfg: VqConfig) -> Tensor:
    out_BCHW = _conv(params["conv1"], _norm_silu(params["norm1"], x_BCHW, cfg))
    out_BCHW = _conv(params["conv2"], _norm_silu(params["norm2"], out_BCHW, cfg))
    return out_BCHW + (_conv(params["skip"], x_BCHW) if "skip" in params else x_BCHW)


def _encode_grid(params: Any, images_BCHW: Tensor, cfg: VqConfig) -> Tensor:
    """Images to latents `[B, Z, h, w]`."""
    x_BCHW = _conv(params["conv_in"], images_BCHW.to(params["conv_in"]["w_OIhw"].dtype))
    for i, stage in enumerate(params["stages"]):
        if i:
            x_BCHW = _conv(params["down"][i - 1], x_BCHW, stride=2)
        for block in stage:
            x_BCHW = _block(block, x_BCHW, cfg)
    return _conv(params["conv_out"], _norm_silu(params["norm_out"], x_BCHW, cfg))


def _decode_grid(params: Any, latents_BZhw: Tensor, cfg: VqConfig) -> Tensor:
    """Latents to images `[B, C, H, W]`."""
    x_BCHW = _conv(params["conv_in"], latents_BZhw)
    for i, stage in enumerate(params["stages"]):
        if i:
            x_BCHW = _conv(params["up"][i - 1], F.interpolate(x_BCHW, scale_factor=2.0, mode="nearest"))
        for block in stage:
            x_BCHW = _block(block, x_BCHW, cfg)
    return _conv(params["conv_out"], _norm_silu(params["norm_out"], x_BCHW, cfg))
