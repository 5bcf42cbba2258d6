"""Qwen3-VL with experts equals transformers', in both layouts of its files; and on meshes itself."""

import pytest
import torch
from safetensors.torch import load_file, save_file

import ftrain
from ftrain import tree
from ftrain.modules.families import qwen3_vl_moe
from ftrain.sharding import Layout, Mesh
from tests.helpers import seeing_families as laws

transformers = pytest.importorskip("transformers", minversion="5.24")

ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "head_dim": 8}
EYES = {
    "depth": 1,
    "hidden_size": 8,
    "out_hidden_size": 16,
    "num_heads": 2,
    "intermediate_size": 12,
    "patch_size": 2,
    "num_position_embeddings": 9,
    "deepstack_visual_indexes": [0],
}


def config(**words):
    text = {**laws.WORDS, **EXPERTS, "rope_parameters": ROPE, **words}
    return transformers.Qwen3VLMoeConfig(text_config=text, vision_config=EYES, **laws.IDS)


def media():
    return qwen3_vl_moe.config(config().to_dict()).media


@pytest.mark.parametrize(
    ("words", "parts", "seed"), [({}, laws.MIXED, 0), ({"mlp_only_layers": [0]}, ((2, (4, 4), 5), (4,)), 1)]
)
def test_loss_and_gradients_are_those_of_transformers(words, parts, seed, tmp_path):
    made = laws.require_those_of_transformers(config(**words), tmp_path, media(), parts, seed=seed)
    laws.require_saved_as_it_was(made, tmp_path)
    assert made.why == "native: qwen3_vl_moe is a family of the library"
    tokens = made.media(laws.pack(laws.documents(media(), parts, seed=seed)))
    _, loads = made.routed(made.load(), tokens)
    assert list(loads) == [f"text.layers.{i}" for i in range(len(words.get("mlp_only_layers", [])), 2)]
    assert all(load.load_E.sum() == 2 * len(tokens["tokens"]) for load in loads.values())


@pytest.mark.parametrize("width", [12, 8, 16])
def test_files_as_they_are_published_have_the_last_two_dims_swapped(width, tmp_path):
    """Also where one of the two tensors does not tell which dims it has: 2 F or F is the model's width."""
    folder = laws.saved(laws.random_model(config(moe_intermediate_size=width)), tmp_path / "weights")
    wanted = ftrain.hf.open(folder).load()
    found = load_file(folder / "model.safetensors")
    published = {k: v.mT.contiguous() if "mlp.experts" in k else v for k, v in found.items()}
    save_file(published, folder / "model.safetensors", metadata={"format": "pt"})
    model = ftrain.hf.open(folder)
    assert tree.diff(model.load(), wanted) == ""
    laws.require_saved_as_it_was(model, tmp_path)


def test_experts_one_by_one_are_the_same_model(tmp_path):
    folder = laws.saved(laws.random_model(config(mlp_only_layers=[0])), tmp_path / "weights")
    fused = ftrain.hf.open(folder)
    batch = fused.media(laws.pack(laws.documents(media(), laws.MIXED)))
    wanted = fused.loss(fused.load(), batch).value()
    split = {}
    for name, x in load_file(folder / "model.safetensors").items():
        there = name.rpartition(".")[0]
        for e in range(4 if ".experts." in name else 0):
            parts = x[e].chunk(2) if name.endswith("gate_up_proj") else (x[e],)
            kinds = ("gate", "up") if len(parts) == 2 else ("down",)
            split |= {f"{there}.{e}.{k}_proj.weight": one.clone() for k, one in zip(kinds, parts, strict=True)}
        split |= {} if ".experts." in name else {name: x}
    save_file(split, folder / "model.safetensors", metadata={"format": "pt"})
    model = ftrain.hf.open(folder)
    torch.testing.assert_close(model.loss(model.load(), batch).value(), wanted, rtol=1e-6, atol=1e-6)
    laws.require_saved_as_it_was(model, tmp_path)


def test_a_mesh_gives_what_one_device_gives(tmp_path):
    native = ftrain.hf.open(laws.saved(laws.random_model(config(num_hidden_layers=1)), tmp_path))
    loss, gradients = laws.on_mesh(native, media(), Mesh(shard=2, expert=2, kind="virtual"), Layout())
    assert loss < 1e-12
    assert gradients < 1e-11


def test_it_writes_what_transformers_does(tmp_path):
    laws.require_same_text(laws.random_model(config()), media(), tmp_path)
