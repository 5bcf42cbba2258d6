"""Qwen3-Next: three layers of gated delta nets for each of gated attention, centred norms, experts beside a shared one.

The decoder stack with layers of its own (`DecoderConfig.pattern`). Source: Qwen team, Qwen3-Next (2025). Families that
differ in little (`modules/families/qwen3_5.py`) say in what by `Facts`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from ftrain.modules import hf_rope
from ftrain.modules.attention import AttentionConfig
from ftrain.modules.block import Block
from ftrain.modules.decoder_config import DecoderConfig, layer_with
from ftrain.modules.delta_net import DeltaNetConfig, delta_net_block
from ftrain.modules.families.family import TextFamily, expert_tensors, fused_expert_tensors, stack_names, tensors
from ftrain.modules.fused_experts import fused_experts_block
from ftrain.modules.gated_attention import gated_attention_block
from ftrain.modules.hf_fields import Config, flag, number, require_understood, size
from ftrain.modules.hf_names import HfTensor, Names, natural_order
from ftrain.modules.layers import mlp_block, moe_block
from ftrain.modules.mlp import MlpConfig
from ftrain.modules.moe import MoEConfig

_READ = (
    "attention_bias", "attention_dropout", "decoder_sparse_step", "full_attention_interval", "head_dim", "hidden_act",
    "hidden_size", "intermediate_size", "layer_types", "linear_conv_kernel_dim", "linear_key_head_dim",
    "linear_num_key_heads", "linear_num_value_heads", "linear_value_head_dim", "mlp_only_layers",
    "moe_intermediate_size", "norm_topk_prob", "num_attention_heads", "num_experts", "num_experts_per_tok",
    "num_hidden_layers", "num_key_value_heads", "quantization_config", "rms_norm_eps",
    "shared_expert_intermediate_size", "tie_word_embeddings", *hf_rope.READ,
)  # fmt: skip
_ATTENTION = (
    ("q_proj.weight", "w_q_DHK"),
    ("k_proj.weight", "w_k_DGK"),
    ("v_proj.weight", "w_v_DGK"),
    ("o_proj.weight", "w_o_HKD"),
    ("q_norm.weight", "q_offset_K"),
    ("k_norm.weight", "k_offset_K"),
)
_DELTA = (
    ("dt_bias", "decay_bias_H"),
    ("A_log", "decay_log_H"),
    ("conv1d.weight", "conv_C1X"),
    ("in_proj_qkvz.weight", "w_in_DM"),
    ("in_proj_ba.weight", "w_rates_DH"),
    ("in_proj_qkv.weight", "w_mixed_DC"),
    ("in_proj_z.weight", "w_gate_DV"),
    ("in_proj_b.weight", "w_rate_DH"),
    ("in_proj_a.weight", "w_decay_DH"),
    ("norm.weight", "norm_V"),
    ("out_proj.weight", "w_o_HVD"),
)
_MLP = (("gate_proj.weight", "w_gate_DF"), ("up_proj.weight", "w_up_DF"), ("down_proj.weight", "w_down_FD"))


@dataclass(frozen=True)
class Facts:
    """In what families with such layers differ.

    `name`: for messages. `read`: the entries of a configuration that are read. `apart`: delta nets have a matrix for
    each of their inputs (`DeltaNetConfig.apart`). The others are what transformers' class takes where a configuration
    says nothing: `kv_heads`, `hidden` of an MLP (0: no layer has one), `experts` (0: no layer has some), `top_k`.
    """

    name: str
    read: tuple[str, ...]
    apart: bool
    kv_heads: int
    hidden: int
    experts: int
    top_k: int


_FACTS = Facts("Qwen3-Next", _READ, apart=False, kv_heads=2, hidden=5632, experts=512, top_k=10)


def config(config: Config) -> DecoderConfig:
    """The decoder that a `config.json` of Qwen3-Next describes. ValueError names an entry that it cannot follow."""
    return decoder_of(config, _FACTS)


def decoder_of(
    config: Config,
    facts: Facts,
    *,
    fused: bool = False,
    placed: Callable[[AttentionConfig], AttentionConfig] = lambda attention: attention,
) -> DecoderConfig:
    """The decoder that a `config.json` of a family with these facts describes.

    `fused`: parameters hold the gates and ups of a layer's experts as one (`ftrain.modules.fused_experts`). `placed`:
    makes attention over places on one axis one over places of another kind. ValueError as `config`.
    """
    _refuse(config, facts)
    d, layers = size(config, "hidden_size"), size(config, "num_hidden_layers")
    eps = number(config, "rms_norm_eps", 1e-6)
    stack = DecoderConfig(
        vocab=size(config, "vocab_size"),
        d_model=d,
        layers=layers,
        attention=placed(_attention(config, d, eps, facts)),
        d_hidden=size(config, "intermediate_size", facts.hidden) if facts.hidden else 0,
        moe=_experts(config, d, facts) if facts.experts else None,
        norm_eps=eps,
        norm_kind="centred",
        tie_embeddings=flag(config, "tie_word_embeddings"),
        init_std=number(config, "initializer_range", 0.02),
    )
    return replace(stack, pattern=tuple(_layers(config, stack, facts, fused)))


def _layers(config: Config, stack: DecoderConfig, facts: Facts, fused: bool) -> Iterator[Block]:
    readers = {
        "linear_attention": delta_net_block(_delta_net(config, stack.d_model, stack.norm_eps, facts)),
        "full_attention": gated_attention_block(stack.attention),
    }
    every = size(config, "full_attention_interval", 4)
    usual = ["full_attention" if (i + 1) % every == 0 else "linear_attention" for i in range(stack.layers)]
    kinds = config.get("layer_types") or usual
    if len(kinds) != stack.layers or not {*kinds} <= {*readers}:
        raise ValueError(
            f"config.json: layer_types says {sorted(set(kinds))} of {len(kinds)} layers; it needs 'linear_attention' "
            f"or 'full_attention' for each of {stack.layers}"
        )
    step, dense = size(config, "decoder_sparse_step", 1), config.get("mlp_only_layers") or []
    mlp = mlp_block(MlpConfig(stack.d_model, stack.d_hidden))
    mixture = mlp if stack.moe is None else (fused_experts_block if fused else moe_block)(stack.moe)
    for i, kind in enumerate(kinds):
        yield layer_with(stack, attention=readers[kind], mlp=mlp if i in dense or (i + 1) % step else mixture)


def _attention(config: Config, d: int, eps: float, facts: Facts) -> AttentionConfig:
    heads = size(config, "num_attention_heads", 16)
    head_dim = size(config, "head_dim", 256 if "head_dim" not in config else d // heads)
    base, scaling = hf_rope.rope_of(config, default_base=10_000.0, part=True)
    return AttentionConfig(
        d,
        heads=heads,
        kv_heads=size(config, "num_key_value_heads", facts.kv_heads if "num_key_value_heads" not in config else heads),
        head_dim=head_dim,
        norm_eps=eps,
        rope_base=base,
        rope_scaling=scaling,
        rope_dim=int(head_dim * hf_rope.rotated_share(config, 0.25)),
    )


def _delta_net(config: Config, d: int, eps: float, facts: Facts) -> DeltaNetConfig:
    return DeltaNetConfig(
        d,
        key_heads=size(config, "linear_num_key_heads", 16),
        heads=size(config, "linear_num_value_heads", 32),
        key_dim=size(config, "linear_key_head_dim", 128),
        value_dim=size(config, "linear_value_head_dim", 128),
        taps=size(config, "linear_conv_kernel_dim", 4),
        norm_eps=eps,
        apart=facts.apart,
    )


def _experts(config: Config, d: int, facts: Facts) -> MoEConfig:
    coefficient = config.get("router_aux_loss_coef")
    return MoEConfig(
        d,
        size(config, "moe_intermediate_size", 512),
        experts=size(config, "num_experts", facts.experts),
        top_k=size(config, "num_experts_per_tok", facts.top_k),
        d_shared=size(config, "shared_expert_intermediate_size", 512),
        shared_gate=True,
        normalize="norm_topk_prob" not in config or flag(config, "norm_topk_prob"),
        aux_coefficient=0.0 if coefficient == 0 else number(config, "router_aux_loss_coef", 1e-3),
    )


def _refuse(config: Config, facts: Facts) -> None:
    require_understood(config, facts.read)
    if (config.get("hidden_act") or "silu") != "silu":
        raise ValueError(f"config.json: hidden_act={config['hidden_act']!r}; {facts.name} computes 'silu' here")
    for field in ("attention_bias", "attention_dropout", "quantization_config"):
        if config.get(field):
            raise ValueError(f"config.json: {field}={config[field]!r}, which our decoder does not have")


def names(cfg: DecoderConfig) -> Names:
    """The tensors of Qwen3-Next or a family like it for causal language modelling with this configuration."""

    def layer(i: int) -> Iterator[HfTensor]:
        there, here = f"model.layers.{i}", f"layers.{i}"
        own = cfg.own(i)
        assert own is not None
        leaves = own.specs(1.0)["attention"]
        part, table = ("self_attn", _ATTENTION) if "w_q_DHK" in leaves else ("linear_attn", _DELTA)
        yield from tensors(f"{there}.{part}", f"{here}.attention", [(n, leaf) for n, leaf in table if leaf in leaves])
        if own.routers:
            if "w_gate_up_EDF" in own.specs(1.0)["moe"]:
                yield from fused_expert_tensors(f"{there}.mlp", f"{here}.moe")
            else:
                yield from expert_tensors(f"{there}.mlp", f"{here}.moe", own.routers[0].experts)
            yield from tensors(f"{there}.mlp.shared_expert", f"{here}.moe.shared", _MLP)
            gate = f"{there}.mlp.shared_expert_gate.weight"
            yield HfTensor(gate, f"{here}.moe.w_shared_gate_D1", transposed=True)
        else:
            yield from tensors(f"{there}.mlp", f"{here}.mlp", _MLP)
        yield HfTensor(f"{there}.input_layernorm.weight", f"{here}.attention_norm.offset_D")
        yield HfTensor(f"{there}.post_attention_layernorm.weight", f"{here}.mlp_norm.offset_D")

    found = stack_names(cfg, layer, norm="norm.offset_D")
    # when transformers takes experts apart it sorts all names it has in memory
    return tuple(sorted(found, key=natural_order))


FAMILY = TextFamily(config, names)
