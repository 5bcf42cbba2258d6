"""The thinker of Qwen3-Omni: Qwen3-VL's decoder with experts and its tower, and a tower of sound (AuT) in chunks of one
second, eight to a window.

Places in time are of seconds, and no whole numbers; the tokens of a video and its sound are mixed by time. Source: Qwen
team, Qwen3-Omni (arXiv 2509.17765).
"""

from ftrain.modules.audio_tower import AudioTowerConfig
from ftrain.modules.families import qwen2_vl, qwen3_vl
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
from ftrain.modules.families.vision_language import Shapes, TowerNames, VisionLanguageFamily, decoder_of
from ftrain.modules.hf_fields import Config, size
from ftrain.modules.hf_names import Names
from ftrain.modules.vision_language import VisionLanguageConfig

_MISSING = {
    "num_key_value_heads": 4, "norm_topk_prob": True, "num_experts": 128, "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
}  # fmt: skip
_ROPE_BASE = 1e6
_IGNORED = ("apply_vit_abs_pos_embed", "image_size", "tokens_per_second")
_CALLED = TowerNames((("linear_fc1", "up"), ("linear_fc2", "down")), qwen2_vl.MERGER, deep="merger_list")
_OUT = (("proj1", "up_DF"), ("proj2", "out_FV"))
_ROWS = 13
"""Rows of a whole chunk, which transformers counts whatever a chunk is."""


def config(config: Config) -> VisionLanguageConfig:
    """The thinker that a `config.json` of Qwen3-Omni or of its thinker describes. ValueError names an entry that it
    cannot follow.
    """
    thinker = without(thinker_of(config), _IGNORED)
    text = decoder_of(
        text_entries(thinker, nothing=("use_qk_norm",)),
        like="qwen3_moe",
        missing=_MISSING,
        rope_base=_ROPE_BASE,
        interleaved=True,
        sections=qwen3_vl.SECTIONS,
    )
    media = omni_media_of(thinker, qwen3_vl.tower(thinker), _hears(thinker), exact=True)
    return VisionLanguageConfig(text, media)


def _hears(thinker: Config) -> AudioTowerConfig:
    audio = audio_of(thinker, chunk=100, read=("conv_chunksize", "downsample_hidden_size", "n_window_infer"))
    window, chunk = size(audio, "n_window_infer", 800), audio["chunk"]
    if window < chunk:
        raise ValueError(f"config.json: audio_config.n_window_infer={window} is less than a chunk, {chunk} frames")
    tower = audio_tower_of(
        audio,
        window=window // chunk,
        channels=size(audio, "downsample_hidden_size", 480),
        key_bias=True,
        deep_out=True,
    )
    if tower.rows != _ROWS:
        raise ValueError(
            f"config.json: audio_config.n_window={chunk // 2} makes {tower.rows} rows of a chunk, and files of this "
            f"family have {_ROWS} tokens for each: n_window must be from 49 to 52"
        )
    return tower


def names(cfg: VisionLanguageConfig, shapes: Shapes) -> Names:
    """The tensors of the thinker, called as those of these shapes are."""
    return thinker_names(cfg, shapes, _CALLED, _OUT)


FAMILY = VisionLanguageFamily(config, names, others=OTHERS)
