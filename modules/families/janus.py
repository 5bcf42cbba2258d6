"""Janus and Janus-Pro by what transformers writes: their `config.json` and the names of their tensors.

Sources: Wu et al., arXiv 2410.13848; Chen et al., arXiv 2501.17811.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from ftrain.modules.families.family import tensors
from ftrain.modules.families.image_text import KINDS, picture_tensors
from ftrain.modules.families.picture_codecs import codec_tensors, janus_codec
from ftrain.modules.families.vision_language import text_names
from ftrain.modules.hf_config import decoder_config
from ftrain.modules.hf_fields import Config, number, require_understood, size
from ftrain.modules.hf_names import HfTensor, Names
from ftrain.modules.janus import JanusConfig
from ftrain.modules.picture_encoder import PictureConfig

_VISION = (
    "attention_bias", "depth", "hidden_act", "hidden_size", "image_size", "layer_norm_eps", "mlp_ratio",
    "num_attention_heads", "num_channels", "num_hidden_layers", "num_image_tokens", "patch_size", "projection_dim",
)  # fmt: skip


def config(config: Config) -> JanusConfig:
    """The model that a `config.json` of Janus describes. ValueError names an entry that it cannot follow."""
    require_understood(config, ("text_config", "vision_config", "vq_config", "tie_word_embeddings"))
    parts = {name: config.get(name) for name in ("text_config", "vision_config", "vq_config")}
    for name, part in parts.items():
        if not isinstance(part, Mapping):
            raise ValueError(f"config.json: {name}={part!r} must be an object")
    text: Any = parts["text_config"]
    vision: Any = parts["vision_config"]
    codes: Any = parts["vq_config"]
    if text.get("model_type", "llama") != "llama":
        raise ValueError(f"config.json: text_config.model_type={text['model_type']!r}: Janus's decoder is a 'llama'")
    tied = config.get("tie_word_embeddings", True)
    found = decoder_config({"model_type": "llama", **text, "tie_word_embeddings": tied})
    picture = _picture(vision)
    grid = picture.side
    for where, width in _widths(vision, codes).items():
        if width != found.d_model:
            raise ValueError(f"config.json: {where}={width}, and the decoder is {found.d_model} wide")
    if size(vision, "num_image_tokens", 576) != grid**2:
        raise ValueError(f"config.json: num_image_tokens={vision.get('num_image_tokens')} of {grid} x {grid} patches")
    for part in (vision, codes):
        if part.get("hidden_act", "gelu") != "gelu":
            raise ValueError(f"config.json: hidden_act={part['hidden_act']!r}; the aligners of Janus compute 'gelu'")
    return JanusConfig(
        text=found,
        picture=picture,
        codec=janus_codec(codes, grid=grid),
        image=size(config, "image_token_id", 100581),
        aligner=size(vision, "depth", 2),
        code_aligner=size(codes, "num_hidden_layers", 2),
        d_head=size(codes, "projection_dim", 2048),
    )


def _picture(vision: Config) -> PictureConfig:
    require_understood(vision, _VISION)
    if vision.get("attention_bias") is False:
        raise ValueError("config.json: vision_config.attention_bias=false: this encoder's attention has biases")
    width = size(vision, "hidden_size", 1024)
    return PictureConfig(
        d_model=width,
        layers=size(vision, "num_hidden_layers", 24),
        heads=size(vision, "num_attention_heads", 16),
        d_hidden=int(width * number(vision, "mlp_ratio", 4.0)),
        size=size(vision, "image_size", 384),
        patch=size(vision, "patch_size", 16),
        channels=size(vision, "num_channels", 3),
        mlp_kind=KINDS["gelu"],
        eps=number(vision, "layer_norm_eps", 1e-6),
    )


def _widths(vision: Config, codes: Config) -> dict[str, int]:
    """What must be as wide as the decoder."""
    return {
        "vision_config.projection_dim": size(vision, "projection_dim", 2048),
        "vq_config.projection_dim": size(codes, "projection_dim", 2048),
        "vq_config.image_token_embed_dim": size(codes, "image_token_embed_dim", 2048),
    }


def names(cfg: JanusConfig) -> Names:
    """The tensors of Janus."""
    text = text_names(cfg.text, "model.language_model.")
    body = [name for name in text if not name.name.startswith("lm_head")]
    return (
        *picture_tensors(cfg.picture, "model.vision_model", "vision", out="projection_layer"),
        *_aligner("model.aligner", "aligner", cfg.aligner),
        *codec_tensors(cfg.codec, "model.vqmodel", "codec"),
        HfTensor("model.generation_embeddings.weight", "codes_CZ"),
        *_aligner("model.generation_aligner", "code_aligner", cfg.code_aligner),
        *_linear("model.generation_head.proj_out", "head.up"),
        *_linear("model.generation_head.vision_head", "head.out"),
        *body,
        *(name for name in text if name.name.startswith("lm_head")),
    )


def _aligner(there: str, here: str, layers: int) -> Iterator[HfTensor]:
    for i in range(layers):
        yield from _linear(f"{there}.hidden_layers.{i - 1}" if i else f"{there}.fc1", f"{here}.{i}")


def _linear(there: str, here: str) -> Iterator[HfTensor]:
    yield HfTensor(f"{there}.weight", f"{here}.w", transposed=True)
    yield from tensors(there, here, [("bias", "b")])
