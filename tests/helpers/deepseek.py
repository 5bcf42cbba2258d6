"""A tiny DeepSeek-V3: its sizes, and transformers' configuration of them."""

from typing import Any

YARN = {"rope_type": "yarn", "factor": 8.0, "beta_fast": 4.0, "beta_slow": 0.1, "mscale": 1.0, "mscale_all_dim": 0.7}
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 24,
    "moe_intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "n_routed_experts": 6,
    "num_experts_per_tok": 3,
    "n_group": 3,
    "topk_group": 2,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.7,
    "kv_lora_rank": 12,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "max_position_embeddings": 256,
    "rope_parameters": {"rope_theta": 5000.0, "original_max_position_embeddings": 1000, **YARN},
}


def config(**changes: Any) -> Any:
    """With these entries changed."""
    import transformers

    return transformers.DeepseekV3Config(**{**SIZES, "num_key_value_heads": 4, **changes})
