"""Qwen3.5, whose decoder mixes delta nets and gated attention, equals transformers', with an MLP and with experts."""

import pytest
import torch
from safetensors.torch import load_file, save_file

import ftrain
from ftrain.modules.families import qwen3_5_vl
from ftrain.sharding import Layout, Mesh
from tests.helpers import seeing_families as laws

transformers = pytest.importorskip("transformers", minversion="5.24")

ROPE = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5, "mrope_interleaved": True}
SIZES = {
    **{name: size for name, size in laws.WORDS.items() if name != "intermediate_size"},
    "head_dim": 16,
    "num_attention_heads": 4,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 4,
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
        ("qwen3_5", laws.MIXED, 1),
        ("qwen3_5", ((1, (10, 6), 2, (2, 2), 1), (9,), (2, (3, 4, 6), 3)), 4),
        ("qwen3_5_moe", laws.MIXED, 3),
    ],
)
def test_loss_and_gradients_are_those_of_transformers(kind, parts, seed, tmp_path):
    given = (KINDS[kind][0](), tmp_path, media(kind), parts)
    # ours in float64: transformers has its recurrence in float32, which is alone up to 1e-5 off
    made = laws.require_those_of_transformers(*given, seed=seed, dtype=torch.float64)
    laws.require_saved_as_it_was(made, tmp_path)
    assert made.why == f"native: {kind} is a family of the library"


def test_experts_of_a_layer_as_two_tensors_and_what_looks_ahead_are_kept(tmp_path):
    """As files are published."""
    folder = laws.saved(laws.random_model(mixture()), tmp_path / "weights")
    apart = ftrain.hf.open(folder)
    batch = apart.media(laws.pack(laws.documents(media(), laws.MIXED)))
    wanted = apart.loss(apart.load(), batch).value()
    found = load_file(folder / "model.safetensors")
    for there in sorted({name.partition(".experts.")[0] for name in found if ".experts." in name}):
        each = [[found.pop(f"{there}.experts.{e}.{n}_proj.weight") for n in ("gate", "up", "down")] for e in range(4)]
        found[f"{there}.experts.gate_up_proj"] = torch.stack([torch.cat([gate, up]) for gate, up, _ in each])
        found[f"{there}.experts.down_proj"] = torch.stack([down for _, _, down in each])
    found["mtp.norm.weight"] = torch.arange(16.0)
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
    model = ftrain.hf.open(folder)
    assert model.specs["text"]["layers"][0]["moe"]["w_gate_up_EDF"].shape == (4, 16, 24)
    torch.testing.assert_close(model.loss(model.load(), batch).value(), wanted, rtol=1e-6, atol=1e-6)
    laws.require_saved_as_it_was(model, tmp_path)


@pytest.mark.parametrize(
    ("place", "changes", "message"),
    [
        ("vision_config", {"deepstack_visual_indexes": [0]}, "deepstack_visual_indexes=.* is not understood"),
        ("text_config", {"attn_output_gate": False}, "attn_output_gate=False"),
        ("text_config", {"rope_parameters": {**ROPE, "mrope_section": [2, 1]}}, "three whole numbers that sum to 4"),
    ],
)
def test_what_it_cannot_follow_is_refused_by_name(place, changes, message):
    said = dense().to_dict()
    with pytest.raises(ValueError, match=message):
        qwen3_5_vl.config({**said, place: {**said[place], **changes}})


def test_what_a_configuration_leaves_out_is_as_transformers_has_it():
    rope = {"rope_type": "default", "rope_theta": 1e7}
    said = {"vocab_size": 8, "hidden_size": 8, "num_hidden_layers": 4, "rope_parameters": rope}
    made = qwen3_5_vl.config({"model_type": "qwen3_5", "text_config": said, "vision_config": {"out_hidden_size": 8}})
    # transformers adds to what it is given
    wanted = transformers.Qwen3_5Config(text_config=said)
    assert (made.media.image, made.media.video) == (wanted.image_token_id, wanted.video_token_id)
    text, eyes, tower = wanted.text_config, wanted.vision_config, made.media.tower
    assert made.text.attention.rotated == text.head_dim * text.rope_parameters["partial_rotary_factor"]
    assert made.text.attention.rope_sections == (11, 11, 10)
    assert (tower.layers, tower.patch, tower.side**2) == (eyes.depth, eyes.patch_size, eyes.num_position_embeddings)


def test_a_mesh_gives_what_one_device_gives(tmp_path):
    """Documents lie over the edges of four ranks, which divide the heads of attention and of delta nets."""
    native = ftrain.hf.open(laws.saved(laws.random_model(dense()), tmp_path))
    loss, gradients = laws.on_mesh(native, media(), Mesh(sequence=4, kind="virtual"), Layout())
    assert loss < 1e-12
    assert gradients < 1e-11


@pytest.mark.parametrize("kind", KINDS)
def test_it_writes_what_transformers_does(kind, tmp_path):
    laws.require_same_text(laws.random_model(KINDS[kind][0]()), media(kind), tmp_path)
