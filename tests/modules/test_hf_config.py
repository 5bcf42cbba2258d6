"""Configurations from `config.json` and back, and what our decoder cannot follow."""

import dataclasses

import pytest

from ftrain.kernels.rope import Llama3Scaling
from ftrain.modules.attention import AttentionConfig
from ftrain.modules.decoder import PRESETS, DecoderConfig, preset
from ftrain.modules.hf_config import decoder_config, hf_config
from ftrain.modules.hf_names import decoder_names
from ftrain.modules.moe import MoEConfig

LLAMA = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}
MOE = {
    **LLAMA,
    "model_type": "qwen3_moe",
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "num_key_value_heads": 4,
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_come_back_from_their_config_json(name: str) -> None:
    assert decoder_config(hf_config(preset(name))) == preset(name)


def test_a_published_file_gives_the_preset() -> None:
    published = {  # Qwen/Qwen3-30B-A3B
        "architectures": ["Qwen3MoeForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "decoder_sparse_step": 1,
        "eos_token_id": 151645,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "initializer_range": 0.02,
        "intermediate_size": 6144,
        "max_position_embeddings": 40960,
        "max_window_layers": 48,
        "mlp_only_layers": [],
        "model_type": "qwen3_moe",
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "num_attention_heads": 32,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 48,
        "num_key_value_heads": 4,
        "output_router_logits": False,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.001,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.51.0",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
    }
    assert decoder_config(published) == preset("30b-a3b")
    names = decoder_names(preset("30b-a3b"))
    assert len(names) == 18_867
    assert names[-1].name == "model.norm.weight"


def test_what_a_file_leaves_out_is_what_transformers_takes() -> None:
    heads = AttentionConfig(32, heads=4, kv_heads=4, head_dim=8)
    assert decoder_config(LLAMA) == DecoderConfig(100, 32, 4, heads, d_hidden=64)
    grouped = {**LLAMA, "num_key_value_heads": 2}
    assert decoder_config({**grouped, "model_type": "qwen3"}).attention.head_dim == 128
    assert decoder_config({**grouped, "model_type": "mistral"}).attention.window == 4096
    assert decoder_config({**grouped, "model_type": "mistral", "sliding_window": None}).attention.window is None
    assert decoder_config({**LLAMA, "model_type": "mistral", "num_attention_heads": 16}).attention.kv_heads == 8
    assert decoder_config({**LLAMA, "model_type": "mistral", "num_key_value_heads": None}).attention.kv_heads == 4


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 5e5, "rope_scaling": None},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope_theta": 5e5, "rope_parameters": {"type": "default", "rope_theta": 5e5}, "rope_scaling": {}},
        {"rope_parameters": {"full_attention": {"rope_theta": 5e5}}, "layer_types": ["full_attention"] * 4},
        {"rope_parameters": {kind: {"rope_theta": 5e5} for kind in ("full_attention", "sliding_attention")}},
    ],
    ids=["transformers 4", "transformers 5", "both", "of the one type of layer", "of types that agree"],
)
def test_both_spellings_of_rotary_positions_are_read(rope: dict) -> None:
    assert decoder_config({**LLAMA, **rope}).attention.rope_base == 5e5


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
    "rope",
    [{"rope_theta": 5e5, "rope_scaling": LLAMA3}, {"rope_parameters": {"rope_theta": 5e5, **LLAMA3}}],
    ids=["transformers 4", "transformers 5"],
)
def test_positions_of_llama_3_1_are_read_and_written(rope: dict) -> None:
    cfg = decoder_config({**LLAMA, **rope})
    assert cfg.attention.rope_base == 5e5
    assert cfg.attention.rope_scaling == Llama3Scaling(8.0, 1.0, 4.0, original_length=8192)
    written = hf_config(cfg)
    assert decoder_config(written) == cfg
    older = {key: value for key, value in written.items() if key != "rope_parameters"}
    assert decoder_config(older) == cfg


def test_transformers_reads_the_scaling_that_was_written() -> None:
    transformers = pytest.importorskip("transformers")
    cfg = decoder_config({**LLAMA, "rope_theta": 5e5, "rope_scaling": LLAMA3})
    theirs = transformers.LlamaConfig(**hf_config(cfg)).rope_parameters
    assert theirs == {"rope_theta": 5e5, **LLAMA3}


