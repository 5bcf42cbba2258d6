"""`ftrain train` of a mixture whose balancing biases move with the load of its experts, beside the parameters."""

import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from ftrain.cli.main import main
from ftrain.run.folder import read_metrics
from tests.helpers.chat_folders import chats, write_chat_model, write_rows

SIZES = {
    "vocab_size": 260, "hidden_size": 16, "intermediate_size": 16, "moe_intermediate_size": 8, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8, "v_head_dim": 8, "n_shared_experts": 1, "max_position_embeddings": 256,
}  # fmt: skip
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = write_chat_model(tmp_path_factory.mktemp("model"), layers=1)
    torch.manual_seed(0)
    DeepseekV3ForCausalLM(DeepseekV3Config(**SIZES)).save_pretrained(folder)
    write_rows(folder / "chat.jsonl", chats(40))
    return folder


def train(model, out, *words):
    told = ["--model", str(model), "--data", str(model / "chat.jsonl"), "--out", str(out), "--tokens", "128"]
    short = ["--packs", "2", "--steps", "4", "--rate", "1e-2", "--warmup", "0", "--every.save", "2", "--held-out", "0"]
    return main(["train", "sft", *told, *short, *words])


def losses(out):
    return [row["loss"] for row in read_metrics(out)]


def test_biases_move_are_saved_and_go_on_with_the_same_bits_and_on_two_ranks(model, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert train(model, whole) == 0
    before, after = (load_file(f / "model.safetensors")[BIAS] for f in (model, whole / "model"))
    assert not torch.equal(after, before)
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoints" / "global_step_4")
    shutil.rmtree(cut / "model")
    assert main(["train", "sft", "--config", str(cut / "config.json"), "--out", str(cut)]) == 0
    assert losses(cut) == losses(whole)
    again = load_file(cut / "model" / "model.safetensors")
    for name, found in load_file(whole / "model" / "model.safetensors").items():
        assert torch.equal(again[name], found), name
    assert train(model, tmp_path / "two", "--shard", "2") == 0
    assert losses(tmp_path / "two") == pytest.approx(losses(whole), rel=1e-4)
    assert torch.equal(load_file(tmp_path / "two" / "model" / "model.safetensors")[BIAS], after)


def test_an_adapter_leaves_the_biases_of_its_model(model, tmp_path):
    assert train(model, tmp_path / "run", "--lora.rank", "2", "--save-merged", "--steps", "1") == 0
    before, after = (load_file(f / "model.safetensors")[BIAS] for f in (model, tmp_path / "run" / "model"))
    assert torch.equal(before, after)
