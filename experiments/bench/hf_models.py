"""Twins: one configuration and one set of weights as a Hugging Face model and as a tree of our parameters."""

import tempfile
from dataclasses import dataclass, replace
from typing import Any

from ftrain.hf import load_hf
from ftrain.modules import decoder
from ftrain.modules.attention import AttentionConfig
from ftrain.modules.decoder import DecoderConfig
from ftrain.modules.hf_names import decoder_names
from ftrain.modules.moe import MoEConfig

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


def with_experts(shape: Shape) -> Shape:
    """The same sizes with 8 experts, each a quarter as wide, of which a token uses 2."""
    return replace(shape, d_hidden=shape.d_hidden // 4, experts=8, top_k=2)


def our_config(shape: Shape) -> DecoderConfig:
    """Llama-like, or with experts Qwen3-MoE-like."""
    s = shape
    heads = AttentionConfig(
        s.d_model, heads=s.heads, kv_heads=s.kv_heads, head_dim=s.head_dim, qk_norm=s.experts > 0, rope_base=ROPE_BASE
    )
    experts = MoEConfig(s.d_model, s.d_hidden, experts=s.experts, top_k=s.top_k) if s.experts else None
    hidden = 0 if s.experts else s.d_hidden
    return DecoderConfig(s.vocab, s.d_model, s.layers, attention=heads, d_hidden=hidden, moe=experts)


def hf_model(shape: Shape, *, balanced: bool = True) -> Any:
    """The same as a transformers model in training mode, float32, with that library's defaults for everything else.

    `balanced`: its loss has the part that balances experts, if it has experts.
    """
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
        output_router_logits=balanced,
        tie_word_embeddings=False,
    )
    return transformers.Qwen3MoeForCausalLM._from_config(qwen).float().train()


def our_parameters(model: Any, cfg: DecoderConfig) -> Any:
    """The weights of a transformers model as our tree, by way of the files that it saves."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return load_hf(folder, decoder.specs(cfg), decoder_names(cfg))
