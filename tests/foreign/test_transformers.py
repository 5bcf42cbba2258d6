"""Tiny models of transformers, unchanged: three steps equal eager ones in float64, dropout included."""

import pytest
import torch
from torch import nn

import ftrain
from tests.helpers.foreign_steps import assert_equal, eager_steps, three_steps

transformers = pytest.importorskip("transformers")

SMALL = {"vocab_size": 17, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SMALL, intermediate_size=12, num_key_value_heads=1),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=17, n_embd=8, n_layer=2, n_head=2, n_positions=8),
    "gemma2": lambda: transformers.Gemma2Config(**SMALL, intermediate_size=12, num_key_value_heads=1, head_dim=4),
}


class Logits(nn.Module):
    """The logits of a causal model, without a cache."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, ids):
        return self.inner(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("name", CONFIGS)
def test_a_causal_model(name):
    model = Logits(transformers.AutoModelForCausalLM.from_config(CONFIGS[name]())).double().train()
    ids = torch.randint(0, 17, (2, 6))
    expected = eager_steps(model, ids)
    for options in ({}, {"donate": "params", "remat": "layer"}):
        assert_equal(three_steps(model, ids, lambda step, o=options: ftrain.jit(step, **o)), expected, f"{options}")
