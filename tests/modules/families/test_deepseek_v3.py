"""DeepSeek-V3 equals transformers' for the same weights: loss, gradients, files, caches; and on meshes itself."""

import pytest
import torch

import ftrain
from ftrain.modules import moe
from ftrain.sharding import Mesh
from tests.helpers import text_families as laws
from tests.helpers.deepseek import SIZES, config

transformers = pytest.importorskip("transformers", minversion="5")

PLAIN = {"q_lora_rank": None, "attention_bias": True, "rope_interleave": False, "norm_topk_prob": False}
PLAIN |= {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}}


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    folder = laws.saved(laws.random_model(config()), tmp_path_factory.mktemp("deepseek") / "weights")
    return ftrain.hf.open(folder, native="always")


@pytest.mark.parametrize("changes", [{}, PLAIN], ids=["published", "plain queries, biases, halves"])
def test_loss_and_gradients_are_those_of_transformers(changes, tmp_path):
    made = laws.require_those_of_transformers(config(**changes), tmp_path)
    laws.require_saved_as_it_was(made, tmp_path)


@pytest.mark.parametrize(
    "mesh",
    [
        Mesh(shard=2, kind="virtual"),
        Mesh(sequence=2, kind="virtual"),
        Mesh(shard=2, expert=2, kind="virtual"),
    ],
    ids=str,
)
def test_a_mesh_gives_what_one_device_gives(native, mesh):
    """The new biases too, which are the auxiliary result."""
    loss, gradients = laws.on_mesh(native, mesh)
    assert loss < 1e-12
    assert gradients < 1e-11


def test_tokens_one_by_one_are_those_of_the_whole_text(native):
    laws.require_one_by_one(native, laws.described({"model_type": "deepseek_v3", **SIZES}))


def test_biases_of_the_folder_are_the_state_and_move_against_the_load(native, tmp_path):
    params, given = native.load(), laws.batch(64)
    before = native.state["router_bias_LE"]
    assert before.shape == (1, 6)
    assert before.abs().min() > 0
    _, after = native.loss(params, given)
    moved = (after["router_bias_LE"] - before) / 1e-3
    torch.testing.assert_close(moved.round(), moved, rtol=0, atol=1e-3)
    assert moved.amin() < -0.5
    assert moved.amax() > 0.5
    native.save(params, tmp_path, after)
    again = ftrain.hf.open(tmp_path)
    assert torch.equal(again.state["router_bias_LE"], after["router_bias_LE"])
    assert ftrain.tree.diff(again.load(), params) == ""


def test_biases_move_the_choice(native):
    """With a bias above every score an expert is chosen by every token of which its group is."""
    params, given = native.load(), laws.batch(64)
    high = {"router_bias_LE": torch.zeros(1, 6)}
    high["router_bias_LE"][:, 5] = 9.0
    _, after = native.loss(params, given, state=high)
    assert (after["router_bias_LE"][:, 5] < 9.0).all()
    assert not torch.equal(native.logits(params, given), native.logits(params, given, state=high))


def test_it_generates_what_transformers_does(tmp_path):
    laws.require_same_text("deepseek_v3", config(), tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ({"scoring_func": "softmax"}, "scoring_func='softmax'"),
        ({"num_key_value_heads": 2}, "num_key_value_heads=2"),
        ({"first_k_dense_replace": -1}, "first_k_dense_replace=-1"),
        ({"num_nextn_predict_layers": -1}, "num_nextn_predict_layers=-1"),
        ({"n_group": 4}, "groups=4 must divide experts=6"),
        ({"topk_group": 1}, "top_k=3 is more than the 2 experts"),
        ({"hidden_activation": "relu"}, "hidden_activation='relu' is not understood"),
    ],
)
def test_what_it_cannot_follow_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        laws.described({"model_type": "deepseek_v3", **SIZES, **change})


def test_only_experts_of_the_best_groups_are_chosen():
    cfg = moe.MoEConfig(4, 4, experts=6, top_k=2, score="sigmoid", groups=3, top_groups=1)
    # the best two of the second group score highest together, though the best expert is in the first
    logits_E = torch.tensor([3.0, -9.0, 2.0, 2.0, 1.0, 0.0])
    expert_TK, _, _ = moe.route(torch.diag(torch.ones(6))[:4] * 0, torch.zeros(1, 4), cfg=cfg, b_router_E=logits_E)
    assert sorted(expert_TK[0].tolist()) == [2, 3]
