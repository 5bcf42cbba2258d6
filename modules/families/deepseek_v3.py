"""DeepSeek-V3: attention through latents, first layers with MLPs, then experts that sigmoids and groups choose.

The decoder stack with layers of its own (`DecoderConfig.pattern`). The biases that keep the load even
(`e_score_correction_bias`) are the state of loss-free balancing (`decoder.balance_specs`, `decoder.update_balance`).
Modules of multi-token prediction are layers behind the last one, always with experts (`modules/multi_token.py`).
Source: DeepSeek-AI, arXiv 2412.19437.
"""

from collections.abc import Iterator
from dataclasses import replace

from ftrain.kernels.yarn import sharpening
from ftrain.modules import hf_rope
from ftrain.modules.block import Block
from ftrain.modules.decoder_config import DecoderConfig, layer_with
from ftrain.modules.families.family import TextFamily, expert_tensors, stack_names, tensors
from ftrain.modules.hf_fields import Config, flag, number, require_understood, size
from ftrain.modules.hf_names import HfTensor, Names, natural_order
from ftrain.modules.latent_attention import LatentAttentionConfig, latent_attention_block
from ftrain.modules.layers import mlp_block, moe_block
from ftrain.modules.mlp import MlpConfig
from ftrain.modules.moe import MoEConfig
from ftrain.modules.multi_token import BIASES as MTP_BIASES
from ftrain.modules.spec import leaves_with_paths

_READ = (
    "attention_bias", "attention_dropout", "first_k_dense_replace", "hidden_act", "hidden_size", "intermediate_size",
    "kv_lora_rank", "moe_intermediate_size", "n_group", "n_routed_experts", "n_shared_experts", "norm_topk_prob",
    "num_attention_heads", "num_experts_per_tok", "num_hidden_layers", "num_key_value_heads", "q_lora_rank",
    "qk_nope_head_dim", "qk_rope_head_dim", "quantization_config", "rms_norm_eps", "rope_interleave",
    "routed_scaling_factor", "tie_word_embeddings", "topk_group", "v_head_dim", "moe_layer_freq", "scoring_func",
    "topk_method", "num_nextn_predict_layers", *hf_rope.READ,
    # what follows from the others, and what only training or another program reads
    "head_dim", "qk_head_dim", "ep_size", "seq_aux", "aux_loss_alpha",
)  # fmt: skip
_ONLY = {
    "hidden_act": "silu",
    "moe_layer_freq": 1,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
}
"""Entries that have one value here."""

_ATTENTION = (
    ("q_proj.weight", "w_q_DHK"),
    ("q_a_proj.weight", "w_q_down_DQ"),
    ("q_a_proj.bias", "b_q_down_Q"),
    ("q_a_layernorm.weight", "q_norm_Q"),
    ("q_b_proj.weight", "w_q_up_QHK"),
    ("kv_a_proj_with_mqa.weight", "w_kv_down_DC"),
    ("kv_a_proj_with_mqa.bias", "b_kv_down_C"),
    ("kv_a_layernorm.weight", "kv_norm_C"),
    ("kv_b_proj.weight", "w_kv_up_CHK"),
    ("o_proj.weight", "w_o_HVD"),
    ("o_proj.bias", "b_o_D"),
)
_MLP = (("gate_proj.weight", "w_gate_DF"), ("up_proj.weight", "w_up_DF"), ("down_proj.weight", "w_down_FD"))
BIASES = "balance.router_bias_LE"
"""The path of the biases in a tree of parameters and state, as `names` has it."""


def config(config: Config) -> DecoderConfig:
    """The decoder that a `config.json` of DeepSeek-V3 describes. ValueError names an entry that it cannot follow."""
    _refuse(config)
    d, layers = size(config, "hidden_size"), size(config, "num_hidden_layers")
    eps, reads = number(config, "rms_norm_eps", 1e-6), _attention(config, d)
    stack = DecoderConfig(
        vocab=size(config, "vocab_size"),
        d_model=d,
        layers=layers,
        attention=reads.usual,
        d_hidden=size(config, "intermediate_size", 18_432),
        moe=_experts(config, d),
        norm_eps=eps,
        tie_embeddings=flag(config, "tie_word_embeddings"),
        init_std=number(config, "initializer_range", 0.02),
    )
    assert stack.moe is not None
    attention, dense = latent_attention_block(reads), mlp_block(MlpConfig(d, stack.d_hidden))
    first = config.get("first_k_dense_replace", 3) or 0
    kinds = [layer_with(stack, attention=attention, mlp=mlp) for mlp in (dense, moe_block(stack.moe))]
    ahead = config.get("num_nextn_predict_layers") or 0
    return replace(
        stack,
        dense_layers=min(first, layers),
        pattern=tuple(kinds[i >= first] for i in range(layers)),
        mtp=(kinds[True],) * ahead,
    )


