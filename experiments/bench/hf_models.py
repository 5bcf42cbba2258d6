"""Twins: one configuration and one set of weights as a Hugging Face model and as a tree of our parameters."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from modules.attention import AttentionConfig
from modules.decoder import DecoderConfig
from modules.moe import MoEConfig
from modules.spec import map_with_paths

ROPE_BASE = 10_000.0


@dataclass(frozen=True)
class Shape:
    """A decoder's sizes; with `experts` > 0 each layer has that many, of which a token uses `top_k`."""

    vocab: int
    d_model: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    d_hidden: int
    experts: int = 0
    top_k: int = 0


def our_config(shape: Shape) -> DecoderConfig:
    """Llama-like, or with experts Qwen3-MoE-like."""
    s = shape
    heads = AttentionConfig(
        s.d_model, heads=s.heads, kv_heads=s.kv_heads, head_dim=s.head_dim, qk_norm=s.experts > 0, rope_base=ROPE_BASE
    )
    experts = MoEConfig(s.d_model, s.d_hidden, experts=s.experts, top_k=s.top_k) if s.experts else None
    hidden = 0 if s.experts else s.d_hidden
    return DecoderConfig(s.vocab, s.d_model, s.layers, attention=heads, d_hidden=hidden, moe=experts)


def hf_model(shape: Shape) -> Any:
    """The same as a transformers model in training mode, float32, with that library's defaults for everything else."""
    import transformers

    s = shape
    common: dict[str, Any] = {
        "vocab_size": s.vocab,
        "hidden_size": s.d_model,
        "num_hidden_layers": s.layers,
        "num_attention_heads": s.heads,
        "num_key_value_heads": s.kv_heads,
        "head_dim": s.head_dim,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": ROPE_BASE},
        "use_cache": False,
    }
    if not s.experts:
        llama = transformers.LlamaConfig(**common, intermediate_size=s.d_hidden, tie_word_embeddings=False)
        return transformers.LlamaForCausalLM._from_config(llama).float().train()
    qwen = transformers.Qwen3MoeConfig(
        **common,
        intermediate_size=s.d_hidden,
        moe_intermediate_size=s.d_hidden,
        num_experts=s.experts,
        num_experts_per_tok=s.top_k,
        norm_topk_prob=True,
        output_router_logits=True,
        tie_word_embeddings=False,
    )
    return transformers.Qwen3MoeForCausalLM._from_config(qwen).float().train()


def our_parameters(weights: Mapping[str, Tensor], cfg: DecoderConfig) -> dict[str, Any]:
    """Copies of transformers' named parameters as our tree: their linear weights are `[out, in]`, ours `[in, out]`."""
    tree = {
        "embedding": {"table_VD": weights["model.embed_tokens.weight"]},
        "layers": [_layer(weights, f"model.layers.{i}", cfg) for i in range(cfg.layers)],
        "norm": {"weight_D": weights["model.norm.weight"]},
        "head": {"w_DV": weights["lm_head.weight"].T},
    }
    return map_with_paths(lambda _, x: x.detach().clone(memory_format=torch.contiguous_format), tree)


def _layer(weights: Mapping[str, Tensor], at: str, cfg: DecoderConfig) -> dict[str, Any]:
    tree: dict[str, Any] = {
        "attention_norm": {"weight_D": weights[f"{at}.input_layernorm.weight"]},
        "attention": _attention(weights, f"{at}.self_attn", cfg),
        "mlp_norm": {"weight_D": weights[f"{at}.post_attention_layernorm.weight"]},
    }
    if cfg.moe is None:
        names = {"w_gate_DF": "gate_proj", "w_up_DF": "up_proj", "w_down_FD": "down_proj"}
        tree["mlp"] = {ours: weights[f"{at}.mlp.{theirs}.weight"].T for ours, theirs in names.items()}
        return tree
    gate_EFD, up_EFD = weights[f"{at}.mlp.experts.gate_up_proj"].chunk(2, dim=1)
    tree["moe"] = {
        "w_router_DE": weights[f"{at}.mlp.gate.weight"].T,
        "w_gate_EDF": gate_EFD.mT,
        "w_up_EDF": up_EFD.mT,
        "w_down_EFD": weights[f"{at}.mlp.experts.down_proj"].mT,
    }
    return tree


def _attention(weights: Mapping[str, Tensor], at: str, cfg: DecoderConfig) -> dict[str, Tensor]:
    dims = {"q": "DHK", "k": "DGK", "v": "DGK", "o": "HKD"}
    tree = {f"w_{x}_{dim}": weights[f"{at}.{x}_proj.weight"].T for x, dim in dims.items()}
    if cfg.attention.qk_norm:
        tree |= {f"{x}_norm_K": weights[f"{at}.{x}_norm.weight"] for x in "qk"}
    return tree
