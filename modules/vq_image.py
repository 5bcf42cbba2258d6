"""A VQ image tokenizer: convolutional encoder, codebook, convolutional decoder (VQ-VAE, van den Oord et al. 2017).

The networks (modules/picture_networks.py) are VQGAN's without attention, VQGAN's (as LlamaGen and Janus have them), or
MoVQGAN's. The codebook (modules/codebook.py) may be compared on the unit sphere (ViT-VQGAN, Yu et al. 2022), which
keeps more of it in use. With a `depth` of several levels each place of the grid has a code of every level; the codes of
an image are then level by level, coarse to fine. Codebooks learn by gradient or follow averages; entries that nothing
uses are seated anew. The loss is squared error; modules/patch_judge.py has an adversarial one.

Legend: B images, C channels, H height, W width; of the grid: h, w; Q levels, N = Q * h * w codes of an image; K entries
of a level's codebook, Z their width, R latent rows (B * h * w).
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ftrain.kernels.mean import Mean
from ftrain.modules import codebook, picture_networks
from ftrain.modules.codebook import Quantized
from ftrain.modules.picture_networks import NetworkConfig, conv, conv_specs


@dataclass(frozen=True)
class VqConfig:
    """Square images of `size` pixels, `channels` channels, to a grid of codes `2 ** (len(widths) - 1)` times smaller.

    `widths`: channels of the networks at each resolution, full resolution first; `blocks` residual blocks at each.
    `networks`: "plain", "vqgan" or "movq" (see `NetworkConfig`); the latter two have `latent` channels of their own,
    which a linear map takes to the width of codes and back, and attention at the resolutions `attention`.
    `codes` entries of width `d_code` for each of `depth` levels; with `normalise`, which goes with one level, compared
    on the unit sphere. `commitment` weighs the pull of the encoder towards its codes, `pull` that of the codebook
    towards the encoder, 0 where it follows averages (modules/codebook_averages.py). `groups` is the number of groups in
    the group norms, a divisor of every width.

    Raises:
        ValueError: `size` cannot be halved `len(widths) - 1` times, `groups` does not divide a width, there are fewer
            than 2 codes or than 1 level, several levels with `normalise`, `latent` where networks have none, a size
            below 1, or a negative weight.
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
    networks: Literal["plain", "vqgan", "movq"] = "plain"
    latent: int = 0
    attention: tuple[int, ...] = ()
    pull: float = 1.0

    def __post_init__(self) -> None:
        if self.widths and (self.size < 1 or self.size % self.factor):
            raise ValueError(f"VqConfig: size={self.size} is not a multiple of {self.factor} (widths={self.widths})")
        if (self.networks == "plain") != (self.latent == 0):
            raise ValueError(f"VqConfig: latent={self.latent} with networks={self.networks!r}: plain ones have none")
        try:
            _ = self.network
        except ValueError as error:
            raise ValueError(f"VqConfig: {error}") from None
        if self.codes < 2 or self.d_code < 1:
            raise ValueError(
                f"VqConfig: codes={self.codes} must be at least 2, and their width d_code={self.d_code} at least 1"
            )
        if self.commitment < 0 or self.pull < 0:
            raise ValueError(f"VqConfig: commitment={self.commitment} and pull={self.pull} must not be negative")
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
    def network(self) -> NetworkConfig:
        """The networks, from pictures to latents and back."""
        whole = self.networks != "plain"
        return NetworkConfig(
            self.channels, self.widths, self.blocks, self.latent if whole else self.d_code, self.groups,
            middle=whole, attention=self.attention, guide=self.d_code if self.networks == "movq" else 0,
        )  # fmt: skip

    @property
    def vocabulary(self) -> int:
        """Distinct codes: level q's are q * K and on."""
        return self.depth * self.codes


def specs(cfg: VqConfig) -> dict[str, Any]:
    """`encoder`, `codebooks_QKZ`, `decoder`, and where networks have latents of their own `to_code` and `from_code`."""
    tree = {
        "encoder": picture_networks.encoder_specs(cfg.network),
        "codebooks_QKZ": codebook.specs(cfg.depth, cfg.codes, cfg.d_code),
        "decoder": picture_networks.decoder_specs(cfg.network),
    }
    if not cfg.latent:
        return tree
    maps = {"to_code": conv_specs(cfg.latent, cfg.d_code, 1), "from_code": conv_specs(cfg.d_code, cfg.latent, 1)}
    return {**tree, **maps}


