"""Qwen3.5's text models: Qwen3-Next with a matrix for each input of a delta net, and an MLP or experts in every layer.

The folders of its vision-language models are described by a `text_config` within another configuration; they are
refused, since their text alone, saved, would be without the tower of vision. Source: Qwen team, Qwen3.5 (2026).
"""

from collections.abc import Mapping

from ftrain.modules import hf_rope
from ftrain.modules.decoder_config import DecoderConfig
from ftrain.modules.families.family import TextFamily
from ftrain.modules.families.qwen3_next import Facts, decoder_of, names
from ftrain.modules.hf_fields import Config

_BOTH = (
    "attention_bias", "attention_dropout", "full_attention_interval", "head_dim", "hidden_act", "hidden_size",
    "layer_types", "linear_conv_kernel_dim", "linear_key_head_dim", "linear_num_key_heads", "linear_num_value_heads",
    "linear_value_head_dim", "num_attention_heads", "num_hidden_layers", "num_key_value_heads", "quantization_config",
    "rms_norm_eps", "tie_word_embeddings", *hf_rope.READ,
)  # fmt: skip
_EXPERTS = ("moe_intermediate_size", "num_experts", "num_experts_per_tok", "shared_expert_intermediate_size")
_AXES = ("mrope_section", "mrope_interleaved")
"""How positions of pictures are rotated: of text all three axes are one."""

_DENSE = Facts("Qwen3.5", (*_BOTH, "intermediate_size"), apart=True, kv_heads=4, hidden=12_288, experts=0, top_k=0)
_MIXTURE = Facts("Qwen3.5-MoE", (*_BOTH, *_EXPERTS), apart=True, kv_heads=2, hidden=0, experts=256, top_k=8)


def config(config: Config) -> DecoderConfig:
    """The decoder that a `config.json` of Qwen3.5's text models describes. ValueError names an entry that it cannot
    follow.
    """
    return decoder_of(_of_text(config), _DENSE)


def mixture_config(config: Config) -> DecoderConfig:
    """The same with experts: Qwen3.5-MoE. ValueError as `config`."""
    return decoder_of(_of_text(config), _MIXTURE)


def _of_text(config: Config) -> Config:
    """The configuration without what only pictures need. ValueError for that of a vision-language model."""
    if "text_config" in config:
        kind = config.get("model_type")
        raise ValueError(
            f"config.json: text_config: {kind} sees pictures, and the library computes its text alone: open it with "
            'task="image_text_to_text", or save its text as a folder of its own (transformers\' AutoModelForCausalLM, '
            "save_pretrained)"
        )
    said = {place: config[place] for place in ("rope_parameters", "rope_scaling") if config.get(place)}
    return {**config, **{place: _without_axes(part) for place, part in said.items()}}


def _without_axes(said: object) -> object:
    return {name: x for name, x in said.items() if name not in _AXES} if isinstance(said, Mapping) else said


FAMILY, MIXTURE = TextFamily(config, names), TextFamily(mixture_config, names)
