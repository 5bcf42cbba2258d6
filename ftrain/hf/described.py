"""The model that a `config.json` from anybody describes: its entries checked, its counts bounded by what is there.

Work and memory grow with the number of layers and experts, long before a weight is looked for.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

from ftrain.files.outside import Shape, check, either, flag, listed, number, one_of, record, text, whole
from ftrain.modules.decoder import DecoderConfig
from ftrain.modules.hf_config import decoder_config


def _maybe(shape: Shape) -> Shape:
    return either(one_of(None), shape)


_ROPE = record(
    {},
    optional={
        "rope_theta": _maybe(number(1e-6)),
        "rope_type": _maybe(text()),
        "type": _maybe(text()),
        "factor": _maybe(number()),
        "low_freq_factor": _maybe(number()),
        "high_freq_factor": _maybe(number()),
        "original_max_position_embeddings": _maybe(whole(1)),
        "partial_rotary_factor": _maybe(number()),
    },
    others=True,
)
_LAYERS = ("num_hidden_layers", "num_nextn_predict_layers")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_COUNT, _REAL, _FLAG = _maybe(whole(1, 2**40)), _maybe(number(0.0)), _maybe(flag)
_CONFIG = record(
    {"model_type": text()},
    optional={
        **dict.fromkeys(("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"), _COUNT),
        **dict.fromkeys(("num_key_value_heads", "head_dim", "intermediate_size", "moe_intermediate_size"), _COUNT),
        **dict.fromkeys(
            ("num_experts", "num_local_experts", "n_routed_experts", "num_experts_per_tok", "sliding_window"), _COUNT
        ),
        "num_nextn_predict_layers": _maybe(whole(0, 2**40)),
        **dict.fromkeys(("rms_norm_eps", "initializer_range", "router_aux_loss_coef"), _REAL),
        **dict.fromkeys(("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window"), _FLAG),
        "norm_topk_prob": _FLAG,
        "rope_theta": _maybe(number(1e-6)),
        "rope_parameters": _maybe(_ROPE),
        "rope_scaling": _maybe(_ROPE),
        "decoder_sparse_step": _COUNT,
        "mlp_only_layers": _maybe(listed(whole())),
        "layer_types": _maybe(listed(text())),
        "hidden_act": text(),
    },
    others=True,
)

_VISION = record(
    {},
    optional={
        **dict.fromkeys(("depth", "hidden_size", "embed_dim", "out_hidden_size", "num_heads", "patch_size"), _COUNT),
        **dict.fromkeys(
            ("spatial_merge_size", "temporal_patch_size", "in_channels", "in_chans", "window_size"), _COUNT
        ),
        **dict.fromkeys(("intermediate_size", "num_position_embeddings"), _COUNT),
        **dict.fromkeys(("mlp_ratio", "tokens_per_second", "initializer_range"), _REAL),
        **dict.fromkeys(("fullatt_block_indexes", "deepstack_visual_indexes"), _maybe(listed(whole()))),
        "hidden_act": text(),
    },
    others=True,
)
_PART = record(
    {},
    optional={
        **dict.fromkeys(("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"), _COUNT),
        **dict.fromkeys(("vocab_size", "max_position_embeddings", "projection_dim", "projection_size"), _COUNT),
        **dict.fromkeys(("image_size", "patch_size", "num_channels", "num_image_tokens", "depth"), _COUNT),
        **dict.fromkeys(("embed_dim", "num_embeddings", "latent_channels", "base_channels", "num_res_blocks"), _COUNT),
        **dict.fromkeys(("num_key_value_heads", "head_dim"), _COUNT),
        **dict.fromkeys(("layer_norm_eps", "rms_norm_eps", "mlp_ratio"), _REAL),
        "rope_theta": _maybe(number(1e-6)),
        "rope_parameters": _maybe(_ROPE),
        "rope_scaling": _maybe(_ROPE),
        "channel_multiplier": _maybe(listed(whole(1, 2**20))),
        "hidden_act": text(),
    },
    others=True,
)
_SOUND_LAYERS = ("encoder_layers", "num_hidden_layers")
_AUDIO = record(
    {},
    optional={
        **dict.fromkeys((*_SOUND_LAYERS, "d_model", "encoder_attention_heads", "encoder_ffn_dim"), _COUNT),
        **dict.fromkeys(("n_window", "n_window_infer", "num_mel_bins", "output_dim", "max_source_positions"), _COUNT),
        **dict.fromkeys(("downsample_hidden_size", "conv_chunksize"), _COUNT),
        "activation_function": text(),
    },
    others=True,
)
_THINKER = record(
    {},
    optional={
        **dict.fromkeys(("position_id_per_seconds", "seconds_per_chunk"), _REAL),
        **dict.fromkeys(("text_config", "vision_config", "audio_config"), _maybe(record({}, others=True))),
    },
    others=True,
)
Described = TypeVar("Described")
"""What a rule makes of a configuration."""


def described_decoder(
    config: Mapping[str, Any],
    shown: str,
    *,
    layers: int,
    experts: int | None,
    describe: Callable[[Mapping[str, Any]], DecoderConfig] = decoder_config,
) -> DecoderConfig:
    """The decoder of the configuration in the file `shown`, which can have no more `layers` and `experts` of a layer
    than this (None: any number, where experts are one tensor). `describe`: the rule of its family. ValueError names the
    file and the entry.
    """
    check(config, _CONFIG, shown)
    _require_held(config, dict.fromkeys(_LAYERS, layers), shown)
    if experts is not None:
        _require_held(config, dict.fromkeys(_EXPERTS, experts), shown)
    return _described(config, shown, describe)


def described_with_sight(
    config: Mapping[str, Any], shown: str, *, layers: int, describe: Callable[[Mapping[str, Any]], Described]
) -> Described:
    """The language model with towers of the configuration in the file `shown`, as `described_decoder`.

    `layers`: the most that the decoder and each tower can have. ValueError names the file and the entry.
    """
    own = config.get("thinker_config") or config
    check(own, _THINKER, shown)
    text, vision, audio = own.get("text_config") or own, own.get("vision_config") or {}, own.get("audio_config") or {}
    check(text, _CONFIG, shown)
    check(vision, _VISION, f"{shown}, vision_config")
    check(audio, _AUDIO, f"{shown}, audio_config")
    _require_held(text, {"num_hidden_layers": layers}, shown)
    _require_held(vision, {"depth": layers}, f"{shown}, vision_config")
    _require_held(audio, dict.fromkeys(_SOUND_LAYERS, layers), f"{shown}, audio_config")
    return _described(config, shown, describe)


def described_in_parts(
    config: Mapping[str, Any],
    shown: str,
    *,
    layers: int,
    describe: Callable[[Mapping[str, Any]], Described],
    parts: Collection[str],
) -> Described:
    """The model of the configuration in the file `shown`, whose encoders and decoder are described in entries of the
    names `parts`, each of no more than `layers` layers, as `described_decoder`. ValueError names the file and the
    entry.
    """
    for name in parts:
        part, where = config.get(name) or {}, f"{shown}, {name}"
        check(part, _PART, where)
        _require_held(part, {"num_hidden_layers": layers, "num_res_blocks": layers, "depth": layers}, where)
    return _described(config, shown, describe)


def _require_held(config: Mapping[str, Any], bounds: Mapping[str, int], shown: str) -> None:
    for field, most in bounds.items():
        found = config.get(field) or 0
        if found > most:
            raise ValueError(
                f"{shown}: {field} is {found:,}, and there are weights of no more than {most:,}: give the config.json "
                "that belongs to these weights"
            )


def _described(config: Mapping[str, Any], shown: str, describe: Callable[[Mapping[str, Any]], Described]) -> Described:
    try:
        return describe(config)
    except ValueError as error:
        raise ValueError(f"{shown}: {str(error).removeprefix('config.json: ')}") from error
