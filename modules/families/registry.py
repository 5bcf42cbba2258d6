"""Which family a `config.json` is of: of text models, of those that see, of pairs of encoders."""

from types import MappingProxyType

from ftrain.modules.families import (
    deepseek_v3,
    gpt_oss,
    image_text,
    qwen2_5_omni,
    qwen2_5_vl,
    qwen2_vl,
    qwen3_5,
    qwen3_5_vl,
    qwen3_next,
    qwen3_omni,
    qwen3_vl,
    qwen3_vl_moe,
)
from ftrain.modules.families.family import TextFamily
from ftrain.modules.families.image_text import ImageTextFamily
from ftrain.modules.families.vision_language import VisionLanguageFamily
from ftrain.modules.hf_config import decoder_config
from ftrain.modules.hf_fields import Config
from ftrain.modules.hf_names import decoder_names

PLAIN = TextFamily(decoder_config, decoder_names)
"""Llama and its relatives: the decoder as it is (`ftrain.modules.hf_config.FAMILIES`)."""

FAMILIES = MappingProxyType(
    {
        "gpt_oss": gpt_oss.FAMILY,
        "deepseek_v3": deepseek_v3.FAMILY,
        "qwen3_next": qwen3_next.FAMILY,
        "qwen3_5_text": qwen3_5.FAMILY,
        "qwen3_5_moe_text": qwen3_5.MIXED_FAMILY,
    }
)
"""Those with layers of their own, by `model_type`."""

SEEING = MappingProxyType(
    {
        "qwen2_vl": qwen2_vl.FAMILY,
        "qwen2_5_vl": qwen2_5_vl.FAMILY,
        "qwen3_vl": qwen3_vl.FAMILY,
        "qwen3_vl_moe": qwen3_vl_moe.FAMILY,
        "qwen3_5": qwen3_5_vl.FAMILY,
        "qwen3_5_moe": qwen3_5_vl.MIXED_FAMILY,
        "qwen2_5_omni": qwen2_5_omni.FAMILY,
        "qwen2_5_omni_thinker": qwen2_5_omni.FAMILY,
        "qwen3_omni_moe": qwen3_omni.FAMILY,
        "qwen3_omni_moe_thinker": qwen3_omni.FAMILY,
    }
)
"""Those that see, and those that hear too, by `model_type`; of whole omni models the thinker."""

PAIRED = MappingProxyType({"clip": image_text.CLIP, "siglip": image_text.SIGLIP})
"""Pairs of encoders of pictures and texts, by `model_type`."""


def family_of(config: Config) -> TextFamily:
    """The family by `model_type`; that of plain decoders for any other type, which its `config` may refuse.

    >>> from ftrain.modules.families.registry import family_of
    >>> family_of({"model_type": "gpt_oss"}).stacked
    True
    """
    kind = config.get("model_type")
    return FAMILIES.get(kind, PLAIN) if isinstance(kind, str) else PLAIN


def seeing_family_of(config: Config) -> VisionLanguageFamily | None:
    """The family of language models that see, by `model_type`; None for any other."""
    kind = config.get("model_type")
    return SEEING.get(kind) if isinstance(kind, str) else None


def paired_family_of(config: Config) -> ImageTextFamily | None:
    """The family of pairs of encoders of pictures and texts, by `model_type`; None for any other."""
    kind = config.get("model_type")
    return PAIRED.get(kind) if isinstance(kind, str) else None
