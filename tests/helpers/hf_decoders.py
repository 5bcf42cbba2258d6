"""Decoders of transformers with random weights, our configurations of them, and their weights as our trees, by hand."""

import dataclasses

import torch
import transformers

from ftrain.kernels.rope import Llama3Scaling
from ftrain.modules.attention import AttentionConfig
from ftrain.modules.decoder import DecoderConfig
from ftrain.modules.moe import MoEConfig

V, D, F, T = 99, 48, 80, 40
COMMON = {
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": F,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "pad_token_id": 0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "output_router_logits": True}
ATTENTION = AttentionConfig(D, heads=4, kv_heads=2, head_dim=12, rope_base=5000.0, norm_eps=1e-5)
BASE = DecoderConfig(vocab=V, d_model=D, layers=3, attention=ATTENTION, d_hidden=F, norm_eps=1e-5)
QWEN3 = dataclasses.replace(ATTENTION, head_dim=16, qk_norm=True)
MOE = MoEConfig(D, 20, experts=6, top_k=2)
WEIGHTS, BIASES = ("DHK", "DGK", "DGK", "HKD"), ("HK", "GK", "GK")
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
FAMILIES = {
    "llama": ("Llama", {}, BASE),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}, dataclasses.replace(BASE, tie_embeddings=True)),
    "llama-3.1": (
        "Llama",
        {"rope_parameters": {"rope_theta": 5000.0, **LLAMA3}},
        dataclasses.replace(
            BASE, attention=dataclasses.replace(ATTENTION, rope_scaling=Llama3Scaling(8.0, 1.0, 4.0, 32))
        ),
    ),
    "mistral": (
        "Mistral",
        {"sliding_window": 5},
        dataclasses.replace(BASE, attention=dataclasses.replace(ATTENTION, window=5)),
    ),
    "qwen2": ("Qwen2", {}, dataclasses.replace(BASE, attention=dataclasses.replace(ATTENTION, bias=True))),
    "qwen3": ("Qwen3", {"head_dim": 16}, dataclasses.replace(BASE, attention=QWEN3)),
    "qwen3-moe": (
        "Qwen3Moe",
        {"head_dim": 16, "norm_topk_prob": True, **EXPERTS},
        dataclasses.replace(BASE, attention=QWEN3, moe=MOE),
    ),
    "qwen3-moe-unnormalised": (
        "Qwen3Moe",
        {"head_dim": 16, "norm_topk_prob": False, "mlp_only_layers": [0], **EXPERTS},
        dataclasses.replace(BASE, attention=QWEN3, moe=dataclasses.replace(MOE, normalize=False), dense_layers=1),
    ),
}


def random_model(name, options):
    """A decoder of transformers with random weights everywhere, biases and norms too, in float32."""
    config = getattr(transformers, f"{name}Config")(**options)
    model = getattr(transformers, f"{name}ForCausalLM")._from_config(config, attn_implementation="eager")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for path, param in model.named_parameters():
            param.copy_(float("norm" in path) + torch.randn(param.shape, generator=generator) * 0.15)
    return model.float()


def build(family):
    """A model of transformers with random weights, and our configuration."""
    name, options, cfg = FAMILIES[family]
    return random_model(name, {**COMMON, **options}).train(), cfg


def converted(weights, cfg):
    """Our tree of parameters from transformers' named tensors (or their gradients): weights are transposed."""

    def linear(name):
        return weights[f"{name}.weight"].T

    def attention(at):
        tree = {f"w_{x}_{dims}": linear(f"{at}.{x}_proj") for x, dims in zip("qkvo", WEIGHTS, strict=True)}
        if cfg.attention.bias:
            tree |= {f"b_{x}_{dims}": weights[f"{at}.{x}_proj.bias"] for x, dims in zip("qkv", BIASES, strict=True)}
        if cfg.attention.qk_norm:
            tree |= {f"{x}_norm_K": weights[f"{at}.{x}_norm.weight"] for x in "qk"}
        return tree

    def layer(i):
        at = f"model.layers.{i}"
        tree = {
            "attention_norm": {"weight_D": weights[f"{at}.input_layernorm.weight"]},
            "attention": attention(f"{at}.self_attn"),
            "mlp_norm": {"weight_D": weights[f"{at}.post_attention_layernorm.weight"]},
        }
        if not cfg.has_experts(i):
            names = {"w_gate_DF": "gate_proj", "w_up_DF": "up_proj", "w_down_FD": "down_proj"}
            return tree | {"mlp": {ours: linear(f"{at}.mlp.{theirs}") for ours, theirs in names.items()}}
        gate_EFD, up_EFD = weights[f"{at}.mlp.experts.gate_up_proj"].chunk(2, dim=1)
        experts = {
            "w_router_DE": linear(f"{at}.mlp.gate"),
            "w_gate_EDF": gate_EFD.mT,
            "w_up_EDF": up_EFD.mT,
            "w_down_EFD": weights[f"{at}.mlp.experts.down_proj"].mT,
        }
        return tree | {"moe": experts}

    tree = {
        "embedding": {"table_VD": weights["model.embed_tokens.weight"]},
        "layers": [layer(i) for i in range(cfg.layers)],
        "norm": {"weight_D": weights["model.norm.weight"]},
    }
    return tree if cfg.tie_embeddings else {**tree, "head": {"w_DV": linear("lm_head")}}
