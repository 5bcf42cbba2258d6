"""Qwen3-VL, whose decoder reads the tower's deep layers too, equals transformers'."""

import pytest

from ftrain.modules.families import qwen3_vl
from tests.helpers import seeing_families as laws

transformers = pytest.importorskip("transformers", minversion="5.24")

ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3], "mrope_interleaved": True}
EYES = {
    "depth": 3,
    "hidden_size": 8,
    "out_hidden_size": 16,
    "num_heads": 2,
    "intermediate_size": 12,
    "patch_size": 2,
    "num_position_embeddings": 9,
    "deepstack_visual_indexes": [2, 0],
}


def config(**eyes):
    words = {**laws.WORDS, "head_dim": 16, "rope_parameters": ROPE}
    return transformers.Qwen3VLConfig(text_config=words, vision_config={**EYES, **eyes}, **laws.IDS)


def media():
    return qwen3_vl.config(config().to_dict()).media


@pytest.mark.parametrize(
    ("parts", "seed"),
    [(laws.MIXED, 0), (((9,), (2, 3)), 1), (((1, (10, 6), 2, (2, 2), 1),), 2), (((2, (3, 4, 6), 3),), 3)],
)
def test_loss_and_gradients_are_those_of_transformers(parts, seed, tmp_path):
    made = laws.require_those_of_transformers(config(), tmp_path, media(), parts, seed=seed)
    laws.require_saved_as_it_was(made, tmp_path)
    assert made.why == "native: qwen3_vl is a family of the library"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_position_embeddings": 8}, "8 places are no square table"),
        ({"deepstack_visual_indexes": [0, 1, 2]}, "3 deep layers for a decoder of 2 layers"),
        ({"out_hidden_size": 12}, "the tower's rows are 12 wide, the decoder's 16"),
    ],
)
def test_what_it_cannot_follow_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        qwen3_vl.config({**config().to_dict(), "vision_config": {**EYES, **changes}})


def test_it_writes_what_transformers_does(tmp_path):
    laws.require_same_text(laws.random_model(config()), media(), tmp_path)