@pytest.mark.parametrize(
    "fields", [{"mlp_only_layers": [0, 1]}, {"num_local_experts": 8, "num_experts": None, "mlp_only_layers": [1, 0]}]
)
def test_experts_begin_after_the_dense_layers(fields: dict) -> None:
    cfg = decoder_config({**MOE, **fields})
    assert (cfg.dense_layers, cfg.d_hidden) == (2, 64)
    assert cfg.moe == MoEConfig(32, 16, experts=8, top_k=2, normalize=False)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model_type": "qwen3-moe"}, "'qwen3-moe' is not one of .*nearest known: 'qwen3_moe'"),
        ({"hidden_size": None}, "hidden_size=None must be a whole number"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"mlp_bias": True}, "mlp_bias=True, which our decoder does not have"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "'llama3' need low_freq_factor"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "of type 'linear'"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "'sliding_attention'"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"mlp_only_layers": [1]}, r"layers \[1\] of 4 have no experts"),
        ({"num_local_experts": 3}, "num_experts=8 and num_local_experts=3 are two names of one thing"),
        (
            {"rope_theta": 5e5, "rope_parameters": {"rope_theta": 1e6}},
            "rope_theta=500000.0 and rope_parameters.rope_theta",
        ),
        ({"rope_parameters": {"rope_theta": 1e6}, "rope_scaling": {"type": "yarn", "factor": 4.0}}, "of type 'yarn'"),
        (
            {"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"type": "linear", "factor": 2.0}},
            "rope_parameters.rope_type='default' and rope_scaling.type='linear' contradict each other",
        ),
        (
            {"rope_scaling": {"rope_type": "llama3", "type": "linear"}},
            "rope_scaling.rope_type='llama3' and rope_scaling",
        ),
        ({"rope_scaling": {"rope_type": "default", "factor": 2.0}}, "rope_scaling.factor=2.0 says nothing to rotary"),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}},
            "rope_parameters.full_attention.rope_theta=1000000.0 and rope_parameters.sliding_attention.rope_theta",
        ),
        ({"rope_parameters": {"full_attention": {}, "rope_theta": 1e6}}, "types of layers and values side by side"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        (
            {"final_logit_softcapping": 30.0},
            "final_logit_softcapping=30.0 is not understood, and may change the numbers",
        ),
        ({"rms_norm_epsilon": 1e-5}, "did you mean 'rms_norm_eps'"),
        ({"rms_norm_eps": -1e-5}, "rms_norm_eps=-1e-05 must be a number above 0"),
        ({"rope_theta": "1e6"}, "rope_theta='1e6' must be a number above 0"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings='false' must be true or false"),
        ({"num_key_value_heads": 3}, "num_attention_heads=4 is not a multiple of num_key_value_heads=3"),
        ({"model_type": "mixtral", "attention_bias": True}, "attention_bias, which model_type='mixtral' does not have"),
        ({"decoder_sparse_step": 2}, r"layers \[0, 2\] of 4 have no experts"),
    ],
)
def test_what_the_decoder_cannot_follow_is_refused(fields: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        decoder_config({**MOE, **fields})


def test_the_fields_of_the_original_file_are_kept() -> None:
    base = {**LLAMA, "eos_token_id": 7, "max_position_embeddings": 4096}
    assert hf_config(decoder_config(base), base=base) == base


def test_the_original_file_must_be_of_the_same_model() -> None:
    cfg = decoder_config(LLAMA)
    assert hf_config(dataclasses.replace(cfg, init_std=0.1), base=LLAMA) == LLAMA
    with pytest.raises(ValueError, match=r"config\.json describes another model"):
        hf_config(dataclasses.replace(cfg, tie_embeddings=True), base=LLAMA)


def _attention(**change) -> DecoderConfig:
    cfg = decoder_config(LLAMA)
    return dataclasses.replace(cfg, attention=dataclasses.replace(cfg.attention, **change))


def _moe(**change) -> DecoderConfig:
    cfg = decoder_config(MOE)
    return dataclasses.replace(cfg, moe=dataclasses.replace(cfg.moe, **change))


@pytest.mark.parametrize(
    "cfg",
    [
        _attention(causal=False),
        _attention(rope_base=None),
        _attention(rope_sections=(2, 2)),
        _attention(norm_eps=1e-3),
        _attention(qk_norm=True, window=5),
        _attention(out_bias=True),
        _moe(shared_experts=1),
        _moe(score="sigmoid"),
        _moe(scale=2.0),
        _moe(balance="bias"),
        dataclasses.replace(_moe(), attention=_attention().attention),
    ],
    ids=repr,
)
def test_a_decoder_that_no_family_computes_is_refused(cfg: DecoderConfig) -> None:
    with pytest.raises(ValueError, match="none of llama, mistral, mixtral, qwen2, qwen3, qwen3_moe computes"):
        hf_config(cfg)


@pytest.mark.parametrize("change", [{"shared_experts": 1}, {"balance": "bias"}])
def test_experts_without_a_name_there_are_refused(change: dict) -> None:
    with pytest.raises(ValueError, match="no Hugging Face name is known"):
        decoder_names(_moe(**change))
