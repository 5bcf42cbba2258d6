"""`config.json` of Hugging Face's decoder families to `DecoderConfig`, and back.

What a file asks for and our decoder does not compute is a `ValueError`, never left out: a model that differs a little
trains and answers, only worse.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from ftrain.modules import hf_rope
from ftrain.modules.attention import AttentionConfig
from ftrain.modules.decoder_config import DecoderConfig
from ftrain.modules.hf_fields import agreed, flag, number, require_understood, size
from ftrain.modules.moe import MoEConfig


@dataclass(frozen=True)
class Family:
    """What a `model_type` says by itself, without a field of `config.json`.

    `architecture`: the class for training text. `biases`: of queries, keys, values; of the output (`None`: both as
    `attention_bias` says). `experts`: spelt as Qwen3-MoE or as Mixtral does. Where a field is missing, what
    transformers' class of the family takes: `head_dim` (`None`: the model's width over the heads), `kv_heads` (`None`:
    as many as heads), `window` of all layers (False: this family has no such field), `rope_base`, `norm_eps`.
    """

    model_type: str
    architecture: str
    biases: tuple[bool, bool] | None = (False, False)
    qk_norm: bool = False
    experts: Literal["qwen", "mixtral"] | None = None
    head_dim: int | None = None
    kv_heads: int | None = None
    window: int | Literal[False] | None = False
    rope_base: float = 10_000.0
    norm_eps: float = 1e-6


FAMILIES = {
    family.model_type: family
    for family in (
        Family("llama", "LlamaForCausalLM", biases=None),
        Family("mistral", "MistralForCausalLM", kv_heads=8, window=4096),
        Family(
            "mixtral", "MixtralForCausalLM", experts="mixtral", kv_heads=8, window=None, rope_base=1e6, norm_eps=1e-5
        ),
        Family("qwen2", "Qwen2ForCausalLM", biases=(True, False), kv_heads=32),
        Family("qwen3", "Qwen3ForCausalLM", biases=None, qk_norm=True, head_dim=128, kv_heads=32),
        Family("qwen3_moe", "Qwen3MoeForCausalLM", biases=None, qk_norm=True, experts="qwen", kv_heads=4),
    )
}

# All that is looked at below, whatever the family: a family without a field refuses it where it says something.
_READ = (
    "attention_bias", "attention_dropout", "decoder_sparse_step", "head_dim", "hidden_act", "hidden_size",
    "intermediate_size", "layer_types", "mlp_bias", "mlp_only_layers", "moe_intermediate_size", "norm_topk_prob",
    "num_attention_heads", "num_experts", "num_experts_per_tok", "num_hidden_layers", "num_key_value_heads",
    "num_local_experts", "quantization_config", "rms_norm_eps", "router_jitter_noise", "sliding_window",
    "tie_word_embeddings", "use_sliding_window", *hf_rope.READ,
)  # fmt: skip


def decoder_config(config: Mapping[str, Any]) -> DecoderConfig:
    """The decoder that a `config.json` describes, written by transformers 4 or 5.

    A missing or null field is what transformers' class of the family takes. Raises `ValueError` naming the field that
    is missing, that contradicts another, that our decoder cannot follow, or that is not known to change nothing.

    >>> from ftrain.modules.decoder import preset
    >>> decoder_config(hf_config(preset("qwen3-moe-tiny"))) == preset("qwen3-moe-tiny")
    True
    """
    family = _family(config)
    _refuse_unknown_math(config, family)
    require_understood(config, _READ)
    d, heads = size(config, "hidden_size"), size(config, "num_attention_heads")
    eps = number(config, "rms_norm_eps", family.norm_eps)
    bias, out_bias = family.biases or (flag(config, "attention_bias"),) * 2
    rope_base, rope_scaling = hf_rope.rope_of(config, default_base=family.rope_base)
    attention = AttentionConfig(
        d,
        heads=heads,
        kv_heads=_kv_heads(config, family, heads),
        head_dim=size(config, "head_dim", _head_dim(config, family, d, heads)),
        qk_norm=family.qk_norm,
        norm_eps=eps,
        bias=bias,
        out_bias=out_bias,
        window=_window(config, family),
        rope_base=rope_base,
        rope_scaling=rope_scaling,
    )
    layers = size(config, "num_hidden_layers")
    moe = _experts(config, family, d)
    dense = _dense_layers(config, layers) if family.experts == "qwen" else 0
    return DecoderConfig(
        vocab=size(config, "vocab_size"),
        d_model=d,
        layers=layers,
        attention=attention,
        # transformers keeps the width of layers that a model of experts does not have.
        d_hidden=size(config, "intermediate_size") if moe is None or dense else 0,
        moe=moe,
        dense_layers=dense,
        norm_eps=eps,
        tie_embeddings=flag(config, "tie_word_embeddings"),
        init_std=number(config, "initializer_range", 0.02),
    )


def hf_config(cfg: DecoderConfig, *, base: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A `config.json` for this decoder.

    `base`: the file that the model came from, whose further fields (special tokens, lengths, ...) are kept; it must
    describe the same model. Without it, only what the model's math needs is there; set `max_position_embeddings` and
    the special tokens yourself.

    Raises `ValueError` where no family computes what `cfg` says, or where `base` is of another model.
    """
    if base is not None:
        _require_same(decoder_config(base), cfg)
        return dict(base)
    family = _family_of(cfg)
    attention = cfg.attention
    found: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "hidden_act": "silu",
        "vocab_size": cfg.vocab,
        "hidden_size": cfg.d_model,
        "num_hidden_layers": cfg.layers,
        "num_attention_heads": attention.heads,
        "num_key_value_heads": attention.kv_heads,
        "head_dim": attention.head_dim,
        # Of experts alone it is not used, but transformers wants one.
        "intermediate_size": cfg.d_hidden or (cfg.moe.d_expert if cfg.moe else 0),
        "rms_norm_eps": cfg.norm_eps,
        "initializer_range": cfg.init_std,
        "tie_word_embeddings": cfg.tie_embeddings,
    }
    if attention.rope_base is not None:
        found |= hf_rope.rope_fields(attention.rope_base, attention.rope_scaling)
    if family.biases is None:
        found["attention_bias"] = attention.bias
    if family.window is not False:
        found["sliding_window"] = attention.window
    if cfg.moe is not None:
        found |= _expert_fields(cfg.moe, cfg.dense_layers, mixtral=family.experts == "mixtral")
    return found


