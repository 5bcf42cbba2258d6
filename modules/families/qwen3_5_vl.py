"""Qwen3.5: the tower of Qwen3-VL, but no deep layers, before the text models of Qwen3.5, with an MLP or with experts.

Places on three axes are of the attention layers alone; delta nets read the order of tokens. Experts of a layer are one
tensor each, as transformers saves them, or two for all, as they are published. What a folder holds of a module of
multi-token prediction is kept as it is. Source: Qwen team, Qwen3.5 (2026).
"""

from collections.abc import Mapping
from functools import partial

from ftrain.modules.families import qwen3_5, qwen3_next, qwen3_vl
from ftrain.modules.families.qwen3_next import Facts
from ftrain.modules.families.vision_language import Shapes, VisionLanguageFamily, media_of, on_three_axes, text_of
from ftrain.modules.hf_fields import Config, agreed
from ftrain.modules.hf_names import Names, natural_order
from ftrain.modules.vision_language import VisionLanguageConfig

SECTIONS = (11, 11, 10)
_IDS = {"image_token_id": 248_056, "video_token_id": 248_057}
"""What transformers takes for entries that are not there."""


def config(config: Config) -> VisionLanguageConfig:
    """The model that a `config.json` of Qwen3.5 describes. ValueError names an entry that it cannot follow."""
    return _model(config, qwen3_5.DENSE)


def mixture_config(config: Config) -> VisionLanguageConfig:
    """The same with experts: Qwen3.5-MoE. ValueError as `config`."""
    return _model(config, qwen3_5.MIXTURE)


def laid(config: Config, cfg: VisionLanguageConfig, shapes: Shapes) -> VisionLanguageConfig:
    """With one weight for the gates and ups of a layer's experts where a folder has them as one tensor."""
    fused = any(name.endswith(".mlp.experts.gate_up_proj") for name in shapes)
    return _model(config, qwen3_5.MIXTURE, fused=True) if fused else cfg


def _model(config: Config, facts: Facts, *, fused: bool = False) -> VisionLanguageConfig:
    said = text_of(config)
    placed = partial(on_three_axes, section=_section(said), interleaved=True)
    text = qwen3_next.decoder_of(qwen3_5.of_text(said), facts, fused=fused, placed=placed)
    ids = {name: usual for name, usual in _IDS.items() if config.get(name) is None}
    return VisionLanguageConfig(text, media_of({**config, **ids}, qwen3_vl.tower(config, deep=False), split=True))


def _section(text: Config) -> object:
    places = ("rope_parameters", "rope_scaling")
    said = {place: text[place].get("mrope_section") for place in places if isinstance(text.get(place), Mapping)}
    return agreed(said, *said) or SECTIONS


def names(cfg: VisionLanguageConfig, shapes: Shapes) -> Names:
    """The tensors of Qwen3.5, which have had one spelling."""
    del shapes
    return tuple(sorted(qwen3_vl.parts(cfg, qwen3_next.names), key=natural_order))


_AHEAD = ("mtp.",)
FAMILY = VisionLanguageFamily(config, names, others=_AHEAD)
MIXED_FAMILY = VisionLanguageFamily(mixture_config, names, laid, others=_AHEAD)
