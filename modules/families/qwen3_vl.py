"""Qwen3-VL: a tower with a learned table of places, whose deep layers the decoder reads too, and axes in turns.

Source: Qwen team, Qwen3-VL (arXiv 2511.21631).
"""

import math
from collections.abc import Callable

from ftrain.modules.decoder_config import DecoderConfig
from ftrain.modules.families.vision_language import (
    Shapes,
    TowerNames,
    VisionLanguageFamily,
    decoder_of,
    media_of,
    text_names,
    text_of,
    tower_names,
    tower_of,
    vision_of,
)
from ftrain.modules.hf_fields import Config, size
from ftrain.modules.hf_names import HfTensor, Names, decoder_names
from ftrain.modules.pictures import MediaConfig
from ftrain.modules.vision_language import VisionLanguageConfig
from ftrain.modules.vision_tower import TowerConfig

ROPE_BASE, SECTIONS = 5e5, (24, 20, 20)
"""What transformers takes for entries of the decoder that are not there."""
_DEEP = "deepstack_visual_indexes"
_READ = ("intermediate_size", "num_position_embeddings", "out_hidden_size")
_CALLED = TowerNames(mlp=(("linear_fc1", "up"), ("linear_fc2", "down")), merger=("norm", "linear_fc1", "linear_fc2"))


def config(config: Config) -> VisionLanguageConfig:
    """The model that a `config.json` of Qwen3-VL describes. ValueError names an entry that it cannot follow."""
    text = decoder_of(
        text_of(config), like="qwen3", missing={}, rope_base=ROPE_BASE, interleaved=True, sections=SECTIONS
    )
    return VisionLanguageConfig(text, media(config))


def media(config: Config) -> MediaConfig:
    """What a model of this family sees, with experts or without. ValueError names an entry that it cannot follow."""
    return media_of(config, tower(config), split=True)


def tower(config: Config, *, deep: bool = True) -> TowerConfig:
    """The tower; `deep`: of a family whose decoder may read deep layers. ValueError names an entry that it cannot
    follow.
    """
    vision = vision_of(config, (*_READ, _DEEP) if deep else _READ)
    places, read = size(vision, "num_position_embeddings", 2304), vision.get(_DEEP)
    side = math.isqrt(places)
    if side**2 != places:
        raise ValueError(f"config.json: vision_config.num_position_embeddings={places} places are no square table")
    return tower_of(
        {"depth": 27, **vision},
        patch=16,
        act="gelu_pytorch_tanh",
        d_model=size(vision, "hidden_size", 1152),
        d_hidden=size(vision, "intermediate_size", 4304),
        d_out=size(vision, "out_hidden_size", 3584),
        patch_bias=True,
        side=side,
        deep_layers=tuple((8, 16, 24) if read is None and deep else read or ()),
    )


def parts(cfg: VisionLanguageConfig, text: Callable[[DecoderConfig], Names] = decoder_names) -> list[HfTensor]:
    """The tensors but for those of a decoder's own layers, in the order of transformers' modules. `text`: names of the
    family of text models.
    """
    return [
        *tower_names(cfg.media.tower, "model.visual.", _CALLED),
        *text_names(cfg.text, "model.language_model.", text),
    ]


def names(cfg: VisionLanguageConfig, shapes: Shapes) -> Names:
    """The tensors of Qwen3-VL, which have had one spelling."""
    del shapes
    return tuple(parts(cfg))


FAMILY = VisionLanguageFamily(config, names)