def _expert_fields(moe: MoEConfig, dense_layers: int, *, mixtral: bool) -> dict[str, Any]:
    common = {"num_experts_per_tok": moe.top_k, "router_aux_loss_coef": moe.aux_coefficient}
    if mixtral:
        return {**common, "num_local_experts": moe.experts}
    return {
        **common,
        "num_experts": moe.experts,
        "moe_intermediate_size": moe.d_expert,
        "norm_topk_prob": moe.normalize,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(range(dense_layers)),
    }


def _family(config: Mapping[str, Any]) -> Family:
    name = config.get("model_type")
    if name not in FAMILIES:
        near = difflib.get_close_matches(str(name), FAMILIES, n=1, cutoff=0.6)
        hint = f"; nearest known: {near[0]!r}" if near else ""
        raise ValueError(f"config.json: model_type={name!r} is not one of {', '.join(FAMILIES)}{hint}")
    return FAMILIES[name]


def _refuse_unknown_math(config: Mapping[str, Any], family: Family) -> None:
    act = config.get("hidden_act") or "silu"
    if act not in ("silu", "swish"):
        raise ValueError(f"config.json: hidden_act={act!r}, but our MLP computes 'silu'")
    for field in ("mlp_bias", "attention_dropout", "router_jitter_noise", "quantization_config"):
        if config.get(field):
            raise ValueError(f"config.json: {field}={config[field]!r}, which our decoder does not have")
    if config.get("attention_bias") and family.biases == (False, False):
        raise ValueError(f"config.json: attention_bias, which model_type={family.model_type!r} does not have")
    kinds = {kind for kind in config.get("layer_types") or () if kind != "full_attention"}
    if kinds:
        raise ValueError(f"config.json: layer_types has {min(kinds)!r}; here all layers see the same window")


def _kv_heads(config: Mapping[str, Any], family: Family, heads: int) -> int:
    """An entry that is null says as many as heads; one that is not there leaves it to the family."""
    default = heads if "num_key_value_heads" in config or family.kv_heads is None else family.kv_heads
    found = size(config, "num_key_value_heads", default)
    if heads % found:
        raise ValueError(
            f"config.json: num_attention_heads={heads} is not a multiple of num_key_value_heads={found}"
            + (
                ""
                if "num_key_value_heads" in config
                else f", which is what {family.model_type} takes where it is missing"
            )
        )
    return found