def _attention(config: Config, d: int) -> LatentAttentionConfig:
    plain, rotated = size(config, "qk_nope_head_dim", 128), size(config, "qk_rope_head_dim", 64)
    base, scaling = hf_rope.rope_of(config, default_base=10_000.0)
    strength, scale = hf_rope.yarn_strength(config), (plain + rotated) ** -0.5
    if scaling is not None and strength:
        scale *= sharpening(scaling.factor, strength) ** 2
    without = "q_lora_rank" in config and config["q_lora_rank"] is None
    return LatentAttentionConfig(
        d,
        size(config, "num_attention_heads"),
        kv_rank=size(config, "kv_lora_rank", 512),
        plain_dim=plain,
        rope_dim=rotated,
        v_dim=size(config, "v_head_dim", 128),
        q_rank=None if without else size(config, "q_lora_rank", 1536),
        bias=flag(config, "attention_bias"),
        interleaved="rope_interleave" not in config or flag(config, "rope_interleave"),
        scale=scale,
        rope_base=base,
        rope_scaling=scaling,
    )


def _experts(config: Config, d: int) -> MoEConfig:
    return MoEConfig(
        d,
        size(config, "moe_intermediate_size", 2048),
        experts=size(config, "n_routed_experts", 256),
        top_k=size(config, "num_experts_per_tok", 8),
        shared_experts=size(config, "n_shared_experts", 1),
        groups=size(config, "n_group", 8),
        top_groups=size(config, "topk_group", 4),
        score="sigmoid",
        normalize="norm_topk_prob" not in config or flag(config, "norm_topk_prob"),
        scale=number(config, "routed_scaling_factor", 2.5),
        balance="bias",
    )


def _refuse(config: Config) -> None:
    require_understood(config, _READ)
    for field, only in _ONLY.items():
        if config.get(field, only) != only:
            raise ValueError(f"config.json: {field}={config[field]!r}; DeepSeek-V3 has {only!r} here")
    for field in ("attention_dropout", "quantization_config"):
        if config.get(field):
            raise ValueError(f"config.json: {field}={config[field]!r}, which our decoder does not have")
    heads, keys = config.get("num_attention_heads"), config.get("num_key_value_heads")
    if keys is not None and keys != heads:
        raise ValueError(
            f"config.json: num_key_value_heads={keys} differs from num_attention_heads={heads}: keys of latents are of "
            "each head"
        )
    for field in ("first_k_dense_replace", "num_nextn_predict_layers"):
        found = config.get(field)
        if found is not None and (isinstance(found, bool) or not isinstance(found, int) or found < 0):
            raise ValueError(f"config.json: {field}={found!r} must be a whole number of at least 0")


def names(cfg: DecoderConfig) -> Names:
    """The tensors of DeepSeek-V3 for causal language modelling, the balancing biases (at `BIASES`) among them, and
    those of modules of multi-token prediction, which repeat the table and the head.
    """

    def layer(i: int) -> Iterator[HfTensor]:
        own = cfg.own(i)
        assert own is not None
        bias = (BIASES, i - cfg.dense_layers)
        yield from _layer(f"model.layers.{i}", f"layers.{i}", own, bias)

    ahead = (name for k in range(len(cfg.mtp)) for name in _ahead(cfg, k))
    # when transformers takes experts apart it sorts all names it has in memory
    return tuple(sorted((*stack_names(cfg, layer), *ahead), key=natural_order))


def _layer(there: str, here: str, block: Block, bias: tuple[str, int]) -> Iterator[HfTensor]:
    """The tensors of a layer; `bias`: where the biases of its router are, if it has one."""
    leaves = {path for path, _ in leaves_with_paths(block.specs(1.0)["attention"])}
    yield from tensors(
        f"{there}.self_attn", f"{here}.attention", [(n, leaf) for n, leaf in _ATTENTION if leaf in leaves]
    )
    if block.routers:
        yield from expert_tensors(f"{there}.mlp", f"{here}.moe", block.routers[0].experts)
        yield from tensors(f"{there}.mlp.shared_experts", f"{here}.moe.shared", _MLP)
        yield HfTensor(f"{there}.mlp.gate.e_score_correction_bias", bias[0], index=bias[1])
    else:
        yield from tensors(f"{there}.mlp", f"{here}.mlp", _MLP)
    yield HfTensor(f"{there}.input_layernorm.weight", f"{here}.attention_norm.weight_D")
    yield HfTensor(f"{there}.post_attention_layernorm.weight", f"{here}.mlp_norm.weight_D")


def _ahead(cfg: DecoderConfig, module: int) -> Iterator[HfTensor]:
    """The tensors of a module of multi-token prediction, the first of which is number 0."""
    there, here = f"model.layers.{cfg.layers + module}", f"mtp.layers.{module}"
    head, turned = ("embedding.table_VD", False) if cfg.tie_embeddings else ("head.w_DV", True)
    yield HfTensor(f"{there}.embed_tokens.weight", "embedding.table_VD", copy=True, written=True)
    yield HfTensor(f"{there}.shared_head.head.weight", head, transposed=turned, copy=True, written=True)
    yield HfTensor(f"{there}.enorm.weight", f"{here}.token_norm.weight_D")
    yield HfTensor(f"{there}.hnorm.weight", f"{here}.hidden_norm.weight_D")
    yield HfTensor(f"{there}.eh_proj.weight", f"{here}.w_join_CD", transposed=True)
    yield HfTensor(f"{there}.shared_head.norm.weight", f"{here}.norm.weight_D")
    yield from _layer(there, f"{here}.layer", cfg.mtp[module], (f"balance.{MTP_BIASES}", module))


FAMILY = TextFamily(config, names)
