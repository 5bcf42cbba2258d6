"""Random numbers that a module draws in its own way: from a key, the same on a mesh, or refused."""

import copy

import pytest
import torch

import ftrain
from ftrain.bridge import from_transformers
from ftrain.bridge.draws import drawing
from ftrain.bridge.skeleton import flatten, nest
from ftrain.sharding import Layout, Mesh, Plan

transformers = pytest.importorskip("transformers", minversion="5")


def test_tensors_are_filled_from_the_key():
    with drawing(ftrain.key(1)):
        uniform, normal = torch.empty(4000).uniform_(2.0, to=4.0), torch.empty(4000).normal_(1.0, 3.0)
        waiting = torch.empty(4000).exponential_(0.5)
    assert 2.0 <= float(uniform.min()) < float(uniform.max()) < 4.0 and abs(float(uniform.mean()) - 3.0) < 0.05
    assert abs(float(normal.mean()) - 1.0) < 0.2 and abs(float(normal.std()) - 3.0) < 0.2
    assert float(waiting.min()) >= 0.0 and abs(float(waiting.mean()) - 2.0) < 0.2
    with drawing(ftrain.key(1)):
        assert torch.equal(uniform, torch.empty(4000).uniform_(2.0, to=4.0))


def test_what_cannot_be_drawn_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match=r"exponential_ draws random numbers .* key=ftrain.key\(0\)"), drawing(None):
        torch.empty(3).exponential_()
    with pytest.raises(ValueError, match=r"multinomial draws .*pass the numbers in the batch"), drawing(ftrain.key(0)):
        torch.multinomial(torch.ones(3), 1)
    with pytest.raises(ValueError, match="seeds the random numbers of the process"), drawing(ftrain.key(0)):
        torch.manual_seed(torch.initial_seed() + 1)


def test_a_router_that_draws_is_the_plain_one_and_the_same_on_a_mesh():
    config = transformers.PhimoeConfig(
        vocab_size=61, hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4, max_position_embeddings=32, input_jitter_noise=0.1, pad_token_id=0,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    module = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").train()
    params = nest({name: p.detach().clone() for name, p in module.named_parameters()})
    model = from_transformers(copy.deepcopy(config))
    tokens_BL = torch.randint(3, 61, (2, 6), generator=torch.Generator().manual_seed(1))
    batch = {"tokens": tokens_BL, "labels": tokens_BL.roll(-1, 1)}
    with drawing(ftrain.key(4), 2, 6):
        logits_BLV = module(tokens_BL).logits
    loss = torch.nn.functional.cross_entropy(logits_BLV.flatten(0, 1), batch["labels"].flatten())
    loss.backward()

    plan = Plan(Mesh(shard=2, kind="virtual"), Layout())
    grad = ftrain.value_and_grad(model.loss)
    for options in ({}, {"plan": plan, "specs": model.specs}):
        value, grads = ftrain.jit(lambda params, batch, key: grad(params, batch, key), **options)(
            params, batch, ftrain.key(4)
        )
        torch.testing.assert_close(value, loss.detach())
        for name, found in flatten(grads).items():
            torch.testing.assert_close(found, module.get_parameter(name).grad, rtol=1e-4, atol=1e-6)
