"""`Model.read`: the weights of a folder one by one, so that none need be whole beside the others."""

import pytest
import torch
from transformers import LlamaConfig, Qwen3MoeConfig

import ftrain
from ftrain import lora
from ftrain.modules.spec import leaves_with_paths
from ftrain.run.recipe import BASE, Recipe, optimizer
from ftrain.tasks import NextToken
from tests.helpers.model_folders import write_model

SIZES = {
    "vocab_size": 12, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "intermediate_size": 16, "head_dim": 8,
}  # fmt: skip
CONFIGS = {
    "tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "experts": Qwen3MoeConfig(**SIZES, moe_intermediate_size=8, num_experts=4, num_experts_per_tok=2),
}


@pytest.fixture(scope="module", params=CONFIGS)
def folder(request, tmp_path_factory):
    made = tmp_path_factory.mktemp(request.param)
    write_model(CONFIGS[request.param], made)
    return made


@pytest.mark.parametrize("native", ["always", "never"])
def test_each_weight_is_that_of_the_whole_and_a_base_is_quantized_one_by_one(folder, native):
    model = ftrain.hf.open(folder, native=native)
    whole = model.load()
    for path, weight in leaves_with_paths(whole):
        assert torch.equal(model.read(path), weight), path
    adapter = lora.add(model, "all-linear", rank=2)
    tx = optimizer(ftrain.optim.constant(1e-3), clip=1.0, weight_decay=0.0)
    recipe = Recipe(model, NextToken(), tx, adapter, quantized="int8")
    state = recipe.init(ftrain.key(0))
    recipe.load(state)
    wanted = dict(leaves_with_paths(lora.quantize(whole, model.specs, "int8")))
    found = dict(leaves_with_paths(state.extra[BASE]))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[path], wanted[path]) for path in wanted)
