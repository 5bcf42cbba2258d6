"""Whisper's encoder (Radford et al. 2022): a tower of sound for chunks of 30 seconds, with a table of places.

Families that hear with it lay their recordings in chunks of its length (`ftrain.modules.sound_media`).
"""

from ftrain.modules.audio_tower import AudioTowerConfig
from ftrain.modules.families.audio_names import audio_names
from ftrain.modules.hf_fields import Config, number, size
from ftrain.modules.hf_names import Names


def encoder_config(config: Config) -> AudioTowerConfig:
    """The encoder that a `config.json` of Whisper describes; entries of its decoder are not looked at.

    ValueError names an entry that it cannot follow.

    >>> from ftrain.modules.families.whisper import encoder_config
    >>> encoder_config({"d_model": 1280, "encoder_attention_heads": 20, "num_mel_bins": 128}).chunk
    3000
    """
    if config.get("activation_function", "gelu") != "gelu":
        raise ValueError(f"config.json: activation_function={config['activation_function']!r}, not 'gelu'")
    for name in ("dropout", "attention_dropout", "activation_dropout", "encoder_layerdrop", "scale_embedding"):
        if config.get(name):
            raise ValueError(f"config.json: {name}={config[name]!r}: the encoder drops and scales nothing")
    return AudioTowerConfig(
        size(config, "d_model", 384),
        layers=size(config, "encoder_layers", 4),
        heads=size(config, "encoder_attention_heads", 6),
        d_hidden=size(config, "encoder_ffn_dim", 1536),
        chunk=2 * size(config, "max_source_positions", 1500),
        mels=size(config, "num_mel_bins", 80),
        table=True,
        init_std=number(config, "init_std", 0.02),
    )


def encoder_names(cfg: AudioTowerConfig, prefix: str = "model.encoder.", here: str = "audio") -> Names:
    """The tensors of the encoder at the path `here`, in a folder of the whole of Whisper or with another prefix."""
    return tuple(audio_names(cfg, prefix, here, (), last_norm="layer_norm"))
