"""gpt-oss equals transformers' for the same weights: loss, gradients, files, caches; and on meshes itself."""

import pytest

import ftrain
from ftrain.sharding import Mesh
from tests.helpers import text_families as laws

transformers = pytest.importorskip("transformers", minversion="5")

YARN = {"rope_type": "yarn", "factor": 8.0, "beta_fast": 4.0, "beta_slow": 0.1, "truncate": False}
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": 5,
    "swiglu_limit": 0.5,
    "rope_parameters": {"rope_theta": 5000.0, "original_max_position_embeddings": 1000, **YARN},
    "max_position_embeddings": 256,
}


def config(**changes):
    return transformers.GptOssConfig(**{**SIZES, **changes})


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    folder = laws.saved(laws.random_model(config()), tmp_path_factory.mktemp("gpt-oss") / "weights")
    return ftrain.hf.open(folder, native="always")


@pytest.mark.parametrize("truncate", [False, True])
def test_loss_and_gradients_are_those_of_transformers(truncate, tmp_path):
    rope = {**SIZES["rope_parameters"], "truncate": truncate}
    laws.require_saved_as_it_was(laws.require_those_of_transformers(config(rope_parameters=rope), tmp_path), tmp_path)


@pytest.mark.parametrize("mesh", [Mesh(shard=2, kind="virtual"), Mesh(sequence=2, kind="virtual")], ids=str)
def test_a_mesh_gives_what_one_device_gives(native, mesh):
    loss, gradients = laws.on_mesh(native, mesh)
    assert loss < 1e-12
    assert gradients < 1e-11


def test_experts_on_two_ranks_give_what_one_device_gives(native):
    loss, gradients = laws.on_mesh(native, Mesh(shard=2, expert=2, kind="virtual"))
    assert loss < 1e-12
    assert gradients < 1e-11


def test_tokens_one_by_one_are_those_of_the_whole_text(native):
    laws.require_one_by_one(native, laws.described({"model_type": "gpt_oss", **SIZES}))


def test_it_generates_what_transformers_does(tmp_path):
    laws.require_same_text("gpt_oss", config(), tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quantization_config": {"quant_method": "mxfp4"}}, "quantised; save them as numbers first"),
        ({"layer_types": ["full_attention", "chunked_attention"]}, "chunked_attention"),
        ({"layer_types": ["full_attention"]}, "of 1 layers"),
        ({"attention_bias": False}, "attention_bias is false"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"final_logit_softcapping": 3.0}, "final_logit_softcapping=3.0 is not understood"),
    ],
)
def test_what_it_cannot_follow_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        laws.described({"model_type": "gpt_oss", **SIZES, **change})


def test_a_file_that_says_little_is_the_published_model():
    cfg = laws.described({"model_type": "gpt_oss", "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3,
                          "num_attention_heads": 8})  # fmt: skip
    there = transformers.GptOssConfig()
    assert (cfg.moe.experts, cfg.moe.top_k, cfg.attention.head_dim) == (there.num_local_experts, 4, there.head_dim)
    assert cfg.attention.rope_scaling.factor == there.rope_parameters["factor"]
    assert cfg.attention.rope_base == there.rope_parameters["rope_theta"]
