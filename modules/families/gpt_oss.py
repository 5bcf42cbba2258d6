"""gpt-oss: attention with sinks, in turn over a window and over everything, experts with clamped SwiGLUs and biases.

The decoder stack with layers of its own (`DecoderConfig.pattern`). Source: OpenAI, arXiv 2508.10925.

Legend: T tokens, N rows sorted by expert, D model width, E experts, F hidden width of an expert.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ftrain.kernels.embedding import embedding
from ftrain.kernels.experts import dropped_rows, experts
from ftrain.kernels.grouped_mm import grouped_mm
from ftrain.modules import hf_rope, moe
from ftrain.modules.attention import AttentionConfig
from ftrain.modules.block import Block, Context
from ftrain.modules.decoder_config import DecoderConfig, layer_with
from ftrain.modules.families.family import TextFamily, stack_names, tensors
from ftrain.modules.hf_fields import Config, flag, number, require_understood, size
from ftrain.modules.hf_names import HfTensor, Names
from ftrain.modules.layers import attention_block
from ftrain.modules.moe import MoEConfig
from ftrain.modules.spec import ParamSpec, fan_in, zeros

_READ = (
    "attention_bias", "attention_dropout", "head_dim", "hidden_act", "hidden_size", "intermediate_size", "layer_types",
    "num_attention_heads", "num_experts_per_tok", "num_hidden_layers", "num_key_value_heads", "num_local_experts",
    "quantization_config", "rms_norm_eps", "sliding_window", "swiglu_alpha", "swiglu_limit", "tie_word_embeddings",
    *hf_rope.READ,
    # what files of the first transformers say again, and nobody reads
    "experts_per_token", "initial_context_length", "num_experts",
)  # fmt: skip
_YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
_ATTENTION = (
    ("sinks", "sinks_H"),
    *((f"{x}_proj.{kind}", f"{kind[0]}_{x}_{dims}") for x, kind, dims in (
        ("q", "weight", "DHK"), ("q", "bias", "HK"), ("k", "weight", "DGK"), ("k", "bias", "GK"),
        ("v", "weight", "DGK"), ("v", "bias", "GK"), ("o", "weight", "HKD"), ("o", "bias", "D"),
    )),
)  # fmt: skip
_EXPERTS = (
    ("router.weight", "w_router_DE"),
    ("router.bias", "b_router_E"),
    ("experts.gate_up_proj", "w_gate_up_EDF"),
    ("experts.gate_up_proj_bias", "b_gate_up_EF"),
    ("experts.down_proj", "w_down_EFD"),
    ("experts.down_proj_bias", "b_down_ED"),
)


@dataclass(frozen=True)
class ClampedSwiglu:
    """`(up + 1) * gate * sigmoid(gain * gate)`, the gate clamped above at `limit`, `up` at both sides."""

    gain: float = 1.702
    limit: float = 7.0

    def __call__(self, both_NF: Tensor) -> Tensor:
        """`[N, 2 F]`, gate and up in turn, to `[N, F]`."""
        gate_NF, up_NF = both_NF[..., ::2].clamp(max=self.limit), both_NF[..., 1::2].clamp(-self.limit, self.limit)
        return (up_NF + 1) * gate_NF * (self.gain * gate_NF).sigmoid()


def experts_block(cfg: MoEConfig, between: ClampedSwiglu) -> Block:
    """The experts: `router_specs`, and `w_gate_up_EDF` `[E, D, 2 F]` (gate and up in turn), `b_gate_up_EF`,
    `w_down_EFD`, `b_down_ED`.

    >>> cfg = MoEConfig(8, 4, experts=2, top_k=1, router_bias=True)
    >>> experts_block(cfg, ClampedSwiglu()).specs(1.0)["w_gate_up_EDF"].shape
    (2, 8, 8)
    """

    def network(rows_ND: Tensor, offsets_E: Tensor, expert_N: Tensor, leaves: tuple[Tensor, ...]) -> Tensor:
        w_in, b_in, w_out, b_out = leaves
        both_NF = grouped_mm(rows_ND, w_in, offsets_E) + embedding(expert_N, b_in)
        return grouped_mm(between(both_NF), w_out, offsets_E) + embedding(expert_N, b_out)

    def apply(params: Any, x_TD: Tensor, at: Context) -> Tensor:
        leaves = [params[name] for name in ("w_gate_up_EDF", "b_gate_up_EF", "w_down_EFD", "b_down_ED")]
        expert_TK, weights_TK, stats = moe.route(
            params["w_router_DE"],
            x_TD,
            cfg=cfg,
            b_router_E=params["b_router_E"],
            bias_E=at.bias_E(),
            valid_T=at.valid_T,
        )
        at.record(stats._replace(dropped=dropped_rows(expert_TK, leaves[0])))
        return experts(x_TD, expert_TK, weights_TK, leaves, network)

    return Block(lambda out_gain: _expert_specs(cfg, out_gain), apply, routers=(cfg,))


def _expert_specs(cfg: MoEConfig, out_gain: float) -> dict[str, ParamSpec]:
    d, e, f = cfg.d_model, cfg.experts, cfg.d_expert
    return {
        **moe.router_specs(cfg),
        "w_gate_up_EDF": ParamSpec((e, d, 2 * f), ("expert", "embed", "mlp"), fan_in(d)),
        "b_gate_up_EF": ParamSpec((e, 2 * f), ("expert", "mlp"), zeros()),
        "w_down_EFD": ParamSpec((e, f, d), ("expert", "mlp", "embed"), fan_in(f, gain=out_gain)),
        "b_down_ED": ParamSpec((e, d), ("expert", "embed"), zeros()),
    }


def config(config: Config) -> DecoderConfig:
    """The decoder that a `config.json` of gpt-oss describes. ValueError names an entry that it cannot follow.

    Experts as they are published are of four bits; they must be made numbers first.
    """
    _refuse(config)
    d, heads, layers = (size(config, f) for f in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    eps = number(config, "rms_norm_eps", 1e-5)
    base, scaling = hf_rope.rope_of(config, default_base=150_000.0, default=_YARN)
    reads = AttentionConfig(
        d,
        heads=heads,
        kv_heads=size(config, "num_key_value_heads", 8 if "num_key_value_heads" not in config else heads),
        head_dim=size(config, "head_dim", 64 if "head_dim" not in config else d // heads),
        norm_eps=eps,
        bias=True,
        out_bias=True,
        rope_base=base,
        rope_scaling=scaling,
        sinks=True,
    )
    coefficient = config.get("router_aux_loss_coef")
    routed = MoEConfig(
        d,
        size(config, "intermediate_size", 2880),
        experts=size(config, "num_local_experts", 128),
        top_k=size(config, "num_experts_per_tok", 4),
        router_bias=True,
        aux_coefficient=0.0 if coefficient == 0 else number(config, "router_aux_loss_coef", 1e-3),
    )
    between = ClampedSwiglu(number(config, "swiglu_alpha", 1.702), number(config, "swiglu_limit", 7.0))
    stack = DecoderConfig(
        vocab=size(config, "vocab_size"),
        d_model=d,
        layers=layers,
        attention=reads,
        moe=routed,
        norm_eps=eps,
        tie_embeddings=flag(config, "tie_word_embeddings"),
        init_std=number(config, "initializer_range", 0.02),
    )
    mixture = experts_block(routed, between)
    blocks = {
        window: layer_with(stack, attention=attention_block(replace(reads, window=window)), mlp=mixture)
        for window in (None, _width(config))
    }
    return replace(stack, pattern=tuple(blocks[window] for window in _windows(config, layers)))


def _refuse(config: Config) -> None:
    require_understood(config, _READ)
    if (config.get("hidden_act") or "silu") != "silu":
        raise ValueError(f"config.json: hidden_act={config['hidden_act']!r}; the experts of gpt-oss compute 'silu'")
    if config.get("attention_bias") is False:
        raise ValueError("config.json: attention_bias is false; the attention of gpt-oss has biases here")
    if config.get("attention_dropout"):
        raise ValueError(f"config.json: attention_dropout={config['attention_dropout']!r}, which our decoder lacks")
    if config.get("quantization_config"):
        raise ValueError(
            "config.json: quantization_config: the weights are quantised; save them as numbers first (load them in "
            "transformers with Mxfp4Config(dequantize=True), and save_pretrained)"
        )


def _width(config: Config) -> int | None:
    if "sliding_window" in config and config["sliding_window"] is None:
        return None
    return size(config, "sliding_window", 128)


def _windows(config: Config, layers: int) -> list[int | None]:
    """The window of each layer, None for all of the document."""
    usual = [("sliding_attention", "full_attention")[i % 2] for i in range(layers)]
    kinds = config.get("layer_types") or usual
    strange = {*kinds} - {*usual, "full_attention", "sliding_attention"}
    if strange or len(kinds) != layers:
        raise ValueError(
            f"config.json: layer_types says {sorted(set(kinds))} of {len(kinds)} layers; it needs 'sliding_attention' "
            f"or 'full_attention' for each of {layers}"
        )
    return [_width(config) if kind == "sliding_attention" else None for kind in kinds]


def names(cfg: DecoderConfig) -> Names:
    """The tensors of gpt-oss for causal language modelling with this configuration."""

    def layer(i: int) -> Iterator[HfTensor]:
        there, here = f"model.layers.{i}", f"layers.{i}"
        yield from tensors(f"{there}.self_attn", f"{here}.attention", _ATTENTION)
        yield from tensors(f"{there}.mlp", f"{here}.moe", _EXPERTS)
        yield HfTensor(f"{there}.input_layernorm.weight", f"{here}.attention_norm.weight_D")
        yield HfTensor(f"{there}.post_attention_layernorm.weight", f"{here}.mlp_norm.weight_D")

    return stack_names(cfg, layer)


FAMILY = TextFamily(config, names, stacked=True)
