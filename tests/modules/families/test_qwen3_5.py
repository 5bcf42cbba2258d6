"""Qwen3.5's text models equal transformers' for the same weights: loss, gradients, files, caches; and on meshes."""

import pytest
import torch

import ftrain
from ftrain.sharding import Mesh
from tests.helpers import text_families as laws

transformers = pytest.importorskip("transformers", minversion="5.2")

ROPE = {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.25}
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 10,
    "linear_conv_kernel_dim": 4,
    "layer_types": ["linear_attention", "full_attention"],
    "max_position_embeddings": 256,
    "rope_parameters": {**ROPE, "mrope_section": [1, 1, 0], "mrope_interleaved": True},
}
DENSE = {**SIZES, "intermediate_size": 24}
MIXTURE = {
    **SIZES,
    "moe_intermediate_size": 12,
    "shared_expert_intermediate_size": 20,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}
KINDS = {
    "qwen3_5_text": lambda: transformers.Qwen3_5TextConfig(**DENSE),
    "qwen3_5_moe_text": lambda: transformers.Qwen3_5MoeTextConfig(**MIXTURE),
}


@pytest.fixture(scope="module", params=KINDS)
def native(request, tmp_path_factory):
    """Opened once its loss, its gradients and its file were seen to be transformers'."""
    folder = tmp_path_factory.mktemp("qwen3_5")
    # ours in float64: through the recurrence gradients of transformers in float32 are up to 2e-5 off
    made = laws.require_those_of_transformers(KINDS[request.param](), folder, dtype=torch.float64, within=4e-5)
    laws.require_saved_as_it_was(made, folder)
    return made


def test_it_is_a_family_of_the_library(native):
    assert native.why.endswith("is a family of the library")


@pytest.mark.parametrize("native", ["qwen3_5_moe_text"], indirect=True)
def test_a_mesh_gives_what_one_device_gives(native):
    """Where ranks share a pack each works out its heads of the delta nets for all tokens."""
    loss, gradients = laws.on_mesh(native, Mesh(sequence=2, expert=2, kind="virtual"))
    assert loss < 1e-12
    assert gradients < 1e-11


@pytest.mark.parametrize(("kind", "sizes"), [("qwen3_5_text", DENSE), ("qwen3_5_moe_text", MIXTURE)])
def test_tokens_one_by_one_are_those_of_the_whole_text(kind, sizes, tmp_path):
    """And it generates what transformers does."""
    laws.require_same_text(kind, KINDS[kind](), tmp_path)
    laws.require_one_by_one(ftrain.hf.open(tmp_path), laws.described({"model_type": kind, **sizes}))


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("qwen3_5_text", {"attention_bias": True}, "attention_bias=True"),
        ("qwen3_5_text", {"num_experts": 4}, "num_experts=4 is not understood"),
        ("qwen3_5_moe_text", {"intermediate_size": 4}, "intermediate_size=4 is not understood"),
        ("qwen3_5_text", {"hidden_act": "gelu"}, "hidden_act='gelu'; Qwen3.5 computes 'silu'"),
        ("qwen3_5_text", {"attn_output_gate": False}, "attn_output_gate=False; Qwen3.5 computes True"),
        ("qwen3_5_text", {"mamba_ssm_dtype": "bfloat16"}, "mamba_ssm_dtype='bfloat16'"),
    ],
)
def test_what_it_cannot_follow_is_refused_by_name(kind, change, message):
    sizes = MIXTURE if "moe" in kind else DENSE
    with pytest.raises(ValueError, match=message):
        laws.described({"model_type": kind, **sizes, **change})


def test_what_a_configuration_leaves_out_is_as_transformers_has_it():
    """Every fourth layer attends; sizes of heads and experts are those of the published classes."""
    made = laws.described({"model_type": "qwen3_5_moe_text", "vocab_size": 8, "hidden_size": 8, "num_hidden_layers": 4})
    wanted = transformers.Qwen3_5MoeTextConfig(vocab_size=8, hidden_size=8, num_hidden_layers=4)
    assert made.attention.kv_heads == wanted.num_key_value_heads
    assert made.attention.rotated == int(wanted.head_dim * wanted.rope_parameters["partial_rotary_factor"])
    assert made.moe is not None
    assert (made.moe.experts, made.moe.top_k) == (wanted.num_experts, wanted.num_experts_per_tok)
    found = ["full" if "q_offset_K" in made.own(i).specs(1.0)["attention"] else "linear" for i in range(4)]
    assert [f"{kind}_attention" for kind in found] == wanted.layer_types
