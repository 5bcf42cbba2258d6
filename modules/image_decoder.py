"""Images out of a foundation: it predicts the codes of a VQ tokenizer one after the other, and they are decoded.

In the stream a code is its embedding plus a learned embedding of its place in the image; the head is a linear map of
the hidden state before it. The tokenizer (modules/vq_image.py) is trained beforehand and frozen here: only its codes
enter.

Legend: B images, N codes of one image, n rows, D foundation width, C distinct codes.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ftrain.kernels.embedding import embedding
from ftrain.kernels.linear_cross_entropy import linear_cross_entropy
from ftrain.kernels.mean import Mean
from ftrain.modules import vq_image
from ftrain.modules.omni import Decoder, Row
from ftrain.modules.spec import Normal, ParamSpec
from ftrain.modules.vq_image import VqConfig

IGNORE = -100


@dataclass(frozen=True)
class ImageDecoderConfig:
    """The tokenizer `vq` and the width `d_model` of the foundation."""

    vq: VqConfig
    d_model: int
    init_std: float = 0.02


def specs(cfg: ImageDecoderConfig) -> dict[str, Any]:
    """`tokenizer` (frozen), `codes_CD` and `places_ND` (embeddings), `head_DC`."""
    d, codes, places, init = cfg.d_model, cfg.vq.vocabulary, cfg.vq.codes_per_image, Normal(cfg.init_std)
    return {
        "tokenizer": vq_image.specs(cfg.vq),
        "codes_CD": ParamSpec((codes, d), ("codebook", "embed"), init),
        "places_ND": ParamSpec((places, d), ("position", "embed"), init),
        "head_DC": ParamSpec((d, codes), ("embed", "codebook"), init),
    }


def lm_encode(params: Any, images_BCHW: Tensor, *, cfg: ImageDecoderConfig) -> tuple[Tensor, Tensor]:
    """Target images `[B, C, H, W]` to rows of the stream `[B*N, D]` (in the dtype of the embeddings) and codes `[B*N]`,
    int64; no gradient reaches the tokenizer. ValueError for images of another size than the tokenizer's.
    """
    codes_BN = vq_image.encode(params["tokenizer"], images_BCHW, cfg=cfg.vq)
    return lm_embed(params, codes_BN), codes_BN.flatten()


def lm_embed(params: Any, codes_BN: Tensor) -> Tensor:
    """Codes `[B, N]` to rows of the stream `[B*N, D]`."""
    rows_BND = embedding(codes_BN.flatten(), params["codes_CD"]).unflatten(0, tuple(codes_BN.shape))
    return (rows_BND + params["places_ND"]).flatten(0, 1)


def lm_head(params: Any, hidden_nD: Tensor, codes_n: Tensor) -> Mean:
    """Cross entropy in nats of each code given the hidden state before it; codes of -100 count nothing."""
    total = linear_cross_entropy(hidden_nD, params["head_DC"], codes_n, ignore_index=IGNORE)
    return Mean(total, (codes_n != IGNORE).to(torch.float32).sum())


def lm_logits(params: Any, hidden_nD: Tensor) -> Tensor:
    """Scores of every code given the hidden state before it, `[n, C]`."""
    return hidden_nD @ params["head_DC"]


def decoder(cfg: ImageDecoderConfig, *, begin: int, end: int) -> Decoder:
    """The modality for `OmniModel`; `begin` and `end` are token ids. Targets are float32 `[C, size, size]`."""
    vq = cfg.vq
    return Decoder(
        specs=specs(cfg),
        lm_encode=lambda params, images_BCHW: lm_encode(params, images_BCHW, cfg=cfg),
        lm_head=lm_head,
        lm_logits=lm_logits,
        lm_embed=lm_embed,
        lm_generate=lambda params, codes_BN: vq_image.decode(params["tokenizer"], codes_BN, cfg=vq),
        target=Row((vq.channels, vq.size, vq.size), "float32"),
        codes_per_target=vq.codes_per_image,
        begin=begin,
        end=end,
        frozen=("tokenizer",),
    )
