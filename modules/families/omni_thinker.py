"""What the thinkers of Qwen's omni models have in common: models that see and hear, in folders of their own or in those
of whole models, beside a talker.

A whole model's `config.json` has the thinker's entries in `thinker_config`, and its tensors are called `thinker.` and
as in a folder of the thinker alone; those of its other parts are left alone. Beside the decoder and the tower of
pictures (`ftrain.modules.families.vision_language`) there is a tower of sound, `audio_tower.`.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ftrain.modules.audio_tower import AudioTowerConfig
from ftrain.modules.families.audio_names import audio_names
from ftrain.modules.families.vision_language import Shapes, TowerNames, media_of, text_names, text_of, tower_names
from ftrain.modules.hf_fields import Config, agreed, number, require_understood, size
from ftrain.modules.hf_names import Names, natural_order
from ftrain.modules.pictures import MediaConfig
from ftrain.modules.sounds import SoundConfig
from ftrain.modules.vision_language import VisionLanguageConfig
from ftrain.modules.vision_tower import TowerConfig

OTHERS = ("talker.", "token2wav.", "code2wav.")
"""What tensors of the other parts of a whole model begin with."""
_PART = "thinker."
_KINDS = ("audio", "image", "video")
_OWN = (
    *(f"{kind}_token_{end}" for kind in _KINDS for end in ("id", "index")),
    *("audio_config", "audio_end_token_id", "audio_start_token_id", "ignore_index", "init_std"),
    *("position_id_per_seconds", "seconds_per_chunk", "user_token_id"),
    *(f"tts_text_{end}_token_id" for end in ("end", "pad", "start")),
)
_SAYS_NOTHING = ("init_std",)
_OF_SOUND = (
    "activation_function", "d_model", "encoder_attention_heads", "encoder_ffn_dim", "encoder_layers", "init_std",
    "max_source_positions", "n_window", "num_hidden_layers", "num_mel_bins", "output_dim",
)  # fmt: skip


def thinker_of(config: Config) -> Config:
    """The thinker's entries of a `config.json`, its own or a whole model's. ValueError where they are no object."""
    inner = config.get("thinker_config")
    if inner is None and not str(config.get("model_type")).endswith("_thinker"):
        raise ValueError("config.json: thinker_config is missing, what the thinker is made of")
    if inner is not None and not isinstance(inner, Mapping):
        raise ValueError(f"config.json: thinker_config={inner!r} must be an object")
    return config if inner is None else inner


def text_entries(thinker: Config, *, nothing: tuple[str, ...] = ()) -> dict[str, Any]:
    """The decoder's entries, but for those called `nothing`, which say nothing. ValueError as `text_of`."""
    found = text_of({name: value for name, value in thinker.items() if name not in _OWN})
    return {name: value for name, value in found.items() if name not in (*_SAYS_NOTHING, *nothing)}


def without(thinker: Config, nothing: tuple[str, ...]) -> dict[str, Any]:
    """The thinker's entries, its tower of pictures without entries called `nothing`."""
    vision = thinker.get("vision_config")
    if not isinstance(vision, Mapping):
        return dict(thinker)
    kept = {name: value for name, value in vision.items() if name not in (*_SAYS_NOTHING, *nothing)}
    return {**thinker, "vision_config": kept}


def audio_of(thinker: Config, *, chunk: int, read: tuple[str, ...] = ()) -> Config:
    """The entries of the tower of sound, "chunk" being the frames of a chunk, of which there are `chunk` where nothing
    is said; `read`: those that a family has beside the others.

    ValueError for one that says something and is not known.
    """
    audio = thinker.get("audio_config")
    if not isinstance(audio, Mapping):
        raise ValueError(f"config.json: audio_config={audio!r} must be an object, what the tower of sound is made of")
    require_understood(audio, (*_OF_SOUND, *read))
    if audio.get("activation_function", "gelu") != "gelu":
        raise ValueError(f"config.json: audio_config.activation_function={audio['activation_function']!r}, not 'gelu'")
    return {**audio, "chunk": 2 * size(audio, "n_window", chunk // 2)}


def audio_tower_of(audio: Config, **own: Any) -> AudioTowerConfig:
    """The tower of sound that `audio_of` has read; `own`: what a family has. ValueError names what does not fit."""
    made = AudioTowerConfig(
        size(audio, "d_model", 1280),
        layers=agreed(audio, "encoder_layers", "num_hidden_layers") or 32,
        heads=size(audio, "encoder_attention_heads", 20),
        d_hidden=size(audio, "encoder_ffn_dim", 5120),
        chunk=audio["chunk"],
        mels=size(audio, "num_mel_bins", 128),
        d_out=size(audio, "output_dim", 3584),
        init_std=number(audio, "initializer_range", 0.02),
        **own,
    )
    places = size(audio, "max_source_positions", 1500)
    if made.rows > places:
        raise ValueError(
            f"config.json: audio_config.max_source_positions={places} is less than the {made.rows} rows of a chunk"
        )
    return made


def omni_media_of(
    thinker: Config, tower: TowerConfig, hears: AudioTowerConfig, *, exact: bool = False, seconds: int | None = None
) -> MediaConfig:
    """What the thinker asks of its media. `exact`: places in time are no whole numbers; `seconds`: of the stretches by
    which the tokens of a video and its sound are mixed, where nothing is said; None: they are mixed by time.

    ValueError for an id that is none.
    """
    ids = {
        kind: size({"id": agreed(thinker, f"{kind}_token_id", f"{kind}_token_index")}, "id", usual)
        for kind, usual in zip(_KINDS, (151646, 151655, 151656), strict=True)
    }
    rate = number(thinker, "position_id_per_seconds", 25.0)
    stretch = None if seconds is None else int(rate * number(thinker, "seconds_per_chunk", seconds))
    sound = SoundConfig(hears, ids["audio"], size(thinker, "audio_start_token_id", 151647), stretch)
    named = {"image_token_id": ids["image"], "video_token_id": ids["video"], "text_after_video": "max"}
    return media_of(named, tower, per_second=rate, sound=sound, exact=exact)


def thinker_names(
    cfg: VisionLanguageConfig, shapes: Shapes, pictures: TowerNames, out: tuple[tuple[str, str], ...]
) -> Names:
    """The tensors of a thinker, called as those of these shapes are. `pictures`: how its tower of them calls its parts;
    `out`: the linear maps behind its tower of sound, as (theirs, ours).
    """
    assert cfg.media.sound is not None
    found = [
        *text_names(cfg.text, "model."),
        *tower_names(cfg.media.tower, "visual.", pictures),
        *audio_names(cfg.media.sound.tower, "audio_tower.", "audio", out),
    ]
    whole = any(name.startswith(_PART) for name in shapes)
    called = [replace(one, name=f"{_PART}{one.name}") for one in found] if whole else found
    return tuple(sorted(called, key=natural_order))
