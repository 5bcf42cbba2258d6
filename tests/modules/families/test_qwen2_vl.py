"""Qwen2-VL equals transformers' for the same weights: places, loss, scores, gradients, files; and on meshes itself."""

import pytest

import ftrain
from ftrain.modules.families import qwen2_vl
from ftrain.sharding import Layout, Mesh, Ring
from tests.helpers import seeing_families as laws

transformers = pytest.importorskip("transformers", minversion="5.24")

ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
EYES = {"depth": 2, "embed_dim": 8, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2, "patch_size": 2}


def config(**text):
    return transformers.Qwen2VLConfig(
        text_config={**laws.WORDS, "rope_parameters": ROPE, **text}, vision_config=EYES, **laws.IDS
    )


def media():
    return qwen2_vl.config(config().to_dict()).media


@pytest.mark.parametrize(
    ("parts", "seed"), [(laws.MIXED, 0), (((9,), (2, 3)), 1), ((((4, 4), 2),), 2), (((1, (4, 2, 4), 1),), 3)]
)
def test_loss_and_gradients_are_those_of_transformers(parts, seed, tmp_path):
    made = laws.require_those_of_transformers(config(), tmp_path, media(), parts, seed=seed)
    laws.require_saved_as_it_was(made, tmp_path)
    assert made.why == "native: qwen2_vl is a family of the library"


def test_a_mesh_gives_what_one_device_gives(tmp_path):
    """Ranks have frames of their own, whole, whatever the layout says of the decoder's attention."""
    small = config(num_hidden_layers=1)
    small.vision_config.depth = 1
    native = ftrain.hf.open(laws.saved(laws.random_model(small), tmp_path))
    loss, gradients = laws.on_mesh(native, media(), Mesh(sequence=2, kind="virtual"), Layout(sequence=Ring()))
    assert loss < 1e-12
    assert gradients < 1e-11


def test_it_writes_what_transformers_does(tmp_path):
    laws.require_same_text(laws.random_model(config()), media(), tmp_path)
