"""A model that bounds its own weights in place while it runs: Gemma 3n."""

import copy

import pytest
import torch

import ftrain
from ftrain.bridge import from_transformers
from ftrain.bridge.skeleton import flatten, nest

transformers = pytest.importorskip("transformers", minversion="5")

BOUND = 0.005


def config():
    return transformers.Gemma3nTextConfig(
        vocab_size=61, vocab_size_per_layer_input=61, hidden_size=16, hidden_size_per_layer_input=4,
        intermediate_size=[8], num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        num_kv_shared_layers=0, laurel_rank=4, altup_num_inputs=2, altup_coef_clip=BOUND,
        layer_types=["full_attention"], activation_sparsity_pattern=[0.0], pad_token_id=0,
    )  # fmt: skip


def test_gradients_are_those_at_the_weights_that_it_writes():
    torch.manual_seed(0)
    module = transformers.AutoModelForCausalLM.from_config(config(), attn_implementation="eager").train()
    params = nest({name: p.detach().clone() for name, p in module.named_parameters()})
    tokens_T = torch.randint(3, 61, (6,), generator=torch.Generator().manual_seed(1))
    loss = torch.nn.functional.cross_entropy(module(tokens_T[None, :-1]).logits[0], tokens_T[1:])
    loss.backward()

    model = from_transformers(copy.deepcopy(config()))
    assert "which it writes over while it runs" in model.why
    before = {name: x.clone() for name, x in flatten(params).items()}
    batch = {"tokens": tokens_T[:-1], "labels": tokens_T[1:]}
    value, grads = ftrain.jit(lambda params, batch: ftrain.value_and_grad(model.loss)(params, batch))(params, batch)

    torch.testing.assert_close(value, loss.detach())
    for name, grad in flatten(grads).items():
        own = module.get_parameter(name).grad
        torch.testing.assert_close(grad, torch.zeros_like(grad) if own is None else own, rtol=1e-4, atol=1e-6)
        assert torch.equal(flatten(params)[name], before[name])
    written = [name for name in before if not torch.equal(module.get_parameter(name).detach(), before[name])]
    assert written  # by the module itself
