"""Qwen3.5, whose decoder mixes delta nets and gated attention, equals transformers', with an MLP and with experts."""

import pytest
import torch

from ftrain.modules.families import qwen3_5_vl
from tests.helpers import seeing_families as laws

transformers = pytest.importorskip("transformers", minversion="5.24")

ROPE = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5, "mrope_interleaved": True}
SIZES = {
    **{name: size for name, size in laws.WORDS.items() if name != "intermediate_size"},
    "head_dim": 16,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 10,
    "layer_types": ["linear_attention", "full_attention"],
    "rope_parameters": {**ROPE, "mrope_section": [2, 1, 1]},
}
EXPERTS = {
    "moe_intermediate_size": 12,
    "shared_expert_intermediate_size": 20,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}
EYES = {
    "depth": 2,
    "hidden_size": 8,
    "out_hidden_size": 16,
    "num_heads": 2,
    "intermediate_size": 12,
    "patch_size": 2,
    "num_position_embeddings": 9,
}


def dense(**words):
    text = {**SIZES, "intermediate_size": 24, **words}
    return transformers.Qwen3_5Config(text_config=text, vision_config=EYES, **laws.IDS)


def mixture(**words):
    text = {**SIZES, **EXPERTS, **words}
    return transformers.Qwen3_5MoeConfig(text_config=text, vision_config=EYES, **laws.IDS)


KINDS = {"qwen3_5": (dense, qwen3_5_vl.config), "qwen3_5_moe": (mixture, qwen3_5_vl.mixture_config)}


def media(kind="qwen3_5"):
    make, config = KINDS[kind]
    return config(make().to_dict()).media


@pytest.mark.parametrize(
    ("kind", "parts", "seed"),
    [
        ("qwen3_5", laws.MIXED, 0),
        ("qwen3_5", ((1, (10, 6), 2, (2, 2), 1), (9,), (2, (3, 4, 6), 3)), 1),
        ("qwen3_5_moe", laws.MIXED, 2),
    ],
)
def test_loss_and_gradients_are_those_of_transformers(kind, parts, seed, tmp_path):
    given = (KINDS[kind][0](), tmp_path, media(kind), parts)
    # ours in float64: through the recurrence transformers in float32 is up to 3e-5 off
    made = laws.require_those_of_transformers(*given, seed=seed, dtype=torch.float64)
    laws.require_saved_as_it_was(made, tmp_path)
    assert made.why == f"native: {kind} is a family of the library"


@pytest.mark.parametrize("kind", KINDS)
def test_it_writes_what_transformers_does(kind, tmp_path):
    laws.require_same_text(laws.random_model(KINDS[kind][0]()), media(kind), tmp_path)
