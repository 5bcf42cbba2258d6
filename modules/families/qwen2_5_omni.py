"""The thinker of Qwen2.5-Omni: Qwen2.5-VL's decoder and tower, and a tower of sound in chunks of two seconds.

Places in time are of seconds for pictures and sound alike; the tokens of a video and its sound are mixed by stretches
of two seconds. Source: Qwen team, Qwen2.5-Omni (arXiv 2503.20215).
"""

from ftrain.modules.families import qwen2_5_vl
from ftrain.modules.families.omni_thinker import (
    OTHERS,
    audio_of,
    audio_tower_of,
    omni_media_of,
    text_entries,
    thinker_names,
    thinker_of,
    without,
)
from ftrain.modules.families.vision_language import Shapes, VisionLanguageFamily, decoder_of
from ftrain.modules.hf_fields import Config
from ftrain.modules.hf_names import Names
from ftrain.modules.vision_language import VisionLanguageConfig

_MISSING = {"num_key_value_heads": 4}
_ROPE_BASE = 1e6
_OUT = (("proj", "out_FV"),)


def config(config: Config) -> VisionLanguageConfig:
    """The thinker that a `config.json` of Qwen2.5-Omni or of its thinker describes. ValueError names an entry that it
    cannot follow.
    """
    thinker = without(thinker_of(config), ("embed_dim",))
    text = decoder_of(text_entries(thinker), like="qwen2", missing=_MISSING, rope_base=_ROPE_BASE)
    tower = qwen2_5_vl.tower(thinker, joint=False)
    hears = audio_tower_of(audio_of(thinker, chunk=200), paired=True, marks=2)
    return VisionLanguageConfig(text, omni_media_of(thinker, tower, hears, seconds=2))


def names(cfg: VisionLanguageConfig, shapes: Shapes) -> Names:
    """The tensors of the thinker, called as those of these shapes are."""
    return thinker_names(cfg, shapes, qwen2_5_vl.CALLED, _OUT)


FAMILY = VisionLanguageFamily(config, names, others=OTHERS)