def encode(params: Any, images_BCHW: Tensor, *, cfg: VqConfig) -> Tensor:
    """Images (float, about [-1, 1]) to codes `[B, N]` int64, level by level and row by row; no gradient.

    ValueError for images of another shape than `[B, channels, size, size]`, or of whole numbers.

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
        return _numbered(codebook.quantize(rows_RZ, _books(params, cfg)), cfg)


def decode(params: Any, codes_BN: Tensor, *, cfg: VqConfig) -> Tensor:
    """Codes `[B, N]` to images `[B, C, H, W]`, differentiable in the parameters.

    At a place of level q only q's entries stand; a code of another level is read as the entry of the same number.
    ValueError where N is not the number of codes of an image, and on a CPU for a code that is of no level.
    """
    if codes_BN.ndim != 2 or codes_BN.shape[1] != cfg.codes_per_image:
        raise ValueError(f"decode takes codes [B, {cfg.codes_per_image}], got {list(codes_BN.shape)}")
    return _decoded(params, codebook.rows_of(codes_BN, _books(params, cfg)), cfg)


class Autoencoded(NamedTuple):
    """What training makes of images: `loss`, its `terms`, the codes `[B, N]`, `images` that come back `[B, C, H, W]`
    (for a loss of one's own), and `found`, what `codebook_averages.moved` reads.
    """

    loss: Mean
    terms: dict[str, Mean]
    codes_BN: Tensor
    images_BCHW: Tensor
    found: Quantized


def loss(params: Any, images_BCHW: Tensor, *, cfg: VqConfig) -> tuple[Mean, dict[str, Mean], Tensor]:
    """The training loss (per image), its terms, and the codes `[B, N]` that were used, of `autoencoded`."""
    made = autoencoded(params, images_BCHW, cfg=cfg)
    return made.loss, made.terms, made.codes_BN


def autoencoded(params: Any, images_BCHW: Tensor, *, cfg: VqConfig) -> Autoencoded:
    """Images through their codes and back, and how well that went.

    `loss = reconstruction + pull * codebook + commitment * commitment`, weighed as `cfg` says; the terms are means over
    images of squared differences, averaged over an image's pixels or latent numbers, the last two summed over levels:
    of each level's entry from what it quantizes, and of the latent from what all levels so far add up to. The decoder's
    gradient reaches the encoder straight through the quantizer.
    """
    latent_RZ = _latent_rows(params, images_BCHW, cfg)
    found = codebook.quantize(latent_RZ, _books(params, cfg))
    images, back_BCHW = images_BCHW.shape[0], _decoded(params, codebook.straight_through(latent_RZ, found), cfg)
    terms = {"reconstruction": codebook.per_item(back_BCHW - images_BCHW, images), **codebook.item_terms(found, images)}
    total = terms["reconstruction"].total + cfg.commitment * terms["commitment"].total
    total = total + cfg.pull * terms["codebook"].total if cfg.pull else total
    mean = Mean(total, terms["codebook"].count)
    return Autoencoded(mean, terms, _numbered(found, cfg), back_BCHW, found)


def usage(codes: Tensor, cfg: VqConfig) -> Tensor:
    """How often each entry of each level is used, `[Q, K]` float32."""
    return codebook.usage(codes, levels=cfg.depth, entries=cfg.codes)


def latents(params: Any, images_BCHW: Tensor, *, cfg: VqConfig) -> Tensor:
    """What each level quantizes of images `[B, C, H, W]`, as it is compared with the level's codebook: `[Q, R, Z]`.

    R are the places of all images, one image after the other. No gradient. ValueError for images of another size.
    """
    return codebook.quantize(_latent_rows(params, images_BCHW, cfg).detach(), _books(params, cfg)).left_QRZ


def _check(images_BCHW: Tensor, cfg: VqConfig) -> Tensor:
    expected = (cfg.channels, cfg.size, cfg.size)
    if images_BCHW.ndim != 4 or tuple(images_BCHW.shape[1:]) != expected:
        raise ValueError(f"images must be [B, {', '.join(map(str, expected))}], got {list(images_BCHW.shape)}")
    if not images_BCHW.is_floating_point():
        raise ValueError(f"images are {images_BCHW.dtype}: give floating numbers in [-1, 1], such as x / 127.5 - 1")
    return images_BCHW


def _books(params: Any, cfg: VqConfig) -> Tensor:
    return F.normalize(params["codebooks_QKZ"], dim=-1) if cfg.normalise else params["codebooks_QKZ"]


def latent_grid(params: Any, images_BCHW: Tensor, *, cfg: VqConfig) -> Tensor:
    """The encoder's latents `[B, Z, h, w]`, of the width of codes, before they are normed or quantized.

    ValueError for images of another size.
    """
    grid_BZhw = picture_networks.encode(params["encoder"], _check(images_BCHW, cfg), cfg.network)
    return conv(params["to_code"], grid_BZhw) if cfg.latent else grid_BZhw


def _latent_rows(params: Any, images_BCHW: Tensor, cfg: VqConfig) -> Tensor:
    """The encoder's rows `[R, Z]` as they are compared with the codebooks."""
    rows_RZ = latent_grid(params, images_BCHW, cfg=cfg).permute(0, 2, 3, 1).flatten(0, 2)
    return F.normalize(rows_RZ, dim=-1) if cfg.normalise else rows_RZ


def _decoded(params: Any, rows_RZ: Tensor, cfg: VqConfig) -> Tensor:
    """Images `[B, C, H, W]` of what is quantized, `[R, Z]`."""
    code_BZhw = rows_RZ.unflatten(0, (-1, cfg.grid, cfg.grid)).permute(0, 3, 1, 2)
    grid_BZhw = conv(params["from_code"], code_BZhw) if cfg.latent else code_BZhw
    return picture_networks.decode(params["decoder"], grid_BZhw, cfg.network, guide_BZhw=code_BZhw)


def _numbered(found: Quantized, cfg: VqConfig) -> Tensor:
    return codebook.numbered(found.codes_QR, cfg.grid**2, cfg.codes)
