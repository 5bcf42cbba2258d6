"""`config.json` of Hugging Face's decoder families to `DecoderConfig`, and back.

What a file asks for and our decoder does not compute is a `ValueError`, never left out: a model that differs a little
trains and answers, only worse.
"""

import difflib
from collections.abc import Mapping
from dataclasses import astuple, dataclass, replace
from typing import Any, Literal

from kernels.rope import Llama3Scaling
from modules.attention import AttentionConfig
from modules.decoder import DecoderConfig
from modules.moe import MoEConfig


@dataclass(frozen=True)
class Family:
    """What a `model_type` says by itself, without a field of `config.json`.

    `architecture`: the class for training text. `biases`: of queries, keys, values; of the output (`None`: both as
    `attention_bias` says). `experts`: spelt as Qwen3-MoE or as Mixtral does. Where a field is missing: `head_dim`
    (`None`: the model's width over the heads), `window` of all layers (False: this family has no such field).
    """

    model_type: str
    architecture: str
    biases: tuple[bool, bool] | None = (False, False)
    qk_norm: bool = False
    experts: Literal["qwen", "mixtral"] | None = None
    head_dim: int | None = None
    window: int | Literal[False] | None = False


FAMILIES = {
    family.model_type: family
    for family in (
        Family("llama", "LlamaForCausalLM", biases=None),
        Family("mistral", "MistralForCausalLM", window=4096),
        Family("mixtral", "MixtralForCausalLM", experts="mixtral", window=None),
        Family("qwen2", "Qwen2ForCausalLM", biases=(True, False)),
        Family("qwen3", "Qwen3ForCausalLM", biases=None, qk_norm=True, head_dim=128),
        Family("qwen3_moe", "Qwen3MoeForCausalLM", biases=None, qk_norm=True, experts="qwen"),
    )
}

_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def decoder_config(config: Mapping[str, Any]) -> DecoderConfig:
    """The decoder that a `config.json` describes, written by transformers 4 or 5.

    Raises `ValueError` naming the field that is missing, or that our decoder cannot follow.
    """
    family = _family(config)
    _refuse_unknown_math(config)
    d, heads = _size(config, "hidden_size"), _size(config, "num_attention_heads")
    eps = float(config.get("rms_norm_eps", 1e-6))
    bias, out_bias = family.biases or (bool(config.get("attention_bias", False)),) * 2
    attention = AttentionConfig(
        d,
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or family.head_dim or d // heads,
        qk_norm=family.qk_norm,
        norm_eps=eps,
        bias=bias,
        out_bias=out_bias,
        window=_window(config, family),
        rope_base=_rope_base(config),
        rope_scaling=_rope_scaling(config),
    )
    layers = _size(config, "num_hidden_layers")
    moe = _experts(config, family, d)
    dense = _dense_layers(config, layers) if family.experts == "qwen" else 0
    return DecoderConfig(
        vocab=_size(config, "vocab_size"),
        d_model=d,
        layers=layers,
        attention=attention,
        # transformers keeps the width of layers that a model of experts does not have.
        d_hidden=_size(config, "intermediate_size") if moe is None or dense else 0,
        moe=moe,
        dense_layers=dense,
        norm_eps=eps,
        tie_embeddings=bool(config.get("tie_word_embeddings", False)),
        init_std=float(config.get("initializer_range", 0.02)),
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
        "rope_theta": attention.rope_base,
        "rope_parameters": {"rope_theta": attention.rope_base, **_rope_fields(attention.rope_scaling)},
        "initializer_range": cfg.init_std,
        "tie_word_embeddings": cfg.tie_embeddings,
    }
    if attention.rope_scaling is not None:
        found["rope_scaling"] = _rope_fields(attention.rope_scaling)
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


def _size(config: Mapping[str, Any], field: str) -> int:
    value = config.get(field)
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"config.json: {field}={value!r} must be a whole number of at least 1")
    return value


def _refuse_unknown_math(config: Mapping[str, Any]) -> None:
    act = config.get("hidden_act", "silu")
    if act != "silu":
        raise ValueError(f"config.json: hidden_act={act!r}, but our MLP computes 'silu'")
    for field in ("mlp_bias", "attention_dropout", "router_jitter_noise", "quantization_config"):
        if config.get(field):
            raise ValueError(f"config.json: {field}={config[field]!r}, which our decoder does not have")
    kinds = {kind for kind in config.get("layer_types") or () if kind != "full_attention"}
    if kinds:
        raise ValueError(f"config.json: layer_types has {min(kinds)!r}; here all layers see the same window")


def _window(config: Mapping[str, Any], family: Family) -> int | None:
    if family.window is not False:
        return config.get("sliding_window", family.window)
    if config.get("use_sliding_window"):
        raise ValueError("config.json: use_sliding_window, by which layers differ; here all layers see the same window")
    return None


def _rope(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """`rope_scaling` of transformers 4, or `rope_parameters` of 5."""
    return config.get("rope_parameters") or config.get("rope_scaling") or {}


def _rope_base(config: Mapping[str, Any]) -> float:
    return float(_rope(config).get("rope_theta", config.get("rope_theta", 10_000.0)))


def _rope_scaling(config: Mapping[str, Any]) -> Llama3Scaling | None:
    rope = _rope(config)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3") or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(
            f"config.json: rotary positions of type {kind!r} ({dict(rope)}); ours are of type 'default' or 'llama3'"
        )
    if kind == "default":
        return None
    missing = [field for field in _LLAMA3 if field not in rope]
    if missing:
        raise ValueError(f"config.json: rotary positions of type 'llama3' need {missing[0]} ({dict(rope)})")
    return Llama3Scaling(*(rope[field] for field in _LLAMA3))


def _rope_fields(scaling: Llama3Scaling | None) -> dict[str, Any]:
    if scaling is None:
        return {"rope_type": "default"}
    return {"rope_type": "llama3", **dict(zip(_LLAMA3, astuple(scaling), strict=True))}


def _experts(config: Mapping[str, Any], family: Family, d: int) -> MoEConfig | None:
    if family.experts is None:
        return None
    mixtral = family.experts == "mixtral"
    field = "num_local_experts" if "num_local_experts" in config or mixtral else "num_experts"
    return MoEConfig(
        d,
        _size(config, "intermediate_size" if mixtral else "moe_intermediate_size"),
        experts=_size(config, field),
        top_k=_size(config, "num_experts_per_tok"),
        normalize=mixtral or bool(config.get("norm_topk_prob", False)),
        aux_coefficient=float(config.get("router_aux_loss_coef", 1e-3)),
    )


def _dense_layers(config: Mapping[str, Any], layers: int) -> int:
    step, listed = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers") or []
    dense = [i for i in range(layers) if i in listed or (i + 1) % step]
    if dense != list(range(len(dense))):
        raise ValueError(
            f"config.json: layers {dense} of {layers} have no experts (mlp_only_layers={listed}, "
            f"decoder_sparse_step={step}); here only the first ones can be without"
        )
    return len(dense)


def _family_of(cfg: DecoderConfig) -> Family:
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
    """Rotation over one axis, causal, one epsilon; a softmax router without shared experts or biases."""
    a, moe = cfg.attention, cfg.moe
    plain = a.causal and a.rope_base is not None and a.rope_sections is None and a.norm_eps == cfg.norm_eps
    if moe is None:
        return plain
    routed = moe.score == "softmax" and moe.scale == 1.0 and moe.balance != "bias" and not moe.shared_experts
    return plain and routed


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
