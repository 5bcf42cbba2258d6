"""Images out of a foundation: it predicts the codes of a VQ tokenizer one after the other, and they are decoded.

How codes enter and leave the foundation is modules/code_decoder.py; the tokenizer is modules/vq_image.py.

Legend: B images, N codes of one image, n rows, D foundation width, C distinct codes.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ftrain.modules import code_decoder, vq_image
from ftrain.modules.code_decoder import IGNORE, Codec, lm_embed, lm_head, lm_logits
from ftrain.modules.omni import Decoder, Row
from ftrain.modules.vq_image import VqConfig

__all__ = [
    "IGNORE", "ImageDecoderConfig", "codec", "decoder", "lm_embed", "lm_encode", "lm_head", "lm_logits", "specs",
]  # fmt: skip


@dataclass(frozen=True)
class ImageDecoderConfig:
    """The tokenizer `vq` and the width `d_model` of the foundation."""

    vq: VqConfig
    d_model: int
    init_std: float = 0.02


def codec(vq: VqConfig) -> Codec:
    """The tokenizer of images float32 `[C, size, size]`."""
    return Codec(
        specs=vq_image.specs(vq),
        encode=lambda params, images_BCHW: vq_image.encode(params, images_BCHW, cfg=vq),
        decode=lambda params, codes_BN: vq_image.decode(params, codes_BN, cfg=vq),
        target=Row((vq.channels, vq.size, vq.size), "float32"),
        codes=vq.codes_per_image,
        vocabulary=vq.vocabulary,
    )


def specs(cfg: ImageDecoderConfig) -> dict[str, Any]:
    """`tokenizer` (frozen), `codes_CD` and `places_ND` (embeddings), `head_DC`."""
    return code_decoder.specs(codec(cfg.vq), cfg.d_model, init_std=cfg.init_std)


def lm_encode(params: Any, images_BCHW: Tensor, *, cfg: ImageDecoderConfig) -> tuple[Tensor, Tensor]:
    """Target images `[B, C, H, W]` to rows of the stream `[B*N, D]` (in the dtype of the embeddings) and codes `[B*N]`,
    int64; no gradient reaches the tokenizer. ValueError for images of another size than the tokenizer's.
    """
    return code_decoder.lm_encode(params, images_BCHW, codec=codec(cfg.vq))


def decoder(cfg: ImageDecoderConfig, *, begin: int, end: int) -> Decoder:
    """The modality for `OmniModel`; `begin` and `end` are token ids. Targets are float32 `[C, size, size]`."""
    return code_decoder.decoder(codec(cfg.vq), cfg.d_model, init_std=cfg.init_std, begin=begin, end=end)
