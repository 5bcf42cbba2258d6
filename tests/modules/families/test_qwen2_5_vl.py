"""Qwen2.5-VL, whose tower looks through windows and whose places are of seconds, equals transformers'."""

import pytest
import torch

from ftrain.modules.families import qwen2_5_vl
from ftrain.modules.mrope import places
from ftrain.modules.vision_media import prepare
from tests.helpers import seeing_families as laws

transformers = pytest.importorskip("transformers", minversion="5.24")

ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
EYES = {
    "depth": 3,
    "hidden_size": 8,
    "out_hidden_size": 16,
    "num_heads": 2,
    "intermediate_size": 12,
    "patch_size": 2,
    "window_size": 8,
    "fullatt_block_indexes": [1],
    "tokens_per_second": 3,
}


def config(**eyes):
    return transformers.Qwen2_5_VLConfig(
        text_config={**laws.WORDS, "rope_parameters": ROPE}, vision_config={**EYES, **eyes}, **laws.IDS
    )


def media(**changes):
    return qwen2_5_vl.config({**config().to_dict(), **changes}).media


@pytest.mark.parametrize(
    ("parts", "seed"),
    [(laws.MIXED, 0), (((9,), (2, 3)), 1), (((1, (10, 6), 2, (4, 4), 1),), 2), (((2, (5, 6, 4), 3),), 3)],
)
def test_loss_and_gradients_are_those_of_transformers(parts, seed, tmp_path):
    made = laws.require_those_of_transformers(config(), tmp_path, media(), parts, seed=seed)
    laws.require_saved_as_it_was(made, tmp_path)
    assert made.why == "native: qwen2_5_vl is a family of the library"


def test_text_goes_on_behind_all_places_of_a_video_where_the_file_says_so():
    """As transformers 4 placed it, with which the published models were trained."""
    given = laws.document((2, (4, 4, 4), 3), media())
    newer, older = (prepare(given, media(text_after_video=rule))["positions"] for rule in ("extent", "max"))
    assert torch.equal(newer[:19], older[:19])
    assert newer[-1].tolist() == [8] * 3
    assert older[-1].tolist() == [3 + 3 * 3 * 1.5 // 1 + 4] * 3
    assert places(0, 0, []).shape == (0, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window_size": 3}, "window_size=3 is less than a token"),
        ({"fullatt_block_indexes": [5]}, "full_layers names layer 5 of 3"),
        ({"hidden_act": "quick_gelu"}, "hidden_act='quick_gelu'; this tower computes 'silu'"),
        ({"num_heads": 4}, "heads of a multiple of 4 dims"),
        ({"own": 3}, "own=3 is not understood"),
    ],
)
def test_what_it_cannot_follow_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        qwen2_5_vl.config({**config().to_dict(), "vision_config": {**EYES, **changes}})


def test_it_writes_what_transformers_does(tmp_path):
    laws.require_same_text(laws.random_model(config()), media(), tmp_path)