def _head_dim(config: Mapping[str, Any], family: Family, d: int, heads: int) -> int:
    if family.head_dim is not None and "head_dim" not in config:
        return family.head_dim
    if config.get("head_dim") is None and d % heads:
        raise ValueError(f"config.json: hidden_size={d} does not divide by num_attention_heads={heads}: give head_dim")
    return d // heads


def _window(config: Mapping[str, Any], family: Family) -> int | None:
    if family.window is not False:
        found = config.get("sliding_window", family.window)
        return None if found is None else size(config, "sliding_window", found)
    if flag(config, "use_sliding_window"):
        raise ValueError("config.json: use_sliding_window, by which layers differ; here all layers see the same window")
    return None


def _experts(config: Mapping[str, Any], family: Family, d: int) -> MoEConfig | None:
    if family.experts is None:
        return None
    mixtral = family.experts == "mixtral"
    experts = agreed(config, "num_experts", "num_local_experts")
    coefficient = config.get("router_aux_loss_coef")
    return MoEConfig(
        d,
        size(config, "intermediate_size" if mixtral else "moe_intermediate_size"),
        experts=size({"num_experts": experts}, "num_experts"),
        top_k=size(config, "num_experts_per_tok"),
        normalize=mixtral or flag(config, "norm_topk_prob"),
        aux_coefficient=0.0 if coefficient == 0 else number(config, "router_aux_loss_coef", 1e-3),
    )


def _dense_layers(config: Mapping[str, Any], layers: int) -> int:
    step, listed = size(config, "decoder_sparse_step", 1), config.get("mlp_only_layers") or []
    dense = [i for i in range(layers) if i in listed or (i + 1) % step]
    if dense != list(range(len(dense))):
        raise ValueError(
            f"config.json: layers {dense} of {layers} have no experts (mlp_only_layers={listed}, "
            f"decoder_sparse_step={step}); here only the first ones can be without"
        )
    return len(dense)


def _family_of(cfg: DecoderConfig) -> Family:
    if cfg.pattern:
        raise ValueError(
            "no Hugging Face family has layers of your own (DecoderConfig.pattern): write config.json for the "
            "configuration without them"
        )
    for family in FAMILIES.values():
        if _has_their_math(cfg) and _is_of(cfg, family):
            return family
    raise ValueError(f"none of {', '.join(FAMILIES)} computes what this decoder does: {cfg}")


def _is_of(cfg: DecoderConfig, family: Family) -> bool:
    attention, moe = cfg.attention, cfg.moe
    biases = (attention.bias, attention.out_bias)
    return (
        family.qk_norm == attention.qk_norm
        and (biases == family.biases if family.biases is not None else attention.bias == attention.out_bias)
        and (attention.window is None or family.window is not False)
        and (family.experts is None) == (moe is None)
        and (moe is None or family.experts == "qwen" or (moe.normalize and cfg.dense_layers == 0))
    )


def _has_their_math(cfg: DecoderConfig) -> bool:
    """Rotation of whole heads over one axis, causal, one epsilon, no sinks; a plain softmax router."""
    a, moe = cfg.attention, cfg.moe
    plain = a.causal and a.rope_base is not None and a.rope_sections is None and a.norm_eps == cfg.norm_eps
    plain = plain and a.rotated == a.head_dim and not a.sinks and cfg.norm_kind == "rms"
    if moe is None:
        return plain
    routed = moe.score == "softmax" and moe.scale == 1.0 and moe.balance != "bias" and moe.shared is None
    return plain and routed and moe.groups == 1 and not moe.router_bias


def _require_same(there: DecoderConfig, here: DecoderConfig) -> None:
    """The same shapes and math; how a model is initialised and balanced in training may differ."""

    def core(cfg: DecoderConfig) -> DecoderConfig:
        moe = cfg.moe
        if moe is not None:
            moe = replace(moe, balance="bias" if moe.balance == "bias" else "aux", aux_coefficient=0.0, bias_rate=0.0)
        hidden = cfg.d_hidden if any(not cfg.has_experts(i) for i in range(cfg.layers)) else 0
        return replace(cfg, init_std=0.0, moe=moe, d_hidden=hidden)

    if core(there) != core(here):
        raise ValueError(f"config.json describes another model:\n  {there}\nthan the one to be written:\n  {here}")
