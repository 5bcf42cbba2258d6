"""A VQ tokenizer of short sounds: their log-mel frames, a few at a time, through codebooks in levels.

A clip of fixed length is cut into places of some frames each. The networks are residual blocks over places (a norm, a
convolution of three places, GELU, a linear map) between two linear maps; each place then has a code of every level
(modules/codebook.py). The loss is squared error of the mel frames: no perceptual or adversarial term.

Legend: B clips, F mel frames of a clip, M mel bands, P places of a clip, W network width; Q levels, N = Q * P codes of
a clip; K entries of a level's codebook, Z their width, R latent rows (B * P).
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ftrain.kernels.mean import Mean
from ftrain.modules import codebook, linear, norm
from ftrain.modules.codebook import Quantized, quantize


@dataclass(frozen=True)
class VqAudioConfig:
    """Clips of `frames` frames of `mels` bands, `span` frames to a place; `blocks` residual blocks of `width` on either
    side of `depth` codebooks of `codes` entries of width `d_code`.

    `commitment` weighs the pull of the encoder towards its codes.

    Raises:
        ValueError: `frames` are not whole places, or there are fewer than 2 codes or than 1 level.
    """

    frames: int
    mels: int
    span: int = 8
    width: int = 128
    blocks: int = 2
    codes: int = 128
    d_code: int = 16
    depth: int = 4
    commitment: float = 0.25

    def __post_init__(self) -> None:
        if self.span < 1 or self.frames < 1 or self.frames % self.span:
            raise ValueError(f"VqAudioConfig: frames={self.frames} are not whole places of span={self.span}")
        if self.codes < 2 or self.depth < 1:
            raise ValueError(f"VqAudioConfig: codes={self.codes}, depth={self.depth}: need at least 2 codes, 1 level")

    @property
    def places(self) -> int:
        """P."""
        return self.frames // self.span

    @property
    def codes_per_clip(self) -> int:
        """N."""
        return self.depth * self.places

    @property
    def vocabulary(self) -> int:
        """Distinct codes: level q's are q * K and on."""
        return self.depth * self.codes


def specs(cfg: VqAudioConfig) -> dict[str, Any]:
    """`encoder`, `codebooks_QKZ`, `decoder`."""
    frames = cfg.span * cfg.mels
    return {
        "encoder": _stack_specs(frames, cfg.d_code, cfg),
        "codebooks_QKZ": codebook.specs(cfg.depth, cfg.codes, cfg.d_code),
        "decoder": _stack_specs(cfg.d_code, frames, cfg),
    }


def encode(params: Any, mels_BFM: Tensor, *, cfg: VqAudioConfig) -> Tensor:
    """Log-mel clips to codes `[B, N]` int64, level by level, each in order of time; no gradient.

    ValueError for clips of another shape than `[B, frames, mels]`.

    >>> from ftrain.kernels import random
    >>> from ftrain.modules import spec
    >>> cfg = VqAudioConfig(frames=8, mels=4, span=4, width=8, codes=8, d_code=4, depth=2)
    >>> params = spec.init(specs(cfg), random.key(0))
    >>> codes_BN = encode(params, torch.zeros(3, 8, 4), cfg=cfg)
    >>> list(codes_BN.shape), list(decode(params, codes_BN, cfg=cfg).shape)
    ([3, 4], [3, 8, 4])
    """
    with torch.no_grad():
        return _numbered(quantize(_rows(params, mels_BFM, cfg), _books(params)), cfg)


def decode(params: Any, codes_BN: Tensor, *, cfg: VqAudioConfig) -> Tensor:
    """Codes `[B, N]` to log-mel clips `[B, F, M]`, differentiable in the parameters.

    A code of another level than its place's is read as the entry of the same number. ValueError where N is not the
    number of codes of a clip.
    """
    if codes_BN.ndim != 2 or codes_BN.shape[1] != cfg.codes_per_clip:
        raise ValueError(f"decode takes codes [B, {cfg.codes_per_clip}], got {list(codes_BN.shape)}")
    return _clips(params, codebook.rows_of(codes_BN, _books(params)), cfg)


