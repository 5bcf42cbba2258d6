"""Qwen3.5's text models: Qwen3-Next with a matrix for each input of a delta net, and an MLP or experts in every layer.

Source: Qwen team, Qwen3.5 (2026).
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
_ALWAYS = {"attn_output_gate": (True,), "output_gate_type": ("swish", "silu"), "mamba_ssm_dtype": ("float32",)}
"""Entries of published files that say what models of the family always do."""
_AHEAD = ("mtp_num_hidden_layers", "mtp_use_dedicated_embeddings")
"""Of a module of multi-token prediction, which neither transformers nor the library computes."""

DENSE = Facts("Qwen3.5", (*_BOTH, "intermediate_size"), apart=True, kv_heads=4, hidden=12_288, experts=0, top_k=0)
MIXTURE = Facts("Qwen3.5-MoE", (*_BOTH, *_EXPERTS), apart=True, kv_heads=2, hidden=0, experts=256, top_k=8)


def config(config: Config) -> DecoderConfig:
    """The decoder that a `config.json` of Qwen3.5's text models describes. ValueError names an entry that it cannot
    follow.
    """
    return decoder_of(of_text(config), DENSE)


def mixture_config(config: Config) -> DecoderConfig:
    """The same with experts: Qwen3.5-MoE. ValueError as `config`."""
    return decoder_of(of_text(config), MIXTURE)


def of_text(config: Config) -> Config:
    """The entries of a text model without what only pictures need, and what it does in any case. ValueError for an
    entry that says something else.
    """
    for name, values in _ALWAYS.items():
        if config.get(name, values[0]) not in (*values, None):
            raise ValueError(f"config.json: {name}={config[name]!r}; Qwen3.5 computes {values[0]!r} here")
    said = {place: config[place] for place in ("rope_parameters", "rope_scaling") if config.get(place)}
    kept = {name: x for name, x in config.items() if name not in (*_ALWAYS, *_AHEAD)}
    return {**kept, **{place: _without_axes(part) for place, part in said.items()}}


def _without_axes(said: object) -> object:
    return {name: x for name, x in said.items() if name not in _AXES} if isinstance(said, Mapping) else said


FAMILY, MIXED_FAMILY = TextFamily(config, names), TextFamily(mixture_config, names)
