"""Qwen2-VL: a tower of layer norms over patches of any picture, and a Qwen2 decoder with places on three axes.

Source: Wang et al., arXiv 2409.12191.
"""

from ftrain.modules.families.vision_language import (
    Shapes,
    TowerNames,
    VisionLanguageFamily,
    decoder_of,
    is_nested,
    media_of,
    text_names,
    text_of,
    tower_names,
    tower_of,
    vision_of,
)
from ftrain.modules.hf_fields import Config, number, size
from ftrain.modules.hf_names import Names, natural_order
from ftrain.modules.vision_language import VisionLanguageConfig

MISSING = {"num_key_value_heads": 8, "rms_norm_eps": 1e-5}
ROPE_BASE = 1e6
"""What transformers takes for entries of the decoder that are not there."""
MERGER = ("ln_q", "mlp.0", "mlp.2")
_CALLED = TowerNames((("fc1", "up"), ("fc2", "down")), MERGER)


def config(config: Config) -> VisionLanguageConfig:
    """The model that a `config.json` of Qwen2-VL describes. ValueError names an entry that it cannot follow."""
    text = decoder_of(text_of(config, tied_inside=True), like="qwen2", missing=MISSING, rope_base=ROPE_BASE)
    vision = vision_of(config, ("embed_dim", "mlp_ratio"))
    width = size(vision, "embed_dim", 1280)
    tower = tower_of(
        vision,
        act="quick_gelu",
        d_model=width,
        d_hidden=int(width * number(vision, "mlp_ratio", 4.0)),
        d_out=size(vision, "hidden_size", 3584),
    )
    return VisionLanguageConfig(text, media_of(config, tower))


def names(cfg: VisionLanguageConfig, shapes: Shapes) -> Names:
    """The tensors of Qwen2-VL, called as those of these shapes are."""
    return sorted_names(cfg, shapes, _CALLED)


def sorted_names(cfg: VisionLanguageConfig, shapes: Shapes, called: TowerNames) -> Names:
    """The tensors of Qwen2-VL or Qwen2.5-VL: transformers sorts all names where it may have to change them."""
    visual, body = ("model.visual.", "model.language_model.") if is_nested(shapes) else ("visual.", "model.")
    found = [*text_names(cfg.text, body), *tower_names(cfg.media.tower, visual, called)]
    return tuple(sorted(found, key=natural_order))


FAMILY = VisionLanguageFamily(config, names)
