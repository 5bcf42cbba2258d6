"""Qwen3-Next equals transformers' for the same weights: loss, gradients, files, caches; and on meshes itself."""

import pytest
import torch

import ftrain
from ftrain.sharding import Mesh
from tests.helpers import text_families as laws

transformers = pytest.importorskip("transformers", minversion="5")

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 24,
    "moe_intermediate_size": 12,
    "shared_expert_intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 10,
    "linear_conv_kernel_dim": 4,
    "layer_types": ["linear_attention", "full_attention"],
    "max_position_embeddings": 256,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.25},
}


def config(**changes):
    return transformers.Qwen3NextConfig(**{**SIZES, **changes})


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    folder = laws.saved(laws.random_model(config()), tmp_path_factory.mktemp("qwen3-next") / "weights")
    return ftrain.hf.open(folder, native="always")


@pytest.mark.parametrize(
    "changes", [{}, {"mlp_only_layers": [0], "norm_topk_prob": False}], ids=["published", "first layer dense"]
)
def test_loss_and_gradients_are_those_of_transformers(changes, tmp_path):
    """Ours in float64: through the recurrence gradients of transformers in float32 are up to 1e-5 off."""
    made = laws.require_those_of_transformers(config(**changes), tmp_path, dtype=torch.float64, within=2e-5)
    laws.require_saved_as_it_was(made, tmp_path)


@pytest.mark.parametrize(
    "mesh",
    [Mesh(shard=2, kind="virtual"), Mesh(sequence=2, kind="virtual"), Mesh(shard=2, expert=2, kind="virtual")],
    ids=str,
)
def test_a_mesh_gives_what_one_device_gives(native, mesh):
    """Where ranks share a pack each runs all of it through the delta nets, and keeps its own rows."""
    loss, gradients = laws.on_mesh(native, mesh)
    assert loss < 1e-12
    assert gradients < 1e-11


def test_tokens_one_by_one_are_those_of_the_whole_text(native):
    laws.require_one_by_one(native, laws.described({"model_type": "qwen3_next", **SIZES}))


def test_it_generates_what_transformers_does(tmp_path):
    laws.require_same_text("qwen3_next", config(), tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_bias": True}, "attention_bias=True"),
        ({"layer_types": ["linear_attention", "sliding_attention"]}, "sliding_attention"),
        ({"layer_types": ["full_attention"]}, "of 1 layers"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"linear_num_value_heads": 3}, "heads=3 must be a multiple of key_heads=2"),
        ({"rope_parameters": {"rope_theta": 5e3, "partial_rotary_factor": 1.5}}, "more than all of it"),
    ],
)
def test_what_it_cannot_follow_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        laws.described({"model_type": "qwen3_next", **SIZES, **change})
