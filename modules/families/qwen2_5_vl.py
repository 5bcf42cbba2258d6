"""Qwen2.5-VL: as Qwen2-VL, with RMS norms and gates in the tower, windows in most of its layers, and time in seconds.

Source: Bai et al., arXiv 2502.13923.
"""

from ftrain.modules.families import qwen2_vl
from ftrain.modules.families.vision_language import (
    Shapes,
    TowerNames,
    VisionLanguageFamily,
    decoder_of,
    media_of,
    text_of,
    tower_of,
    vision_of,
)
from ftrain.modules.hf_fields import Config, number, size
from ftrain.modules.hf_names import Names
from ftrain.modules.vision_language import VisionLanguageConfig
from ftrain.modules.vision_tower import TowerConfig

_READ = ("fullatt_block_indexes", "intermediate_size", "out_hidden_size", "tokens_per_second", "window_size")
CALLED = TowerNames((("gate_proj", "gate"), ("up_proj", "up"), ("down_proj", "down")), qwen2_vl.MERGER)
"""How the tower calls its parts."""


def config(config: Config) -> VisionLanguageConfig:
    """The model that a `config.json` of Qwen2.5-VL describes. ValueError names an entry that it cannot follow."""
    said = text_of(config, tied_inside=True)
    text = decoder_of(said, like="qwen2", missing=qwen2_vl.MISSING, rope_base=qwen2_vl.ROPE_BASE)
    rate = number(vision_of(config, _READ), "tokens_per_second", 4.0)
    return VisionLanguageConfig(text, media_of(config, tower(config), per_second=rate))


def tower(config: Config, *, joint: bool = True) -> TowerConfig:
    """The tower, whose queries, keys and values are one projection if `joint`. ValueError names an entry that it cannot
    follow.
    """
    vision = vision_of(config, _READ)
    token = size(vision, "patch_size", 14) * size(vision, "spatial_merge_size", 2)
    window = size(vision, "window_size", 112)
    if window < token:
        raise ValueError(f"config.json: vision_config.window_size={window} is less than a token, {token} pixels a side")
    full = vision.get("fullatt_block_indexes")
    return tower_of(
        vision,
        act="silu",
        gated=True,
        d_model=size(vision, "hidden_size", 3584),
        d_hidden=size(vision, "intermediate_size", 3420),
        d_out=size(vision, "out_hidden_size", 3584),
        norm_kind="rms",
        window=window // token,
        full_layers=tuple((7, 15, 23, 31) if full is None else full),
        joint=joint,
    )


def names(cfg: VisionLanguageConfig, shapes: Shapes) -> Names:
    """The tensors of Qwen2.5-VL, called as those of these shapes are."""
    return qwen2_vl.sorted_names(cfg, shapes, CALLED)


FAMILY = VisionLanguageFamily(config, names)