def loss(params: Any, mels_BFM: Tensor, *, cfg: VqAudioConfig) -> tuple[Mean, dict[str, Mean], Tensor]:
    """The training loss (per clip), its terms, and the codes `[B, N]` that were used.

    `loss = reconstruction + codebook + commitment * commitment`; the terms are means over clips of squared differences,
    averaged over a clip's numbers, the last two as `codebook.item_terms`. ValueError for clips of another shape.
    """
    rows_RZ, clips = _rows(params, mels_BFM, cfg), mels_BFM.shape[0]
    found = quantize(rows_RZ, _books(params))
    back_BFM = _clips(params, codebook.straight_through(rows_RZ, found), cfg)
    terms = {"reconstruction": codebook.per_item(back_BFM - mels_BFM, clips), **codebook.item_terms(found, clips)}
    total = terms["reconstruction"].total + terms["codebook"].total + cfg.commitment * terms["commitment"].total
    return Mean(total, terms["codebook"].count), terms, _numbered(found, cfg)


def latents(params: Any, mels_BFM: Tensor, *, cfg: VqAudioConfig) -> Tensor:
    """What each level quantizes of clips `[B, F, M]`: `[Q, R, Z]`, R the places of all clips, one clip after the other.

    No gradient. ValueError for clips of another shape.
    """
    return quantize(_rows(params, mels_BFM, cfg).detach(), _books(params)).left_QRZ


def _numbered(found: Quantized, cfg: VqAudioConfig) -> Tensor:
    return codebook.numbered(found.codes_QR, cfg.places, cfg.codes)


def _books(params: Any) -> Tensor:
    return params["codebooks_QKZ"]


def _rows(params: Any, mels_BFM: Tensor, cfg: VqAudioConfig) -> Tensor:
    """The encoder's rows `[R, Z]`."""
    if mels_BFM.shape[1:] != (cfg.frames, cfg.mels):
        raise ValueError(f"clips must be [B, {cfg.frames}, {cfg.mels}], got {list(mels_BFM.shape)}")
    spans_BPI = mels_BFM.unflatten(1, (cfg.places, cfg.span)).flatten(2)
    return _stack(params["encoder"], spans_BPI).flatten(0, 1)


def _clips(params: Any, rows_RZ: Tensor, cfg: VqAudioConfig) -> Tensor:
    """Rows `[R, Z]` to clips `[B, F, M]`."""
    spans_BPI = _stack(params["decoder"], rows_RZ.unflatten(0, (-1, cfg.places)))
    return spans_BPI.unflatten(2, (cfg.span, cfg.mels)).flatten(1, 2)


def _stack_specs(d_in: int, d_out: int, cfg: VqAudioConfig) -> dict[str, Any]:
    width = cfg.width
    block = {
        "norm": norm.specs(width),
        "taps": linear.specs(3 * width, width, ("embed", "mlp"), bias=True),
        "out": linear.specs(width, width, ("mlp", "embed"), bias=True),
    }
    return {
        "in": linear.specs(d_in, width, (None, "embed"), bias=True),
        "blocks": [block for _ in range(cfg.blocks)],
        "norm": norm.specs(width),
        "out": linear.specs(width, d_out, ("embed", None), bias=True),
    }


def _stack(params: Any, x_BPI: Tensor) -> Tensor:
    """`[B, P, d_in]` to `[B, P, d_out]`."""
    x_BPW = linear.apply(params["in"], x_BPI)
    for block in params["blocks"]:
        hidden = F.gelu(linear.apply(block["taps"], _with_neighbours(norm.apply(block["norm"], x_BPW))))
        x_BPW = x_BPW + linear.apply(block["out"], hidden)
    return linear.apply(params["out"], norm.apply(params["norm"], x_BPW))


def _with_neighbours(x_BPW: Tensor) -> Tensor:
    """Each place between the one before and the one after it, zeros beyond the ends: `[B, P, 3W]`."""
    nothing = torch.zeros_like(x_BPW[:, :1])
    before, after = torch.cat([nothing, x_BPW[:, :-1]], 1), torch.cat([x_BPW[:, 1:], nothing], 1)
    return torch.cat([before, x_BPW, after], 2)
