"""What speaks in whole models (Qwen3-Omni, Qwen2.5-Omni) by the `model_type` of their `config.json`: talkers, and what
plays their codes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from ftrain.modules.families import (
    qwen2_5_omni_talker,
    qwen2_5_omni_token2wav,
    qwen3_omni_code2wav,
    qwen3_omni_talker,
)
from ftrain.modules.families import qwen2_5_omni_token2wav_files as token2wav_files
from ftrain.modules.families.vision_language import Shapes
from ftrain.modules.hf_fields import Config, size
from ftrain.modules.hf_names import Names
from ftrain.modules.spec import Tree
from ftrain.modules.speech_lines import ChatIds
from ftrain.modules.talker import Talker
from ftrain.modules.vision_language import VisionLanguageConfig

PREFIX = "talker."
"""What a talker's tensors in the folder of a whole model begin with."""


_TURNS = {
    "turn": ("im_start", 151644),
    "end_of_turn": ("im_end", 151645),
    "user": ("user", 872),
    "assistant": ("assistant", 77091),
}


@dataclass(frozen=True)
class Player:
    """What makes waves of a talker's codes: the `part` of a whole model, of whose configuration `config` makes ours;
    `specs(cfg)` and `names(cfg, prefix=)` are those of its parameters. `config` raises ValueError.
    """

    part: str
    config: Callable[[Config], Any]
    specs: Callable[[Any], Tree]
    names: Callable[..., Names]

    def of(self, config: Config) -> Any:
        """Its configuration, of a whole model's. ValueError where that has none, or one that it cannot follow."""
        found = config.get(f"{self.part}_config")
        if not isinstance(found, Mapping):
            raise ValueError(f"config.json: {self.part}_config={found!r} must be an object, what makes waves of codes")
        return self.config(found)


@dataclass(frozen=True)
class TalkerFamily:
    """A family of talkers.

    - `talker(config, thinker, shapes)`: the talker of a whole model's `config.json`, whose thinker was read, and its
      names in a folder of tensors of these shapes. ValueError names an entry that it cannot follow.
    - `player`: what makes waves of its codes.
    """

    talker: Callable[[Config, VisionLanguageConfig, Shapes], tuple[Talker, Names]]
    player: Player


def _qwen3(config: Config, thinker: VisionLanguageConfig, shapes: Shapes) -> tuple[Talker, Names]:
    cfg = qwen3_omni_talker.config(_of_talker(config), shapes=shapes, prefix=PREFIX)
    _require_width(cfg.d_thinker, thinker)
    chat = _ids(config, {"begin": ("tts_bos", 151672), "end": ("tts_eos", 151673), "pad": ("tts_pad", 151671)}, _TURNS)
    return qwen3_omni_talker.talker(cfg, chat), qwen3_omni_talker.names(cfg, shapes, prefix=PREFIX)


def _qwen2_5(config: Config, thinker: VisionLanguageConfig, shapes: Shapes) -> tuple[Talker, Names]:
    del shapes
    told = _of_talker(config)
    cfg = qwen2_5_omni_talker.config(told)
    _require_width(cfg.d_thinker, thinker)
    words = {"begin": ("tts_text_start", 151860), "end": ("tts_text_end", 151861), "pad": ("tts_text_pad", 151859)}
    # of turns files of this family say nothing; whose tokenizer has other ids gives the entries of Qwen3-Omni
    said = {f"{name}_token_id": told.get(f"{name}_token_id") for name, _ in words.values()}
    chat = _ids({**config, **said}, words, _TURNS)
    made = qwen2_5_omni_talker.talker(cfg, chat, layer=thinker.text.layers, words=thinker.text.vocab)
    return made, qwen2_5_omni_talker.names(cfg, prefix=PREFIX)


def _ids(config: Config, *named: Mapping[str, tuple[str, int]]) -> ChatIds:
    """Ids of the thinker by the names of `ChatIds`, of entries called so and "_token_id", with what is usual."""
    usual = {own: told for names in named for own, told in names.items()}
    return ChatIds(**{own: size(config, f"{name}_token_id", default) for own, (name, default) in usual.items()})


def _of_talker(config: Config) -> Mapping[str, Any]:
    found = config.get("talker_config")
    if not isinstance(found, Mapping) or config.get("enable_audio_output") is False:
        raise ValueError(
            f"config.json: enable_audio_output={config.get('enable_audio_output')!r} with talker_config "
            f"{'an object' if isinstance(found, Mapping) else repr(found)}: the model has no talker"
        )
    return found


def _require_width(width: int, thinker: VisionLanguageConfig) -> None:
    if width != thinker.text.d_model:
        raise ValueError(
            f"config.json: the talker reads rows {width} wide, and the thinker's are {thinker.text.d_model}"
        )


_CODE2WAV = Player("code2wav", qwen3_omni_code2wav.config, qwen3_omni_code2wav.specs, qwen3_omni_code2wav.names)
_TOKEN2WAV = Player("token2wav", token2wav_files.config, qwen2_5_omni_token2wav.specs, token2wav_files.names)
TALKERS: Mapping[str, TalkerFamily] = MappingProxyType(
    {
        "qwen3_omni_moe": TalkerFamily(_qwen3, _CODE2WAV),
        "qwen2_5_omni": TalkerFamily(_qwen2_5, _TOKEN2WAV),
    }
)
"""By `model_type`."""
