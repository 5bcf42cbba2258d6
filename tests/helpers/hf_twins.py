"""Tiny models of transformers with random weights, and the configurations of ours that compute the same."""

import dataclasses
from typing import Any

import torch

from ftrain.modules import decoder, spec
from ftrain.modules.attention import AttentionConfig
from ftrain.modules.decoder import DecoderConfig
from ftrain.modules.moe import MoEConfig
from tests.helpers.hf_decoders import random_model

V, D, F = 99, 48, 80
COMMON = {
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": F,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
}
ROUTED = {"num_experts": 12, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
ATTENTION = AttentionConfig(D, heads=4, kv_heads=2, head_dim=12, rope_base=5000.0, norm_eps=1e-5)
BASE = DecoderConfig(vocab=V, d_model=D, layers=2, attention=ATTENTION, d_hidden=F, norm_eps=1e-5, init_std=0.5)
MOE = MoEConfig(D, 20, experts=12, top_k=2)


def _with(**attention: Any) -> DecoderConfig:
    return dataclasses.replace(BASE, attention=dataclasses.replace(ATTENTION, **attention))


QWEN3 = _with(head_dim=16, qk_norm=True)
FAMILIES: dict[str, tuple[str, dict[str, Any], DecoderConfig]] = {
    "llama": ("Llama", {}, BASE),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}, dataclasses.replace(BASE, tie_embeddings=True)),
    "llama-biases": ("Llama", {"attention_bias": True}, _with(bias=True, out_bias=True)),
    "mistral": ("Mistral", {"sliding_window": 5}, _with(window=5)),
    "qwen2": ("Qwen2", {}, _with(bias=True)),
    "qwen3-tied": (
        "Qwen3",
        {"head_dim": 16, "tie_word_embeddings": True},
        dataclasses.replace(QWEN3, tie_embeddings=True),
    ),
    "mixtral": (
        "Mixtral",
        {"num_local_experts": 12, "num_experts_per_tok": 2},
        dataclasses.replace(BASE, moe=MoEConfig(D, F, experts=12, top_k=2), d_hidden=0),
    ),
    "qwen3-moe": (
        "Qwen3Moe",
        {"head_dim": 16, "norm_topk_prob": True, **ROUTED},
        dataclasses.replace(QWEN3, moe=MOE, d_hidden=0),
    ),
    "qwen3-moe-dense-first": (
        "Qwen3Moe",
        {"head_dim": 16, "mlp_only_layers": [0], "num_hidden_layers": 11, **ROUTED},
        dataclasses.replace(QWEN3, moe=dataclasses.replace(MOE, normalize=False), dense_layers=1, layers=11),
    ),
}


def build(family: str, dtype: torch.dtype = torch.float32) -> tuple[Any, DecoderConfig]:
    """A model of transformers with random weights, and our configuration."""
    name, options, cfg = FAMILIES[family]
    return random_model(name, {**COMMON, **options}).to(dtype).eval(), cfg


def specs(cfg: DecoderConfig, dtype: torch.dtype) -> Any:
    """The specs of a decoder, all in one dtype."""
    return spec.map_with_paths(lambda _, leaf: dataclasses.replace(leaf, dtype=dtype), decoder.specs(cfg))
